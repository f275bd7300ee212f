"""The command `lorakit`: one file a verb; a verb is a parser, one library call and one printout."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exit code 0 on success, 1 on a refusal, 2 on a wrong call."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # which is read when it is imported
    try:
        from lorakit.cli.app import app
    except ImportError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit(f"lorakit: the command line needs {error.name}: pip install 'lorakit[cli]'")
    app()
