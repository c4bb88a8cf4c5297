"""A live progress display for chapters: one bar each, one for all with the time that remains."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from effnb.lab.run import chapter as runner


def run_with_progress(
    systems: Sequence[str],
    profile: str,
    parameters: Mapping,
    jobs: int,
    console: Console,
    timeout: float | None = None,
) -> list[runner.RunRecord]:
    """:func:`effnb.lab.run.chapter.execute_all` with bars on ``console``; a line a chapter where it is no terminal.

    The overall bar counts seconds of the committed runs, so that its remaining time is a fair guess.

    Args:
        systems: the chapters.
        profile: as in ``execute_all``, as are ``parameters``, ``jobs`` and ``timeout``.
        console: where to draw.

    Raises:
        ValueError: as in ``execute_all``.
    """
    columns = (TextColumn("{task.description:>28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        weight = {system: runner.expected_seconds(system) for system in systems}
        whole = bars.add_task("all chapters", total=sum(weight.values()))
        tasks = {system: bars.add_task(system, total=None, start=False) for system in systems}
        done: dict[str, float] = dict.fromkeys(systems, 0.0)

        def on_progress(system: str, begun: int, cells: int) -> None:
            if not bars.tasks[tasks[system]].started:
                bars.start_task(tasks[system])
            bars.update(tasks[system], completed=begun, total=cells)
            done[system] = (begun - 1) / cells
            bars.update(whole, completed=sum(weight[s] * done[s] for s in systems))

        def on_done(record: runner.RunRecord) -> None:
            done[record.system] = 1.0
            bars.update(tasks[record.system], total=1, completed=1)
            bars.update(whole, completed=sum(weight[s] * done[s] for s in systems))
            if not console.is_terminal:
                console.print(f"{record.system}: {record.status} after {record.seconds:.1f} s", highlight=False)

        return runner.execute_all(systems, profile, parameters, jobs, on_progress, on_done, timeout=timeout)
