"""Jacobians against the loop and vmap, the solve against the official one, a request against fitting and retraining."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from effnb.lab.measure.timing import Ratio, paired_ratio
from effnb.models import SmallCNN, ViT
from effnb.unlearn import (
    NTKUnlearner,
    PromptedViT,
    finetune,
    ntk_delta,
    peft_parameters,
    per_sample_jacobian,
    solve_cost,
)

LAM = 1e-2


def widths(first: int) -> tuple[int, ...]:
    """Channels of the chapter's network."""
    return first, 2 * first, 4 * first, 4 * first


def network(first: int) -> nn.Module:
    """The chapter's network for 14 x 14 images in eval mode."""
    return SmallCNN(1, 10, widths(first), generator=torch.Generator().manual_seed(0)).eval()


def samples(n: int, side: int = 14) -> tuple[Tensor, Tensor]:
    """Random images and labels: only shapes matter here."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, side, side, generator=g), torch.randint(10, (n,), generator=g)


def official_loop(model: nn.Module, names: list[str], x: Tensor) -> np.ndarray:
    """The official notebook: batches of one, a call of autograd for each class, rows collected in NumPy."""
    known = dict(model.named_parameters())
    leaves, rows = [known[name] for name in names], []
    for i in range(len(x)):
        out = model(x[i : i + 1])
        for k in range(out.shape[1]):
            grads = torch.autograd.grad(out[0, k], leaves, retain_graph=True)
            rows.append(np.concatenate([g.view(-1).numpy() for g in grads]))
    return np.stack(rows)


def official_solve(jac: np.ndarray, r: np.ndarray, n: int) -> np.ndarray:
    """The official notebook: the ``NK x NK`` kernel, inverted, in the Jacobian's own precision."""
    theta = jac @ jac.T + n * LAM * np.eye(len(jac), dtype=jac.dtype)
    return -jac.T @ (np.linalg.inv(theta) @ r)


def row(name: str, peer: str, ratio: Ratio | float, target: float | None, detail: str, better: str = "higher") -> dict:
    """One line of the performance page."""
    fields = {"name": name, "ours": "effnb", "peer": peer, "ratio": ratio, "target": target}
    return fields | {"better": better, "unit": "x", "detail": detail}


def timed(peer: Callable, ours: Callable, quick: bool) -> Ratio:
    """Seconds of the peer over ours."""
    return paired_ratio(peer, ours, min_block=0.01 if quick else 0.05)


def jacobian_rows(first: int, n: int, quick: bool) -> list[dict]:
    """Batch-norm affine parameters and head, by three routes."""
    model, (x, _) = network(first), samples(n)
    names = peft_parameters(model, "bn+head")
    fast, vmap = (lambda m=m: per_sample_jacobian(model, names, x, method=m) for m in ("norm_affine", "vmap"))
    name, detail = f"Jacobian, BN + head, width {first}", f"{n} images of 14 x 14, 10 outputs, all rows"
    slow = timed(lambda: official_loop(model, names, x), fast, quick)
    return [
        row(f"{name}, against the loop", "loop of autograd.grad", slow, 8.0, detail),
        row(f"{name}, against vmap", "vmap(jacrev)", timed(vmap, fast, quick), 1.0, detail),
    ]


def prompt_rows(n: int, quick: bool) -> list[dict]:
    """Prompts and head of a small vision transformer, where there is no fast path."""
    vit = ViT(28, 7, width=32, depth=2, mlp_ratio=2, generator=torch.Generator().manual_seed(0))
    model, (x, _) = PromptedViT(vit, 8, generator=torch.Generator().manual_seed(1)).eval(), samples(n, 28)
    names = peft_parameters(model, "prompt+head")
    ours = lambda: per_sample_jacobian(model, names, x)  # noqa: E731
    found = timed(lambda: official_loop(model, names, x), ours, quick)
    return [row("Jacobian, prompts + head of a ViT", "loop of autograd.grad", found, None, f"{n} images, by vmap")]


def solve_rows(n: int, quick: bool) -> list[dict]:
    """``w_lin(D_r) - w_lin(D)`` from given Jacobians: the smaller side against the official one."""
    g = torch.Generator().manual_seed(0)
    jac, r, cut = torch.randn(n, 10, 506, generator=g), torch.randn(n, 10, generator=g), n // 10
    args = (jac[cut:], r[cut:], jac[:cut], r[:cut], LAM)
    flat, res = jac.double().flatten(0, 1).numpy(), r.double().reshape(-1, 1).numpy()

    def official() -> np.ndarray:
        return official_solve(flat[cut * 10 :], res[cut * 10 :], n - cut) - official_solve(flat, res, n)

    primal, dual = (lambda f=f: ntk_delta(*args, f) for f in ("primal", "dual"))
    detail = f"N = {n}, K = 10, P = 506, both steps, float64"
    inverse = timed(official, primal, quick)
    return [
        row(f"solve, {n} images, against the inverse", "NK x NK inverse", inverse, 10.0, detail),
        row(f"solve, {n} images, against the dual", "NK x NK Cholesky", timed(dual, primal, quick), None, detail),
    ]


def request_rows(n: int, quick: bool) -> list[dict]:
    """A request of a tenth of the data against a fresh update and against retraining."""
    init, data = network(8), samples(n)
    model = copy.deepcopy(init)
    forget, retain = tuple(t[: n // 10] for t in data), tuple(t[n // 10 :] for t in data)
    options = {"weight_decay": LAM, "init_state": init}
    fitted = NTKUnlearner(model, **options).fit(data)
    request = lambda: fitted.forget(forget)  # noqa: E731
    fresh = lambda: NTKUnlearner(model, **options).forget(forget, retain)  # noqa: E731
    epochs = 5 if quick else 60
    anew = lambda: finetune(model, "bn+head", retain, epochs=epochs, **options)  # noqa: E731
    detail = f"{n} images, a tenth goes, BN + head, new model included"
    target = None if quick else 4.0
    return [
        row(f"request, {n} images", "update from all data", timed(fresh, request, quick), 5.0, detail),
        row(f"update, {n} images", f"retraining, {epochs} epochs", timed(anew, fresh, quick), target, detail),
    ]


def subset_rows(first: int, n: int, quick: bool) -> list[dict]:
    """All parameters against the subset: seconds of Jacobian and solve, and bytes that both must hold."""
    model, data = network(first), samples(n)
    forget, retain = tuple(t[: n // 10] for t in data), tuple(t[n // 10 :] for t in data)
    options = {"weight_decay": LAM, "init_state": model}
    small, full = (lambda s=s: NTKUnlearner(model, s, **options).delta(forget, retain) for s in ("bn+head", "all"))
    counts = [sum(model.get_parameter(k).numel() for k in peft_parameters(model, s)) for s in ("bn+head", "all")]
    costs = [solve_cost(n, 10, p, "primal" if p < 10 * n else "dual") for p in counts]
    name = f"BN + head against all parameters, width {first}, {n} images"
    detail = f"P = {counts[0]:,} against {counts[1]:,}"
    memory, solve = costs[1].jacobian_bytes / costs[0].jacobian_bytes, costs[1].macs / costs[0].macs
    return [
        row(f"{name}: time", "all parameters", timed(full, small, quick), 3.0, f"{detail}, Jacobian and solve"),
        row(
            f"{name}: Jacobian bytes",
            "all parameters",
            memory,
            20.0 if (first, n) == (8, 300) else None,
            f"{detail}, counted",
        ),
        row(
            f"{name}: solve",
            "all parameters",
            solve,
            100.0 if (first, n) == (8, 300) else None,
            f"{detail}, multiply-adds counted",
        ),
    ]


def limit_rows(gib: float = 24.0, n: int = 300) -> list[dict]:
    """Where the full kernel no longer fits: counted, in parameters of the network."""

    def bytes_of(p: int) -> int:
        cost = solve_cost(n, 10, p, "primal" if p < 10 * n else "dual")
        return 2 * cost.jacobian_bytes + cost.matrix_bytes

    first = 4
    while bytes_of(234 * first**2 + 71 * first + 10) < gib * 2**30:
        first += 1
    full, small = 234 * first**2 + 71 * first + 10, 62 * first + 10
    detail = f"width {first}, counted: all {full:,} fill {gib:g} GiB, the subset {bytes_of(small) / 2**30:.2f}"
    return [row(f"memory at {gib:g} GiB, {n} images", "all parameters", bytes_of(full) / bytes_of(small), None, detail)]


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` takes small sizes only."""
    if quick:
        rows = jacobian_rows(4, 20, True) + prompt_rows(10, True) + solve_rows(40, True)
        return rows + request_rows(60, True) + subset_rows(4, 20, True) + limit_rows()
    rows = jacobian_rows(8, 100, False) + jacobian_rows(16, 100, False) + prompt_rows(100, False)
    rows += solve_rows(200, False) + solve_rows(300, False)
    rows += request_rows(300, False) + request_rows(1000, False)
    rows += [line for n in (100, 200, 300) for line in subset_rows(8, n, False)]
    return rows + [line for first in (4, 12) for line in subset_rows(first, 100, False)] + limit_rows()


if __name__ == "__main__":
    for line in run(quick=True):
        print(line["name"], "|", line["peer"], "|", line["ratio"], "|", line["detail"])
