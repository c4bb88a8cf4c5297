"""The sweep's statistics on grids with known answers, and the counter-example against its closed form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.optim import SweepResult, clipped_chains, lr_eps_sweep

LRS, EPSS = (0.01, 0.1, 1.0, 10.0), (0.01, 0.1, 1.0)


def columns(lr, eps, seed):
    """The best learning rate is 0.1 whatever eps is."""
    return 90.0 - 10 * abs(np.log10(lr) + 1) + 0.1 * seed


def diagonal(lr, eps, seed):
    """The best learning rate is ten times eps."""
    return 90.0 - 10 * abs(np.log10(lr / eps) - 1)


def test_sweep_calls_every_cell_once_with_every_seed():
    calls = []

    def fn(lr, eps, seed):
        calls.append((eps, lr, seed))
        return len(calls)

    result = lr_eps_sweep(fn, LRS, EPSS, (3, 4))
    assert len(calls) == len(set(calls)) == 4 * 3 * 2
    assert result.scores.shape == (3, 4, 2) and result.scores[1, 2, 1] == calls.index((0.1, 1.0, 4)) + 1
    np.testing.assert_allclose(result.table, result.scores.mean(-1))
    np.testing.assert_allclose(result.for_seed(1).table, result.scores[:, :, 1])


def test_columns_do_not_drift_and_diagonals_do():
    flat, steep = (lr_eps_sweep(fn, LRS, EPSS, (0, 1)) for fn in (columns, diagonal))
    np.testing.assert_allclose(flat.best_lr_per_eps(), [0.1] * 3)
    assert flat.drift() == pytest.approx(0) and flat.slope() == pytest.approx(0)
    np.testing.assert_allclose(steep.best_lr_per_eps(), [0.1, 1.0, 10.0])
    assert steep.drift() == pytest.approx(2) and steep.slope() == pytest.approx(1)
    assert steep.drift((0.1, 1.0)) == pytest.approx(1)


def test_ties_within_the_tolerance_share_the_log_mean():
    scores = np.array([[80.0, 80.4, 80.1, 10.0], [79.0, 80.0, 70.0, 10.0], [1.0, 2.0, 3.0, 4.0]])[:, :, None]
    grid = SweepResult(LRS, EPSS, (0,), scores)
    np.testing.assert_allclose(grid.best_lr_per_eps(), [0.1, 0.1, 10.0])
    np.testing.assert_allclose(grid.best_lr_per_eps(0), [0.1, 0.1, 10.0])
    np.testing.assert_allclose(grid.best_lr_per_eps(1.0)[1:], [10**-1.5, 10**0.5])


@given(noise=st.lists(st.floats(-0.24, 0.24), min_size=12, max_size=12))
@settings(max_examples=50, deadline=None)
def test_noise_below_half_the_tolerance_on_a_plateau_gives_no_drift(noise):
    grid = SweepResult(LRS, EPSS, (0,), 80 + np.array(noise).reshape(3, 4, 1))
    assert grid.drift() == pytest.approx(0, abs=1e-12)


def test_failed_runs_never_count_as_best():
    scores = np.full((3, 4, 2), 50.0)
    scores[:, 2, 0] = 99.0
    scores[:, 2, 1] = np.nan
    grid = SweepResult(LRS, EPSS, (0, 1), scores)
    assert np.isnan(grid.table[:, 2]).all()
    np.testing.assert_allclose(grid.best_lr_per_eps(), [10 ** np.mean([-2, -1, 1])] * 3)
    with pytest.raises(ValueError, match="every eps needs a learning rate"):
        SweepResult(LRS, EPSS, (0,), np.full((3, 4, 1), np.nan))


def test_searches_by_axis_and_transfer():
    flat, steep = (lr_eps_sweep(fn, LRS, EPSS, (0,)) for fn in (columns, diagonal))
    found = flat.axis_search(0.1)
    assert (found.lr, found.regret, found.runs, found.grid_runs) == (0.1, 0.0, 4 + 3 - 1, 12)
    np.testing.assert_allclose(flat.transfer_regret(0.1), 0)
    np.testing.assert_allclose(steep.transfer_regret(0.1), [10, 0, 10])
    with pytest.raises(ValueError, match="eps must be one of"):
        flat.axis_search(0.5)


def test_axis_search_reports_its_regret():
    scores = np.array([[1.0, 2.0, 9.0, 0.0], [1.0, 5.0, 2.0, 0.0], [1.0, 6.0, 3.0, 0.0]])[:, :, None]
    found = SweepResult(LRS, EPSS, (0,), scores).axis_search(0.1)
    assert (found.lr, found.eps, found.score, found.regret) == (0.1, 1.0, 6.0, 3.0)


def test_plot_draws_the_table():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    grid = lr_eps_sweep(columns, LRS, EPSS, (0,))
    figure, axes = plt.subplots()
    image = grid.plot(axes, cmap="viridis")
    np.testing.assert_allclose(image.get_array(), grid.table)
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [1, 1, 1])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.01", "0.1", "1"]
    plt.close(figure)
    grid.plot()
    plt.close("all")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (([], EPSS, (0,)), "lrs must not be empty"),
        ((LRS, EPSS, ()), "seeds must not be empty"),
        (((0.1, 0.01), EPSS, (0,)), "lrs must be > 0 and increasing"),
        ((LRS, (0.0, 1.0), (0,)), "epss must be > 0 and increasing"),
    ],
)
def test_bad_axes(axes, message):
    with pytest.raises(ValueError, match=message):
        lr_eps_sweep(columns, *axes)


def test_bad_grids():
    with pytest.raises(ValueError, match=r"scores must have shape \(epss, lrs, seeds\) = \(3, 4, 1\)"):
        SweepResult(LRS, EPSS, (0,), np.zeros((4, 3, 1)))
    with pytest.raises(ValueError, match="lrs and epss must be > 0"):
        SweepResult((0.0, 1.0), (1.0,), (0,), np.zeros((1, 2, 1)))
    grid = lr_eps_sweep(columns, LRS, EPSS, (0,))
    with pytest.raises(ValueError, match="tolerance must be finite and >= 0"):
        grid.best_lr_per_eps(-1)
    with pytest.raises(ValueError, match="eps_range must contain a value"):
        grid.drift((5.0, 6.0))
    with pytest.raises(ValueError, match="at least two values"):
        grid.slope((0.1, 0.1))


# ---------------------------------------------------------------- the counter-example


def test_adam_ends_at_the_boundary_and_delayed_adam_at_the_minimum():
    short = {"steps": 4000, "chains": 50}
    assert clipped_chains("adam", 0.0, **short).mean() > 0.99
    assert abs(clipped_chains("delayed_adam", 0.0, **short).mean() - 0.5) < 0.02
    assert abs(clipped_chains("sgd", 0.0, **short).mean() - 0.5) < 0.02


def test_one_chain_by_hand():
    """beta2 = 0 and no curvature drawn: Delayed Adam skips its first step, Adam takes a step of lr / sqrt(t)."""
    options = {"probability": 1e-12, "steps": 3, "chains": 4, "tail": 1 / 3, "seed": 5, "lr": 0.01}
    start = np.random.default_rng(5).random(4)
    steps = 0.01 / np.sqrt([1, 2, 3])
    adam = np.minimum(start + steps.sum(), 1)
    np.testing.assert_allclose(clipped_chains("adam", 0.0, **options), adam, rtol=1e-6)
    delayed = np.minimum(start + steps[1:].sum(), 1)
    np.testing.assert_allclose(clipped_chains("delayed_adam", 0.0, **options), delayed, rtol=1e-6)


def test_chains_depend_on_the_seed_alone():
    short = {"steps": 50, "chains": 3}
    a, b, c = (clipped_chains("adam", 0.9, seed=seed, **short) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize("method", ["adam", "delayed_adam", "sgd"])
def test_several_decay_rates_at_once_are_those_one_by_one(method):
    short = {"steps": 50, "chains": 3}
    together = clipped_chains(method, [0.0, 0.9], **short)
    np.testing.assert_array_equal(together, [clipped_chains(method, b, **short) for b in (0.0, 0.9)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sign"}, "method must be one of"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"beta2": [0.5, -0.1]}, r"beta2 must be in \[0, 1\)"),
        ({"probability": 0.0}, "probability must be finite, > 0 and < 1"),
        ({"tail": 0.0}, "tail must be finite, > 0 and <= 1"),
        ({"curvature": -1.0}, "curvature must be finite and > 0, got -1.0"),
        ({"eps": 0.0}, "eps must be finite and > 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
    ],
)
def test_bad_chains(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_chains(**{"method": "adam", "beta2": 0.9, **options})
