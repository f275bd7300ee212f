"""`lorakit doctor`: what is wrong with an adapter, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorakit.cli.output import console_for, escaped, print_json
from lorakit.diagnosis.doctor import doctor as library_doctor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.diagnosis.finding import Finding

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def doctor(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, a file, or a repository of the hub.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base: a folder with config.json, or a repository. Its weights are not read."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Tell whether an adapter would load, into what, what is odd about it, and the fix.

    Exit code 0 where no finding is an error, 1 where one is.

    Example: lorakit doctor my-adapter --base Llama-3.2-1B
    """
    console = console_for(as_json=as_json)
    findings = library_doctor(adapter, base)
    if as_json:
        print_json({"adapter": adapter, "base": base, "findings": [asdict(finding) for finding in findings]})
    else:
        console.print(_table(findings))
        console.print(_summary(findings, base), highlight=False)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(show_lines=True)
    table.add_column("level", no_wrap=True)
    table.add_column("what", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2)
    for finding in findings:
        style = _STYLES[finding.level]
        table.add_row(
            f"[{style}]{finding.level}[/]\n{finding.check}",
            f"{escaped(finding.what)}\n[dim]{escaped(finding.where)}[/]",
            escaped(finding.fix),
        )
    return table


def _summary(findings: Sequence[Finding], base: str | None) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in _STYLES}
    told = ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items())
    if counts["error"]:
        return f"{told}: it does not load as it is"
    return f"{told}: it loads" + (" onto this base" if base else "; pass --base to see whether it fits")
