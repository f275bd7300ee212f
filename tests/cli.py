"""Calling a verb as a shell does."""

from __future__ import annotations

import errno
import json
import os

from typer.testing import CliRunner

from lorakit.cli.app import app


def run(*arguments, columns=160):
    """The outcome of a verb, on a terminal of so many columns."""
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": str(columns)})


def succeed(*arguments):
    """What a verb printed; it must end with exit code 0."""
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output + repr(outcome.exception)
    return outcome.stdout


def as_json(*arguments):
    """The result of a verb under --json: all that stdout holds."""
    return json.loads(succeed(*arguments, "--json"))


def refused(*arguments, code=1):
    """The message of a verb that ends in an error; nothing of it is on stdout, and there is no traceback."""
    outcome = run(*arguments, columns=10_000)
    assert outcome.exit_code == code, outcome.output
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    _, mark, told = outcome.stderr.partition("lorakit: ")
    assert mark, outcome.stderr
    assert "lorakit: " not in told
    return told


def fill_disk(monkeypatch):
    """From now on every write fails as on a full disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
