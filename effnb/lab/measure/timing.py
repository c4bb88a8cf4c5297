"""Timing on a noisy machine: interleaved paired blocks, one thread, an interval of the median ratio.

Only ratios of interleaved blocks are evidence; absolute seconds are informative.
"""

import gc
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.stats import quantile_test

Call = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """``seconds(f) / seconds(g)``: median over pairs with the order-statistic interval ``lo``..``hi``.

    ``noisy`` tells that the ratios' interquartile range exceeds a fifth of their median, or that the machine was
    overloaded. ``seconds`` holds the median seconds a call of ``f`` and of ``g``, which are informative only.

    >>> print(Ratio(2.0, 1.9, 2.1, (1.9, 2.0, 2.1), False))
    2.00x [1.90, 2.10]
    """

    median: float
    lo: float
    hi: float
    ratios: tuple[float, ...]
    noisy: bool
    seconds: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.lo:.2f}, {self.hi:.2f}]" + " (noisy)" * self.noisy


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, BLAS and OpenMP and no garbage collection inside; all restored on the way out.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    from threadpoolctl import threadpool_limits

    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def measure(f: Call, min_block: float = 0.05, blocks: int = 7) -> float:
    """Median seconds of one call of ``f`` on one thread, over ``blocks`` of at least ``min_block`` seconds.

    ``f`` is called at least 3 times before the clock starts; the number of calls in a block is then chosen once.

    Raises:
        ValueError: ``min_block`` or ``blocks`` out of range, or a block takes 0 s by the clock.

    >>> measure(lambda: sum(range(1000)), min_block=0.001) > 0
    True
    """
    if blocks < 1:
        raise ValueError(f"blocks must be >= 1, got {blocks}")
    with one_thread():
        loops = _calibrate(f, min_block)
        return statistics.median(_block(f, loops) for _ in range(blocks)) / loops


def paired_ratio(f: Call, g: Call, pairs: int = 7, min_block: float = 0.05) -> Ratio:
    """Median of ``seconds(f) / seconds(g)`` over interleaved blocks: ``paired_ratio(peer, ours)`` is our speed-up.

    Blocks run f g g f f g ..., so that drift of the machine falls on both alike. Everything on one thread. The
    interval is distribution-free and covers at least 95 %.

    Args:
        f: the numerator, takes no argument.
        g: the denominator, takes no argument.
        pairs: pairs of blocks, >= 7; odd counts make the ratio invert exactly when ``f`` and ``g`` are swapped.
        min_block: seconds of a block, > 0.

    Raises:
        ValueError: fewer than 7 ``pairs``, ``min_block`` out of range, or a block takes 0 s by the clock.

    Reference: david2003order.

    >>> ratio = paired_ratio(lambda: sum(range(9000)), lambda: sum(range(100)), min_block=0.001)
    >>> ratio.lo > 5
    True
    """
    if pairs < 7:
        raise ValueError(f"pairs must be >= 7 for an interval of the median, got {pairs}")
    with one_thread():
        sides = [(call, _calibrate(call, min_block)) for call in (f, g)]
        rows = []
        for pair in range(pairs):
            turn = 1 if pair % 2 == 0 else -1
            rows.append([_block(call, loops) / loops for call, loops in sides[::turn]][::turn])
    first, second = zip(*rows, strict=True)
    ratios = tuple(a / b for a, b in rows)
    low, high = map(float, quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95))
    seconds = (statistics.median(first), statistics.median(second))
    return Ratio(statistics.median(ratios), low, high, ratios, is_noisy(ratios), seconds)


def is_noisy(values: Iterable[float]) -> bool:
    """Whether the interquartile range of positive ``values`` exceeds .2 of their median, or the load the cores.

    >>> is_noisy([1.0, 2.0, 3.0, 4.0])
    True
    """
    low, middle, high = np.quantile(list(values), [0.25, 0.5, 0.75])
    return bool((high - low) / middle > 0.2 or os.getloadavg()[0] > _cores())


def geometric_mean(ratios: Iterable[float]) -> float:
    """The mean that fits ratios, positive and finite: swapping numerators and denominators inverts it.

    >>> geometric_mean([2.0, 8.0])
    4.0
    """
    values = list(ratios)
    if not values or not all(0 < v < math.inf for v in values):
        raise ValueError(f"ratios must be positive and finite, at least one, got {values}")
    return statistics.geometric_mean(values)


def machine_info() -> dict[str, Any]:
    """The hardware: processor, cores that this process may use, torch's threads now, memory, accelerator.

    >>> sorted(machine_info())
    ['cores', 'cpu', 'gpu', 'ram_gb', 'threads']
    """
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    cpu = named[1] if named else platform.processor() or platform.machine()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": _cores(), "threads": torch.get_num_threads(), "ram_gb": round(ram, 1), "gpu": gpu}


def roofline_probe(size: int = 1024, megabytes: int = 128, blocks: int = 5) -> dict[str, float]:
    """What the machine can do at the current thread count: float32 matmul GFLOP/s and copy GB/s, best of ``blocks``.

    Args:
        size: side of the two square matrices, ``2 size**3`` FLOP.
        megabytes: bytes copied; read and write both count. Choose it well above the last-level cache.
        blocks: attempts; a ValueError unless all three are >= 1.

    Reference: williams2009roofline.

    >>> probe = roofline_probe(size=64, megabytes=1, blocks=1)
    >>> probe["gflops"] > 0 and probe["gb_s"] > 0
    True
    """
    if min(size, megabytes, blocks) < 1:
        raise ValueError(f"size, megabytes and blocks must be >= 1, got {size}, {megabytes}, {blocks}")
    a, out = torch.ones(size, size), torch.empty(size, size)
    source = torch.ones(megabytes * 10**6 // 4)
    target = torch.zeros_like(source)
    matmul, copy = (_best(f, blocks) for f in (lambda: torch.mm(a, a, out=out), lambda: target.copy_(source)))
    return {"gflops": 2e-9 * size**3 / matmul, "gb_s": 2e-3 * megabytes / copy}


def _best(f: Call, blocks: int) -> float:
    loops = _calibrate(f, 0.01)
    return min(_block(f, loops) for _ in range(blocks)) / loops


def _block(f: Call, loops: int) -> float:
    start = perf_counter()
    for _ in repeat(None, loops):
        f()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    seconds = perf_counter() - start
    if seconds <= 0:
        raise ValueError(f"min_block: a block of {loops} calls took {seconds} s by the clock")
    return seconds


def _calibrate(f: Call, min_block: float) -> int:
    """Warm up with 3 calls, then find how many calls fill ``min_block`` seconds."""
    if not 0 < min_block < math.inf:
        raise ValueError(f"min_block must be positive and finite, got {min_block}")
    for _ in range(3):
        f()
    loops = 1
    while (seconds := _block(f, loops)) < min_block:
        loops = max(loops + 1, min(10 * loops, math.ceil(1.2 * loops * min_block / seconds)))
    return loops


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
