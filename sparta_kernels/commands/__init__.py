"""The commands of `sparta`, one file each."""
