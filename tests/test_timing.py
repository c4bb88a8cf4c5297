"""Timing against a clock that the test owns, so that every figure is exact."""

import gc
import math

import pytest
import torch

from effnb.lab.judge.stats import order_statistic_interval
from effnb.lab.measure import timing
from effnb.lab.measure.timing import Ratio, geometric_mean, is_noisy, machine_info, measure, one_thread, paired_ratio


class Clock:
    """A clock that only the timed calls move."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A function that takes the given seconds, one after another and then over again."""
        count = 0

        def f():
            nonlocal count
            self.log.append(name)
            self.now += seconds[count % len(seconds)]
            count += 1

        return f


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return clock


def test_ratio_is_that_of_the_two_calls(clock):
    ratio = paired_ratio(clock.call("f", 0.06), clock.call("g", 0.02))
    assert (ratio.median, ratio.lo, ratio.hi) == pytest.approx((3, 3, 3))
    assert ratio.seconds == pytest.approx((0.06, 0.02))
    assert len(ratio.ratios) == 7
    assert not ratio.noisy


def test_blocks_are_interleaved_and_long_enough(clock):
    paired_ratio(clock.call("f", 0.1), clock.call("g", 0.02), pairs=9)
    blocks = "".join(clock.log)[-9 * (1 + 3) :]
    assert blocks == ("f" + "ggg" + "ggg" + "f") * 4 + "fggg"


def test_drift_cancels_because_of_the_interleaving(clock):
    """A machine that slows down steadily: each side is first in every other pair."""
    slower = iter(1.02**k for k in range(10_000))
    f, g = clock.call("f", 0.0), clock.call("g", 0.0)

    def drifting(call, seconds):
        def run():
            call()
            clock.now += seconds * next(slower)

        return run

    ratio = paired_ratio(drifting(f, 0.05), drifting(g, 0.05), pairs=15)
    assert ratio.lo <= 1 <= ratio.hi
    assert ratio.median == pytest.approx(1, abs=0.021)


def test_swapping_inverts_the_ratio_for_odd_counts(clock):
    noise = (0.05, 0.07, 0.06, 0.055, 0.065)
    a = paired_ratio(clock.call("f", *noise), clock.call("g", 0.05))
    ratios = [1 / r for r in a.ratios]
    b = order_statistic_interval(ratios)
    assert (b.estimate, b.lo, b.hi) == pytest.approx((1 / a.median, 1 / a.hi, 1 / a.lo))


def test_interval_of_seven_pairs_is_their_range(clock):
    ratio = paired_ratio(clock.call("f", *(0.05 + 0.001 * k for k in range(11))), clock.call("g", 0.05))
    assert (ratio.lo, ratio.hi) == (min(ratio.ratios), max(ratio.ratios))


def test_noise_is_flagged_by_spread_and_by_load(clock, monkeypatch):
    assert paired_ratio(clock.call("f", 0.05, 0.1, 0.2), clock.call("g", 0.05)).noisy
    assert not is_noisy([1.0, 1.01, 0.99])
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    assert is_noisy([1.0, 1.0, 1.0])


def test_measure_is_the_median_of_the_blocks(clock):
    """Three calls to warm up, one to calibrate, then one block each of 1, 1, 1, 5, 9 s."""
    f = clock.call("f", 7.0, 7.0, 7.0, 1.0, 1.0, 9.0, 1.0, 5.0, 1.0)
    assert measure(f, min_block=0.5, blocks=5) == 1.0
    assert len(clock.log) == 3 + 1 + 5


def test_blocks_are_filled_with_calls(clock, monkeypatch):
    blocks = []
    real = timing._block
    monkeypatch.setattr(timing, "_block", lambda f, loops: blocks.append(real(f, loops)) or blocks[-1])
    assert measure(clock.call("f", 0.003), min_block=0.1, blocks=3) == pytest.approx(0.003)
    assert min(blocks[-3:]) >= 0.1
    assert max(blocks[-3:]) < 0.13


def test_a_clock_that_stands_still_is_refused(clock):
    with pytest.raises(ValueError, match=r"min_block: a block of 1 calls took 0.0 s"):
        paired_ratio(clock.call("f", 0.0), clock.call("g", 1.0))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f: paired_ratio(f, f, pairs=6), "pairs must be >= 7 for an interval of the median, got 6"),
        (lambda f: paired_ratio(f, f, min_block=0.0), "min_block must be positive and finite, got 0.0"),
        (lambda f: measure(f, min_block=math.nan), "min_block must be positive and finite, got nan"),
        (lambda f: measure(f, blocks=0), "blocks must be >= 1, got 0"),
        (lambda f: geometric_mean([]), "ratios must be positive"),
        (lambda f: geometric_mean([1.0, 0.0]), "ratios must be positive"),
        (lambda f: geometric_mean([1.0, math.inf]), "ratios must be positive"),
        (lambda f: timing.roofline_probe(size=0), "size, megabytes and blocks must be >= 1"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(lambda: None)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_and_garbage_collection_are_restored(fails):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def f():
        seen.append((torch.get_num_threads(), gc.isenabled()))
        if fails:
            raise RuntimeError

    try:
        if fails:
            with pytest.raises(RuntimeError):
                measure(f, min_block=1e-4)
        else:
            paired_ratio(f, f, min_block=1e-4)
        assert set(seen) == {(1, False)}
        assert torch.get_num_threads() == 2
        assert gc.isenabled()
    finally:
        torch.set_num_threads(threads)


def test_other_libraries_run_on_one_thread_too():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
    with one_thread():
        assert {pool["num_threads"] for pool in threadpoolctl.threadpool_info()} <= {1}
    assert [pool["num_threads"] for pool in threadpoolctl.threadpool_info()] == before


def test_geometric_mean_inverts_under_swapping():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(1 / geometric_mean([0.5, 0.125]))


def test_machine_info_is_plain_data():
    info = machine_info()
    assert info["cpu"] and info["cores"] >= 1 and info["ram_gb"] > 0
    assert info["threads"] == torch.get_num_threads()


def test_roofline_counts_flops_and_both_directions_of_a_copy(clock, monkeypatch):
    monkeypatch.setattr(timing, "_best", lambda f, blocks: 0.5)
    probe = timing.roofline_probe(size=1000, megabytes=100, blocks=1)
    assert probe == pytest.approx({"gflops": 4.0, "gb_s": 0.4})


def test_roofline_matches_its_definition_on_this_machine():
    probe = timing.roofline_probe(size=256, megabytes=8, blocks=3)
    assert 0.1 < probe["gflops"] < 1e5
    assert 0.1 < probe["gb_s"] < 1e4


def test_ratio_prints():
    assert str(Ratio(2.0, 1.0, 3.0, (2.0,), True)) == "2.00x [1.00, 3.00] (noisy)"
