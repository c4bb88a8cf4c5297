"""Frank-Wolfe and what a chain can and cannot do: T3, T5, T6 and experiment A in miniature."""

import math

import pytest
import torch
from torch import nn

from effnb.finetune import ChainOfLoRA, fit_chain, frank_wolfe_low_rank, greedy_rank_one, linear_decay


def target(rows=9, columns=7, seed=0):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("line_search", [None, "quadratic", lambda D, V, g: 2 / 3])
@pytest.mark.parametrize("radius", [0.3, 1.0, 3.0])
def test_frank_wolfe_bounds(line_search, radius):
    """T5: primal gap <= 2 L diam^2 / (k + 2), dual gap above the primal gap, rank <= k, inside the ball."""
    star = target()
    nuclear = torch.linalg.svdvals(star).sum().item()
    tau, f = radius * nuclear, lambda D: 0.5 * (D - star).square().sum().item()
    result = frank_wolfe_low_rank(lambda D: D - star, star.shape, tau, 40, line_search)
    best = f(project(star, tau))
    for k, D in enumerate(result.iterates):
        gap = f(D) - best
        assert gap >= -1e-10 and int(torch.linalg.matrix_rank(D, rtol=1e-10)) <= k
        assert torch.linalg.svdvals(D).sum() <= tau * (1 + 1e-12)
        if k and line_search in (None, "quadratic"):
            assert gap <= 2 * (2 * tau) ** 2 / (k + 2)
        if k < 40:
            assert result.gaps[k] >= gap - 1e-10
    assert torch.equal(result.D, result.iterates[-1]) and len(result.step_sizes) == 40


def project(matrix, tau):
    """The nearest matrix of the nuclear-norm ball: singular values onto the simplex."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    if S.sum() <= tau:
        return matrix
    excess = (S.cumsum(0) - tau) / torch.arange(1, len(S) + 1)
    shift = excess[excess < S][-1]
    return U @ torch.diag((S - shift).clamp(min=0)) @ Vh


def test_frank_wolfe_steps():
    result = frank_wolfe_low_rank(lambda D: D - target(), (9, 7), 2.0, 4)
    assert result.step_sizes == [1.0, 2 / 3, 0.5, 0.4]
    assert torch.equal(result.iterates[0], torch.zeros(9, 7, dtype=torch.float64))
    U, _, Vh = torch.linalg.svd(target())
    torch.testing.assert_close(result.iterates[1], 2.0 * torch.outer(U[:, 0], Vh[0]), rtol=1e-10, atol=1e-10)


def test_exact_line_search_never_rises_and_beats_a_grid():
    star = target()
    curvature = torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1

    def f(D):
        return 0.5 * (curvature * (D - star).square()).sum()

    result = frank_wolfe_low_rank(lambda D: curvature * (D - star), (9, 7), 6.0, 12, "quadratic")
    for k, gamma in enumerate(result.step_sizes):
        D, gradient = result.iterates[k], curvature * (result.iterates[k] - star)
        U, _, Vh = torch.linalg.svd(gradient)
        V = -6.0 * torch.outer(U[:, 0], Vh[0])
        others = [f((1 - g) * D + g * V) for g in torch.linspace(0, 1, 101)]
        assert f((1 - gamma) * D + gamma * V) <= min(others) + 1e-12


@pytest.mark.parametrize(
    "bad", [((0, 3), 1.0, 3), ((2, 3), 0.0, 3), ((2, 3), math.inf, 3), ((2, 3), 1.0, 0), ((2,), 1, 1)]
)
def test_frank_wolfe_bad_arguments(bad):
    with pytest.raises(ValueError, match="shape, steps and tau"):
        frank_wolfe_low_rank(lambda D: D, *bad)


def test_frank_wolfe_bad_functions():
    with pytest.raises(ValueError, match="line_search must be"):
        frank_wolfe_low_rank(lambda D: D, (2, 2), 1.0, 1, "armijo")
    with pytest.raises(ValueError, match=r"step in \[0, 1\]"):
        frank_wolfe_low_rank(lambda D: D + 1, (2, 2), 1.0, 1, lambda *_: 2.0)
    for gradient in (torch.ones(3, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="grad_fn must return a finite"):
            frank_wolfe_low_rank(lambda D, g=gradient: g, (2, 2), 1.0, 1)


def test_greedy_fitting_is_the_truncated_decomposition():
    star = target()
    U, S, Vh = torch.linalg.svd(star, full_matrices=False)
    for k, D in enumerate(greedy_rank_one(star, 7)):
        torch.testing.assert_close(D, U[:, :k] @ torch.diag(S[:k]) @ Vh[:k], rtol=1e-9, atol=1e-10)
        error = (star - D).square().sum()
        torch.testing.assert_close(error, S[k:].square().sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [(torch.zeros(3), 1), (torch.full((2, 2), math.nan), 1), (torch.zeros(2, 2), 0)])
def test_greedy_bad_arguments(bad):
    with pytest.raises(ValueError, match="target must be a finite matrix"):
        greedy_rank_one(*bad)


def stuck(generator=None, links=1, **options):
    """Error of a 1-row problem whose gradient's row space is orthogonal to A's rows at the first link."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    chain = ChainOfLoRA(model, ["0"], (1,) * links, generator=generator, **options)
    if generator is None:
        with torch.no_grad():
            model[0].A.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    x = torch.zeros(1, 4).double()
    x[0, 3] = 1

    def loss(model, step):
        return (model(x) - 1).square().sum()

    history = fit_chain(chain, loss, 20 * links, lambda p: torch.optim.SGD(p, lr=0.1), tie=generator is not None)
    return history, chain


def test_the_counter_example():
    """T6: from B = 0 with A's rows orthogonal to the gradient's row space, LoRA does not move at all."""
    (losses,), chain = stuck()
    assert set(losses) == {3.0} and chain.accumulated_rank("0") == 0


@pytest.mark.filterwarnings("ignore:link . has not trained")  # some seeds arrive early
def test_random_factors_make_progress_in_expectation():
    """T6: with a new random A in every link, one factor trained (RAC-LoRA), the error falls link by link."""
    runs = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        history, _ = stuck(generator, links=8, train_A=False, init="gaussian")
        runs.append([losses[0] for losses in history] + [history[-1][-1]])
    means = torch.tensor(runs).mean(0)
    assert (means.diff() < 0).all() and means[-1] < 0.1 * means[0]


def recover(ranks, seed=0, size=16, steps=400):
    """Experiment A in small: fit a random rank-8 matrix from samples."""
    g = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(size, size, generator=g))
    V, _ = torch.linalg.qr(torch.randn(size, size, generator=g))
    values = torch.linspace(2, 1, 8)
    star = U[:, :8] @ torch.diag(values) @ V[:, :8].T
    x = torch.randn(256, size, generator=g)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    nn.init.zeros_(model[0].weight)
    chain = ChainOfLoRA(model, ["0"], ranks, generator=g)
    fit_chain(
        chain,
        lambda m, _: (m(x) - x @ star.T).square().sum(1).mean(),
        steps,
        lambda p: torch.optim.Adam(p, 0.05),
        lambda o, n: linear_decay(o, n, 0.05),
    )
    return (chain.unload()[0].weight - star).square().sum().item(), values.square(), chain.accumulated_rank("0")


def test_the_chain_reaches_a_rank_that_one_link_cannot():
    """T3: the update has rank r at one link and the sum of the ranks in a chain; so do the errors."""
    one, squares, rank_one = recover((2,))
    four, _, rank_four = recover((2,) * 4)
    assert (rank_one, rank_four) == (2, 8)
    assert squares[2:].sum() * (1 - 1e-6) <= one <= squares[2:].sum() * 1.05
    assert four < 0.35 * one
