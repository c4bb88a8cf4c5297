"""What all commands share: the application, the console, arguments and errors."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from effnb.lab.run import stale as key

app = typer.Typer(
    help="Run, judge and publish the chapters of the effnb reproduction book.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=False)

Chapters = Annotated[
    list[str] | None, typer.Argument(help="Chapters by system name, as `effnb list` shows them; none means all.")
]
Profile = Annotated[
    str, typer.Option(help="Parameter set: smoke (seconds), book (what is published), paper (needs a GPU).")
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Chapters at a time; each uses one thread.")]
Parameter = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", help="Override one parameter, NAME=VALUE (YAML); may be repeated."),
]


def fail(message: str, code: int = 2) -> None:
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False)
    raise typer.Exit(code)


def parameters(pairs: list[str] | None) -> dict:
    found = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier():
            fail(f"a parameter must read NAME=VALUE, got {pair!r}")
        found[name] = yaml.safe_load(value)
    return found


def chosen(systems: list[str] | None) -> list[str]:
    known = list(key.chapters())
    for system in systems or []:
        if system not in known:
            fail(f"no chapter {system!r}; there are {', '.join(known)}")
    return systems or known


def scoreboard(results: Path) -> None:
    from effnb.lab.judge import claims

    table = Table("claim", "statement", "ours", "verdict", title="Scoreboard (profile book)")
    for row in claims.joined(results):
        entry = row["entry"]
        measured = claims.format_measured(entry and entry["measured"])
        table.add_row(row["claim"].id, row["claim"].statement, measured, entry["verdict"] if entry else "not run")
    console.print(table)
