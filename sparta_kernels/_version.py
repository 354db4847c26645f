"""The version, in its one place: the package, `sparta info` and the build read it here."""

__version__ = "0.1.0"
