"""What the solvers refuse, and the random problem they are measured on."""

import math

import pytest
import torch

from effnb.solvers import (
    ALISTA,
    LISTA,
    LISTACPSS,
    HyperLISTA,
    SingleSolver,
    SparseProblem,
    analytic_weights,
    fista,
    image_patches,
    ista,
    mutual_coherence,
    nmse_db,
    normalize_columns,
    omp,
    overcomplete_dct,
    psnr_db,
    recovery_score,
    soft_threshold,
    support_least_squares,
    support_select,
    train_layerwise,
    tune_hyperlista,
)

A = SparseProblem(10, 20).A
X, B = SparseProblem(10, 20).sample(4)
NETS = [LISTA, LISTACPSS, ALISTA, HyperLISTA]


def replaced(A, value):
    out = A.clone()
    out[0, 0] = value
    return out


CASES = [
    (lambda: soft_threshold(X, -0.1), "theta must be finite and >= 0, got -0.1"),
    (lambda: soft_threshold(X, math.nan), "theta must be finite"),
    (lambda: support_select(X, 0.1, -1), "p must be finite and >= 0"),
    (lambda: support_select(X, 0.1, 21), "p must be at most 20"),
    (lambda: support_select(X, 0.1, 1.5, mode="quantile"), "p must be at most 1"),
    (lambda: support_select(X, 0.1, 1, mode="top"), "mode must be one of"),
    (lambda: ista(A, B, -1.0), "lam must be finite and >= 0"),
    (lambda: fista(A, B, 0.1, restart="speed"), "restart must be one of"),
    (lambda: fista(A, B, 0.1, continuation=1.0), "continuation must be finite, > 0 and < 1, got 1.0"),
    (lambda: fista(A, B, 0.1, gram=torch.eye(3)), r"gram must have shape \(20, 20\)"),
    (lambda: fista(A, X, 0.1), r"b must have shape \(batch, 10\), got \(4, 20\)"),
    (lambda: fista(A, B[0], 0.1), "b must have shape"),
    (lambda: ista(torch.zeros(3, 4), torch.ones(1, 3), 0.1), "A must not be zero"),
    (lambda: omp(A, B, 11), "k must be from 0 to 10"),
    (lambda: support_least_squares(A, B, X), "support must be boolean"),
    (lambda: analytic_weights(A[0]), "2-D"),
    (lambda: analytic_weights(2 * A), "columns of length 1"),
    (lambda: analytic_weights(A.T / A.T.norm(dim=0)), "at least as many columns as rows"),
    (lambda: analytic_weights(torch.ones(2, 4) / 2**0.5), "condition number"),
    (lambda: analytic_weights(A, method="guess"), "method must be one of"),
    (lambda: analytic_weights(replaced(A, math.nan)), "A must be finite"),
    (lambda: analytic_weights(SparseProblem(4, 30).A, symmetric=True), r"m\(m\+1\)/2 = 10"),
    (lambda: mutual_coherence(A, A.T), "W must have the shape of A"),
    (lambda: normalize_columns(torch.zeros(3, 3)), "no zero column"),
    (lambda: HyperLISTA(A, (0.1, 0.2)), "c must hold 3 numbers, got 2"),
    (lambda: HyperLISTA(A, (0.1, -0.2, 1)), "c must be finite and >= 0"),
    (lambda: HyperLISTA(A, pinv_of="other"), "pinv_of must be one of"),
    (lambda: HyperLISTA(A, symmetric=False, pinv_of="transformed"), "symmetric analytic weights"),
    (lambda: HyperLISTA(A, cg_after=0), "cg_after must be >= 1"),
    (lambda: HyperLISTA(A, weights=A[:, :3]), "weights must have the shape"),
    (lambda: HyperLISTA(A, weights=2 * A), r"diag\(W\^T A\) = 1"),
    (lambda: ALISTA(A, weights=2 * A), r"diag\(W\^T A\) = 1"),
    (lambda: HyperLISTA(A, oracle=True)(B), "x_true must be given exactly if oracle"),
    (lambda: HyperLISTA(A)(B, x_true=X), "x_true must be given exactly if oracle"),
    (lambda: LISTA(A, lam=-1), "lam must be finite"),
    (lambda: LISTACPSS(A, select=(0.1, 1.2)), r"select\[1\] must be finite, >= 0 and <= 1, got 1.2"),
    (lambda: nmse_db(X, B), "x must have the shape of x_true"),
    (lambda: nmse_db(X, 0 * X), "x_true must not be zero"),
    (lambda: nmse_db(X, X, reduce="mean"), "reduce must be one of"),
    (lambda: recovery_score(X, X, "best"), "score must be one of"),
    (lambda: tune_hyperlista(A, X, B, "luck"), "method must be one of"),
    (lambda: tune_hyperlista(A, X[:2], B), "same batch"),
    (lambda: tune_hyperlista(A, X, B, bounds=((1, 0), (0, 1), (1, 2))), "bounds must be three"),
    (lambda: train_layerwise(ALISTA(A, 2), None, lr=0), "lr must be finite and > 0"),
    (lambda: SparseProblem(10, 20, p=1.2), "p must be a probability"),
    (lambda: SparseProblem(10, 20, p=(0.3, 0.1)), "p must be a probability"),
    (lambda: SparseProblem(10, 20, cond=0.5), "cond must be finite and >= 1"),
    (lambda: SparseProblem(10, 20, snr=math.nan), "snr must be"),
    (lambda: SparseProblem(10, 20, magnitude="big"), "magnitude must be one of"),
    (lambda: SparseProblem(10, 20, scale=0), "scale must be finite and > 0"),
    (lambda: SparseProblem(10, 20).sample(0), "batch must be >= 1"),
    (lambda: overcomplete_dct(8, 4), "atoms must be >= 8"),
    (lambda: image_patches(torch.ones(4, 4), 5), "patch must be from 1 to 4"),
    (lambda: psnr_db(torch.ones(2), torch.ones(3)), "shape of reference"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bad_input_is_named(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("Net", NETS)
def test_networks_refuse_bad_dictionaries_and_batches(Net):
    bad = {
        "2-D": A[0],
        "no zero column": A * (torch.arange(20) > 0),
        "normalize=True": 3 * A,
        "finite": replaced(A, math.inf),
    }
    for message, value in bad.items():
        with pytest.raises(ValueError, match=message):
            Net(value)
    net = Net(A, layers=3)
    for b, message in ((X, "b must have shape"), (replaced(B, math.nan), "b must be finite")):
        with pytest.raises(ValueError, match=message):
            net(b)
    with pytest.raises(ValueError, match="n_layers must be from 0 to 3, got 4"):
        net(B, n_layers=4)
    with pytest.raises(TypeError, match="floating-point"):
        Net(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="layers must be an integer"):
        Net(A, layers=2.0)


def test_single_solver_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="net must be a HyperLISTA"):
        SingleSolver(ALISTA(A))
    for options in ({"oracle": True}, {"cg_after": 2}):
        with pytest.raises(ValueError, match="neither oracle nor cg_after"):
            SingleSolver(HyperLISTA(A, **options))
    solve = SingleSolver(HyperLISTA(A, layers=3))
    for b, message in ((B.numpy(), "b must be finite with shape"), (B[0].numpy() * math.nan, "b must be finite")):
        with pytest.raises(ValueError, match=message):
            solve(b)
    with pytest.raises(ValueError, match="n_layers must be from 0 to 3"):
        solve(B[0].numpy(), n_layers=4)


def test_training_refuses_other_networks():
    with pytest.raises(TypeError, match="LISTA family"):
        train_layerwise(HyperLISTA(A), None)


# --- the problem --------------------------------------------------------------------------------------------------


def test_problem_draws_what_it_says():
    problem = SparseProblem(50, 100, p=0.1, seed=3)
    x, b = problem.sample(2000)
    assert torch.allclose(problem.A.norm(dim=0), torch.ones(100), atol=1e-6)
    assert (x != 0).double().mean() == pytest.approx(0.1, abs=0.003)
    assert x[x != 0].std() == pytest.approx(1, abs=0.02)
    assert torch.allclose(b, x @ problem.A.T)


@pytest.mark.parametrize("snr", [40.0, 20.0])
def test_noise_has_the_level_of_each_instance(snr):
    problem = SparseProblem(2000, 50, snr=snr, p=0.2)
    x, b = problem.sample(20)
    signal = x @ problem.A.T
    ratio = 20 * torch.log10(signal.std(1) / (b - signal).std(1))
    assert torch.allclose(ratio, torch.full((20,), snr), atol=0.5)


def test_streams_repeat_and_never_meet():
    first, second = SparseProblem(10, 20, seed=1), SparseProblem(10, 20, seed=1)
    assert torch.equal(first.A, second.A)
    train = first.sample(5)[0]
    assert torch.equal(train, second.sample(5)[0])
    assert not torch.equal(train, first.sample(5)[0])
    assert not torch.equal(train, second.sample(5, "test")[0])
    assert not torch.equal(first.A, SparseProblem(10, 20, seed=2).A)


def test_shifts_keep_the_matrix_and_the_draws():
    problem = SparseProblem(10, 20, seed=1)
    larger = problem.shifted(scale=5.0)
    assert torch.equal(larger.A, problem.A)
    assert torch.allclose(larger.sample(4)[0], 5 * problem.sample(4)[0])
    signs = problem.shifted(magnitude="sign").sample(50)[0]
    assert set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
    spread = problem.shifted(p=(0.0, 0.4)).sample(2000)[0]
    assert (spread != 0).double().mean() == pytest.approx(0.2, abs=0.01)


def test_condition_number_is_the_final_one():
    plain, hard = SparseProblem(50, 100), SparseProblem(50, 100, cond=30.0)
    assert hard.condition_number > 3 * plain.condition_number
    assert torch.allclose(hard.A.norm(dim=0), torch.ones(100), atol=1e-5)
    assert hard.condition_number == pytest.approx(float(torch.linalg.cond(hard.A.double())))


def test_error_in_decibels():
    x = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    assert nmse_db(0 * x, x) == 0
    assert nmse_db(x, x) == -math.inf
    wrong = x + torch.tensor([[0.1, 0.0], [0.0, 0.0]])
    assert nmse_db(wrong, x, "instance")[0] == pytest.approx(-20, abs=1e-4)
    assert nmse_db(wrong, x) == pytest.approx(10 * math.log10(0.01 / 101), abs=1e-3)


def test_patches_are_those_of_the_image_and_the_dictionary_spans():
    image = torch.rand(24, 16, generator=torch.Generator().manual_seed(0))
    expected = [image[i : i + 8, j : j + 8].flatten() for i in (0, 8, 16) for j in (0, 8)]
    assert torch.equal(image_patches(image, 8), torch.stack(expected))
    assert image_patches(image[:23], 8).shape == (4, 64)
    D = overcomplete_dct(8, 12)
    assert D.shape == (64, 144) and torch.linalg.matrix_rank(D) == 64
    assert torch.allclose(D.norm(dim=0), torch.ones(144), atol=1e-5)
