"""The ``effnb`` command: list, run, sweep, judge, publish and extend the book."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer import Argument, Option
from typer.core import TyperGroup

from effnb.lab import show
from effnb.lab.judge.claims import PASSED, is_worse, load
from effnb.lab.judge.results import check, compare, format_measured, joined, load_result, stated_verdict
from effnb.lab.measure import data as sets
from effnb.lab.paths import chapter_path, chapters, committed_results, results_root, root
from effnb.lab.publish import site
from effnb.lab.run import bench as benches
from effnb.lab.run import chapter, skeleton, stale
from effnb.lab.run.parameters import parse_grid, parse_parameters, parse_seeds, profiles

#: What draws the cells of a notebook that show stored results.
RENDER: chapter.Renderers = {"lead": show.lead, "at-a-glance": show.at_a_glance, "study": show.study}
#: Verdicts as they are counted in one line, reproduced and checked analytically together.
COUNTED = ((*PASSED,), ("partially",), ("not-reproduced-at-this-scale",), ("not-tested",))

console, errors = Console(highlight=False), Console(stderr=True, highlight=False)


def fail(message: str, code: int = 2) -> None:
    """Print one line and end."""
    errors.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


class _OneLine(TyperGroup):
    """Tells an error in one line; ``--debug`` shows where it was raised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Typer's own, of whatever version: usage errors and exits have a code, an abort tells itself.
            if ctx.params.get("debug") or hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise
            kinds = (ValueError, OSError, ImportError, RuntimeError)
            told = str(error) if isinstance(error, kinds) and str(error) else f"{type(error).__name__}: {error}"
            fail(" ".join(told.split()))


app = typer.Typer(cls=_OneLine, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Chapters = Annotated[list[str] | None, Argument(help="Chapters by system name, as in `effnb list`; none means all.")]
Profile = Annotated[
    str, Option(help="Parameter set: smoke (seconds), book (what CI publishes), study (up to an hour, the evidence).")
]
Jobs = Annotated[int, Option("--jobs", "-j", min=1, help="Chapters at a time; each uses one thread.")]
Parameter = Annotated[
    list[str] | None, Option("--parameter", "-p", help="Override one parameter, NAME=VALUE; may be repeated.")
]
Timeout = Annotated[float | None, Option(min=0.001, help="Seconds after which a chapter is stopped.")]


@app.callback()
def main(debug: Annotated[bool, Option("--debug", help="Show where an error was raised.")] = False) -> None:
    """Run, judge and publish the chapters of the effnb reproduction book."""


def chosen(systems: Sequence[str] | None) -> list[str]:
    """Return the chapters asked for, all if none was named."""
    for system in systems or []:
        chapter_path(system)
    if not (found := list(systems or chapters())):
        fail(f"no chapters in {root() / 'notebooks'}")
    return found


# --- running -------------------------------------------------------------------------------------------------------


def run_with_progress(
    systems: Sequence[str], profile: str, values: Mapping, jobs: int, timeout: float | None = None
) -> list[chapter.RunRecord]:
    """Run chapters with a bar each and one for all with the time that remains; a line a chapter without a terminal."""
    columns = (TextColumn("{task.description:>28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        weight = {system: chapter.expected_seconds(system, profile) for system in systems}
        whole = bars.add_task("all chapters", total=sum(weight.values()))
        tasks = {system: bars.add_task(system, total=1.0, start=False) for system in systems}

        def on_progress(system: str, share: float) -> None:
            if not bars.tasks[tasks[system]].started:
                bars.start_task(tasks[system])
            bars.update(tasks[system], completed=share)
            bars.update(whole, completed=sum(weight[s] * bars.tasks[tasks[s]].completed for s in systems))

        def on_done(record: chapter.RunRecord) -> None:
            chapter.deliver(record, RENDER)
            on_progress(record.system, 1.0)
            if not console.is_terminal:
                console.print(f"{record.system}: {record.status} after {record.seconds:.1f} s")

        return chapter.execute_all(systems, profile, values, jobs, on_progress, on_done, timeout)


def _failures(records: Sequence[chapter.RunRecord]) -> bool:
    """Print the log of each run that did not end well; whether there was one."""
    bad = [record for record in records if record.status != "ok"]
    for record in bad:
        console.rule(f"{record.system}: {record.status}")
        console.print(record.error, markup=False)
    return bool(bad)


@app.command("list")
def list_chapters(
    names: Annotated[bool, Option("--json", help="Only the names, as a JSON list, for workflows.")] = False,
    profile: Annotated[str | None, Option(help="Only chapters that have this parameter set.")] = None,
) -> None:
    """Show every chapter with its claims, verdicts and the seconds that it takes."""
    systems = [s for s in chosen(None) if profile in (None, "book") or profile in profiles(s)]
    if names:
        print(json.dumps(systems))
        return
    table, wrong = Table("no", "chapter", "title", "claims", "book", "study", "seconds"), []
    for system in systems:
        try:
            claims = load(system)
            results = [load_result(system, "book"), load_result(system, "study")]
        except ValueError as error:  # one bad file must not hide the other chapters
            wrong.append(str(error))
            continue
        passed = [str(sum(e["verdict"] in PASSED for e in r["claims"].values())) if r else "-" for r in results]
        seconds = " + ".join(f"{r['runtime_s']:.0f}" for r in results if r) or "-"
        table.add_row(chapter_path(system).name[:2], system, claims.title, str(len(claims.claims)), *passed, seconds)
    console.print(table)
    if wrong:
        fail("; ".join(wrong), 1)


@app.command()
def run(
    systems: Chapters = None,
    profile: Profile = "book",
    parameter: Parameter = None,
    jobs: Jobs = 2,
    update: Annotated[bool, Option("--update", help="Also commit the results, and what notebooks show.")] = False,
    timeout: Timeout = None,
) -> None:
    """Execute chapters with papermill; the executed notebooks go to _build/executed/.

    A failing chapter does not stop the others; the command then ends with code 1 and a table. A study that is cut off
    goes on where it stopped, unless code or parameters have changed.
    """
    values = parse_parameters(parameter or [])
    if update and (profile == "smoke" or values):
        fail("--update publishes the book or the study profile as it is: leave out --profile smoke and -p")
    records = run_with_progress(chosen(systems), profile, values, jobs, timeout)
    if update:
        for record in (record for record in records if record.status == "ok"):
            changed = chapter.update(record, RENDER)
            names = ", ".join(str(path.relative_to(root())) for path in changed) or "nothing changed"
            console.print(f"{record.system}: {names}")
        site.refresh()
    failed = _failures(records)
    table = Table("chapter", "status", "seconds", title=f"Chapters, profile {profile}")
    for record in records:
        colour = "green" if record.status == "ok" else "red"
        table.add_row(record.system, f"[{colour}]{record.status}[/]", f"{record.seconds:.1f}")
        record.discard()
    console.print(table)
    raise typer.Exit(int(failed))


@app.command()
def book(jobs: Jobs = 2, timeout: Timeout = None) -> None:
    """Execute every chapter, judge all claims, build the site; one line a chapter, and each change of a verdict.

    Ends with code 1 if a chapter fails, a stored verdict does not follow from its values, a verdict is worse than the
    committed one beyond its intervals (times and missing data apart), or the site has a warning.
    """
    systems = chosen(None)
    chapter.clean()
    records = run_with_progress(systems, "book", {}, jobs, timeout)
    for record in records:  # again, in case that another command has delivered meanwhile
        chapter.deliver(record, RENDER)
    failed, built = _failures(records), results_root()
    problems = check([r.system for r in records if r.status == "ok"], results=built)
    worse = [] if problems else compare(built)
    bad_site = 1 if failed or problems else site.build(root() / "_build" / "executed", built)
    console.print(_counts_table({r.system: r for r in records}, built))
    for line in _changes(built, worse) + [f"[red]claims:[/red] {escape(line)}" for line in problems]:
        console.print(line)
    for record in records:
        record.discard()
    raise typer.Exit(int(bool(failed or problems or worse or bad_site)))


def _counts(results: Path | None, system: str, profile: str) -> tuple[str, str]:
    """Return how often each verdict was given, against the strongest rival and as stated, as two short texts."""
    try:
        claims, result = load(system), load_result(system, profile, results)
    except ValueError:
        return "?", "?"
    if result is None:
        return "-", "-"
    entries = [(claim, result["claims"].get(claim.id)) for claim in claims.claims]
    rival, stated = Counter(e and e["verdict"] for _, e in entries), Counter(stated_verdict(*pair) for pair in entries)
    return tuple("/".join(str(sum(found[v] for v in words)) for words in COUNTED) for found in (rival, stated))


def _counts_table(records: Mapping[str, chapter.RunRecord], built: Path) -> Table:
    """Return one line a chapter, readable at 80 columns."""
    table = Table(
        title="Verdicts: reproduced/partially/not reproduced/not tested",
        caption="rival: against the strongest rival; stated: as the paper stated it",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("chapter", "book:\nrival", "\nstated", "study:\nrival", "\nstated", "\nseconds"):
        table.add_column(column, justify="left" if column == "chapter" else "right", no_wrap=True)
    for system, record in records.items():
        fresh = _counts(built, system, "book") if record.status == "ok" else (record.status, "")
        table.add_row(system, *fresh, *_counts(None, system, "study"), f"{record.seconds:.0f}")
    return table


def _changes(built: Path, worse: Sequence[str]) -> list[str]:
    """Return each change of a verdict against the committed results; those that fail are named so."""
    before = {row["claim"].id: row["entry"] for row in joined() if row["entry"]}
    failing = {line.partition(":")[0] for line in worse}
    lines = []
    for row in joined(built):
        claim, now, was = row["claim"], row["entry"], before.get(row["claim"].id)
        if now is None or was is None:
            continue
        as_stated = stated_verdict(claim, was), stated_verdict(claim, now)
        for kind, old, new in (("strongest rival", was["verdict"], now["verdict"]), ("as stated", *as_stated)):
            if old == new:
                continue
            if now["not_tested"] in ("data", "extra"):
                lines.append(f"{claim.id}, {kind}: {old}; {now['not_tested']} not here")
                continue
            told = "worse, within its noise" if is_worse(new, old) else "better"
            if claim.id in failing and kind == "strongest rival":
                told = "[red]worse, a failure[/red]"
            lines.append(f"{claim.id}, {kind}: {old} -> {new} ({told})")
    return lines


@app.command()
def smoke(systems: Chapters = None) -> None:
    """Run chapters at smoke scale through nbval, which compares the outputs that must never change."""
    raise typer.Exit(chapter.smoke(chosen(systems)))


@app.command()
def sweep(
    system: Annotated[str, Argument(help="The chapter to sweep.")],
    grid: Annotated[list[str], Option(help="Values of one parameter, NAME=V1,V2,...; may be repeated for a grid.")],
    seeds: Annotated[str, Option(help="Seeds, as 0-9 or 0,1,5.")] = "0",
    jobs: Jobs = 2,
    ray: Annotated[str | None, Option(help="Address of a Ray cluster, or `auto`; default: this machine.")] = None,
    profile: Profile = "book",
    out: Annotated[str | None, Option(help="Output folder; default _build/sweeps/SYSTEM.")] = None,
    timeout: Timeout = None,
) -> None:
    """Run a chapter once for each grid cell and seed, and gather the figures with intervals.

    Cells that are finished are not run again; one that fails does not lose the others.
    """
    from effnb.lab.run import sweep as sweeps

    def line(ended: int, cells: int, record: dict) -> None:
        values = " ".join(f"{k}={v}" for k, v in {**record["parameters"], "seed": record["seed"]}.items())
        console.print(f"{ended}/{cells} {values}: {record['status']}, {record['seconds']:.1f} s")

    table = sweeps.sweep(system, parse_grid(grid), parse_seeds(seeds), jobs, ray, profile, out, timeout, line)
    console.print(table.text(), markup=False)
    raise typer.Exit(int(bool(table.failures)))


# --- judging and publishing ------------------------------------------------------------------------------------------


@app.command()
def claims(
    diff: Annotated[str | None, Option(metavar="REV", help="Show what has changed since a git revision.")] = None,
    built: Annotated[bool, Option("--built", help="Judge the results in _build, not the committed ones.")] = False,
    write: Annotated[bool, Option("--write", help="Also bring README, pictures and notebooks up to date.")] = False,
) -> None:
    """Judge all claims anew from their stored values; ends with code 1 if anything does not fit."""
    if diff is not None:
        console.print("\n".join(stale.diff(diff)) or f"no claim or verdict changed since {diff}", markup=False)
        return
    systems, results = chosen(None), results_root() if built else committed_results()
    problems = check(systems, results=results) + check(systems, "study", results)
    unknown = sorted({row["system"] for row in joined(results)} - set(systems)) if not problems else []
    problems += [f"{system}: claims without a chapter" for system in unknown]
    if write and not problems:
        for system in systems:
            chapter.redraw(system, RENDER)
        site.refresh()
    if not built and not problems:
        problems += chapter.misfits(systems, RENDER) + benches.problems()
    if problems:
        console.print(*(f"[red]claims:[/red] {escape(line)}" for line in problems), sep="\n")
        raise typer.Exit(1)
    table = Table("claim", "ours", "strongest rival", "as stated", title="Claims (profile book)")
    for row in joined(results):
        claim, entry = row["claim"], row["entry"]
        table.add_row(claim.id, format_measured(entry["measured"]), entry["verdict"], stated_verdict(claim, entry))
    console.print(table)


@app.command("stale")
def stale_chapters(
    systems: Chapters = None,
    ignore: Annotated[list[str] | None, Option(help="May differ: notebook, parameters, lock or python.")] = None,
) -> None:
    """Name the chapters whose committed result no longer fits their sources; ends with code 1 if there are any.

    Stale studies are named, without failing.
    """
    names, found = chosen(systems), []
    for profile, told in (("book", "changed since its run"), ("study", "study is older than")):
        for system, parts in chapter.stale(names, profile).items():
            if left := sorted(set(parts) - set(ignore or [])):
                found.append((profile, system))
                console.print(f"{system}: {told}: {', '.join(left)}")
    if not found:
        console.print("every committed result fits its sources")
    raise typer.Exit(int(any(profile == "book" for profile, _ in found)))


@app.command()
def data(
    action: Annotated[str, Argument(help="`list` or `fetch`.")] = "list",
    name: Annotated[str | None, Argument(help="The data set to fetch.")] = None,
) -> None:
    """List the data sets that chapters use and where they come from, or fetch one."""
    if action == "fetch" and name:
        console.print(f"{name}: {sets.fetch(name)}")
    elif action == "list" and name is None:
        table = Table("data set", "here")
        for known in sets.NAMES:
            table.add_row(known, "yes" if sets.available(known) else "no")
        console.print(table)
    else:
        fail(f"use `effnb data list` or `effnb data fetch NAME`, got {action!r} {name or ''}")


@app.command("site")
def build_site() -> None:
    """Build the site from the committed outputs into _build/html; any warning is an error."""
    raise typer.Exit(site.build(root() / "notebooks", committed_results(), root() / "_build" / "html"))


@app.command()
def bench(
    systems: Chapters = None,
    parameter: Parameter = None,
    quick: Annotated[bool, Option("--quick", help="A few seconds each: that they run, not how fast.")] = False,
) -> None:
    """Time the methods against what a user would otherwise pick, into book/results/bench/."""
    values = parse_parameters(parameter or [])
    records = benches.run_all(chosen(systems) if systems else [], quick=quick, further=values)
    if not quick and not values:
        site.refresh()
    raise typer.Exit(int(any("error" in record for record in records)))


@app.command()
def new(
    name: Annotated[str, Argument(help="The system's name in lower case with underscores.")],
    part: Annotated[str, Option(help="The package of its part: solvers, compress, sparse, nas, optim, ...")],
    number: Annotated[int, Option(min=1, max=99, help="The chapter's number in the book.")],
    title: Annotated[str | None, Option(help="Short title; default from the name.")] = None,
    folder: Annotated[bool, Option("--folder", help="Make the module a folder instead of a file.")] = False,
) -> None:
    """Make all of a chapter from the skeleton: notebook, module, test, claims, benchmark, profiles and pages."""
    for path in skeleton.create(name, part, number, title, folder):
        console.print(str(path.relative_to(root())))
    console.print(f"Next: write the claims, register them with a commit, then `effnb run {name}`.", soft_wrap=True)


if __name__ == "__main__":
    app()
