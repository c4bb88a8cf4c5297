"""Commands that judge and publish: claims, stale, data, site, bench, new."""

from typing import Annotated

import typer
from rich.table import Table

from effnb.lab.cli.common import Chapters, app, chosen, console, fail, scoreboard
from effnb.lab.paths import committed_results, results_root, root
from effnb.lab.run import chapter as runner


@app.command()
def claims(
    diff: Annotated[
        str | None, typer.Option(metavar="REV", help="Show what changed in claims and verdicts since a git revision.")
    ] = None,
    built: Annotated[
        bool, typer.Option("--built", help="Judge the results in _build instead of the committed ones.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Also bring the README's table and pictures up to date with the results.")
    ] = False,
) -> None:
    """Judge all claims anew from their stored values; ends with code 1 if anything does not fit."""
    from effnb.lab.judge import claims as judged
    from effnb.lab.publish import site as pages

    if diff is not None:
        try:
            lines = judged.diff(diff)
        except ValueError as error:
            fail(str(error))
        console.print("\n".join(lines) or f"no claim or verdict changed since {diff}", highlight=False)
        return
    results = results_root() if built else committed_results()
    problems = judged.check(results=results)
    if write and not problems:
        pages.refresh(results)
    scoreboard(results)
    for line in problems:
        console.print(f"[red]claims:[/red] {line}", highlight=False)
    raise typer.Exit(1 if problems else 0)


@app.command()
def stale(
    systems: Chapters = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A part of the key that may differ: notebook, lock or python.")
    ] = None,
) -> None:
    """Name the chapters whose committed result no longer fits their sources; ends with code 1 if there are any."""
    found = {system: set(parts) - set(ignore or []) for system, parts in runner.stale(chosen(systems)).items()}
    found = {system: sorted(parts) for system, parts in found.items() if parts}
    for system, parts in found.items():
        console.print(f"{system}: changed since its run: {', '.join(parts)}", highlight=False)
    if not found:
        console.print("every committed result fits its sources")
    raise typer.Exit(1 if found else 0)


@app.command()
def data(
    action: Annotated[str, typer.Argument(help="`list` or `fetch`.")] = "list",
    name: Annotated[str | None, typer.Argument(help="The data set to fetch.")] = None,
) -> None:
    """List the data sets that chapters use and where they come from, or fetch one."""
    from effnb.lab.measure import data as sets

    if action == "fetch" and name:
        try:
            console.print(f"{name}: {sets.fetch(name)}", highlight=False)
        except (ValueError, OSError, RuntimeError) as error:
            fail(str(error), 1)
    elif action == "list" and name is None:
        table = Table("data set", "here")
        for known in sets.NAMES:
            table.add_row(known, "yes" if sets.available(known) else "no")
        console.print(table)
    else:
        fail(f"use `effnb data list` or `effnb data fetch NAME`, got {action!r} {name or ''}")


@app.command()
def site() -> None:
    """Build the site from the committed outputs into _build/html; any warning is an error."""
    from effnb.lab.publish import site as pages

    raise typer.Exit(pages.build(root() / "notebooks", committed_results()))


@app.command()
def bench(
    systems: Chapters = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds each: shows that they run, measures nothing.")
    ] = False,
) -> None:
    """Time the methods against what a user would otherwise pick, into book/results/bench/."""
    from effnb.lab.publish import site as pages
    from effnb.lab.run import bench as benches

    records = benches.run_all(chosen(systems) if systems else [], quick=quick)
    if not quick:
        pages.refresh()
    raise typer.Exit(1 if any("error" in record for record in records) else 0)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The system's name in lower case with underscores.")],
    part: Annotated[str, typer.Option(help="The package of its part: solvers, compress, sparse, nas, optim, ...")],
    number: Annotated[int, typer.Option(min=1, max=99, help="The chapter's number in the book.")],
    title: Annotated[str | None, typer.Option(help="Short title; default from the name.")] = None,
) -> None:
    """Make a chapter's notebook, module, test, claims and benchmark files from the skeleton."""
    from effnb.lab.run import skeleton

    try:
        made = skeleton.create(name, part, number, title)
    except (ValueError, FileExistsError) as error:
        fail(str(error))
    for path in made:
        console.print(str(path.relative_to(root())), highlight=False)
    console.print(f"Next: write the claims, register them with a commit, then `effnb run {name}`.", highlight=False)
