"""Commands that run chapters: list, run, book, smoke, sweep."""

from typing import Annotated

import typer
from rich.table import Table

from effnb.lab.cli.common import Chapters, Jobs, Parameter, Profile, app, chosen, console, fail, parameters, scoreboard
from effnb.lab.paths import results_root, root
from effnb.lab.run import chapter as runner
from effnb.lab.run import stale as key
from effnb.lab.run.progress import run_with_progress


def _outcome(records: list[runner.RunRecord]) -> bool:
    """Print a table of runs and the log of each that did not end well; whether all did."""
    table = Table("chapter", "status", "seconds", title="Chapters")
    for record in records:
        colour = "green" if record.status == "ok" else "red"
        table.add_row(record.system, f"[{colour}]{record.status}[/]", f"{record.seconds:.1f}")
    for record in records:
        if record.error:
            console.rule(f"{record.system}: {record.status}")
            console.print(record.error, markup=False, highlight=False)
    console.print(table)
    return all(record.status == "ok" for record in records)


@app.command("list")
def list_chapters() -> None:
    """Show every chapter with its claims, verdicts and the seconds that it takes."""
    from effnb.lab.judge import claims

    table = Table("no", "chapter", "title", "claims", "reproduced", "seconds")
    for system, path in key.chapters().items():
        registered, result = claims.load(system), claims.load_result(system)
        entries = result["claims"].values() if result else []
        passed = sum(e["verdict"] in ("reproduced", "checked-analytically") for e in entries)
        seconds = f"{result['runtime_s']:.0f}" if result else "-"
        table.add_row(path.name[:2], system, registered.title, str(len(registered.claims)), str(passed), seconds)
    console.print(table)


@app.command()
def run(
    systems: Chapters = None,
    profile: Profile = "book",
    parameter: Parameter = None,
    jobs: Jobs = 2,
    update: Annotated[
        bool, typer.Option("--update", help="Also refresh the committed outputs and results (profile book).")
    ] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a chapter is stopped.")] = None,
) -> None:
    """Execute chapters with papermill; the executed notebooks go to _build/executed/.

    A failing chapter does not stop the others; the command then ends with code 1 and a table.
    """
    from effnb.lab.publish import site

    values = parameters(parameter)
    if update and (profile != "book" or values):
        fail("--update publishes the book profile as it is: leave out --profile and -p")
    try:
        records = run_with_progress(chosen(systems), profile, values, jobs, console, timeout=timeout)
    except ValueError as error:
        fail(str(error))
    for record in records:
        if update and record.status == "ok":
            changed = runner.update(record.system, record.notebook)
            names = ", ".join(str(path.relative_to(root())) for path in changed) or "nothing changed"
            console.print(f"{record.system}: {names}", highlight=False)
    if update:
        site.refresh()
    raise typer.Exit(0 if _outcome(records) else 1)


@app.command()
def book(jobs: Jobs = 2) -> None:
    """Execute every chapter, judge all claims, build the site, print the scoreboard.

    Ends with code 1 if a chapter fails, a stored verdict does not follow from its values, a verdict is worse than the
    committed one beyond its intervals (times apart), or the site has a warning.
    """
    from effnb.lab.judge import claims
    from effnb.lab.publish import site

    systems = list(key.chapters())
    runner.clean()
    records = run_with_progress(systems, "book", {}, jobs, console)
    fine = _outcome(records)
    finished = [record.system for record in records if record.status == "ok"]
    problems = claims.check(finished, results=results_root()) + claims.compare(results_root())
    for line in problems:
        console.print(f"[red]claims:[/red] {line}", highlight=False)
    for line in claims.compare(results_root(), excused=True):
        console.print(f"[yellow]no failure:[/yellow] {line}, by times or within the old intervals", highlight=False)
    if not fine or site.build(root() / "_build" / "executed", results_root()) or problems:
        raise typer.Exit(1)
    scoreboard(results_root())


@app.command()
def smoke(systems: Chapters = None) -> None:
    """Run chapters at smoke scale through nbval, which compares the outputs that must never change."""
    from effnb.lab.run import smoke as smoke_runs

    raise typer.Exit(smoke_runs.run(chosen(systems)))


def _sweep_line(ended: int, cells: int, record: dict) -> None:
    values = " ".join(f"{k}={v}" for k, v in {**record["parameters"], "seed": record["seed"]}.items())
    console.print(f"{ended}/{cells} {values}: {record['status']}, {record['seconds']:.1f} s", highlight=False)


@app.command()
def sweep(
    system: Annotated[str, typer.Argument(help="The chapter to sweep.")],
    grid: Annotated[
        list[str], typer.Option(help="Values of one parameter, NAME=V1,V2,...; may be repeated for a grid.")
    ],
    seeds: Annotated[str, typer.Option(help="Seeds, as 0-9 or 0,1,5.")] = "0",
    jobs: Jobs = 2,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, or `auto`; default: processes on this machine.")
    ] = None,
    profile: Profile = "book",
    out: Annotated[str | None, typer.Option(help="Output folder; default _build/sweeps/SYSTEM.")] = None,
) -> None:
    """Run a chapter once for each grid cell and seed, and gather the figures with intervals.

    Cells that are finished are not run again; one that fails does not lose the others.
    """
    from effnb.lab.run import sweep as sweeps

    try:
        values, numbers = sweeps.parse_grid(grid), sweeps.parse_seeds(seeds)
        table = sweeps.sweep(
            chosen([system])[0],
            values,
            numbers,
            jobs=jobs,
            ray_address=ray,
            profile=profile,
            out=out,
            on_cell=_sweep_line,
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    console.print(table.text(), highlight=False, markup=False)
    raise typer.Exit(1 if table.failures else 0)
