"""What the tests of the command line share: `sparta` run in this process."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sparta_kernels import cli, training

# A run of moments on the images of the fixture `few_images`: 40, in batches of at most 16, so three steps an epoch.
TRAIN = ["--width", "2", "--epochs", "2", "--batch-size", "16", "--attack-steps", "1", "--schedule", "one-cycle"]


def store_network(folder):
    """A checkpoint in this folder of pytest's, of a small network."""
    path = folder / "net.safetensors"
    training.train(training.Settings(width=2, epochs=1, attack="none"), path)
    return path


def run(*arguments):
    """The command's result, with what it printed."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def one_line(arguments, capsys):
    """The exit status of the whole program, and what it wrote to standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    return stop.value.code, err
