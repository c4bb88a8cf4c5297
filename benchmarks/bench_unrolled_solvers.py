"""HyperLISTA against the solvers that one would otherwise take, at equal accuracy, and against its own floor."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from effnb.lab.measure.timing import Ratio, paired_ratio
from effnb.solvers import HyperLISTA, SingleSolver, SparseProblem, analytic_weights, fista, nmse_db

FREE, SYMMETRIC = (0.069, 0.01594, 86.97), (0.0722, 0.01452, 117.9)  # tuned at 250 x 500, 10% nonzeros, 16 layers


def official_layers(A: Tensor, b: Tensor, c: tuple[float, float, float], layers: int) -> Callable[[], Tensor]:
    """The official PyTorch layer: three products and a quantile with one rank an instance (a batch x batch table)."""
    net = HyperLISTA(A, c, layers)
    P = torch.linalg.pinv(A).T.contiguous()
    start = (b @ P).abs().sum(1, keepdim=True)
    W, n = net.W, A.shape[1]

    def run() -> Tensor:
        x = x_old = b.new_zeros(len(b), n)
        for _ in range(layers):
            r = x @ A.T - b
            size = (r @ P).abs().sum(1, keepdim=True)
            theta, beta = c[0] * net.mu * size, c[1] * net.mu * (x != 0).sum(1, keepdim=True)
            fraction = (c[2] / n * torch.log(start / size)).clamp(0, 1)
            z = x - r @ W + beta * (x - x_old)
            tau = torch.quantile(z.abs(), 1 - fraction.squeeze(1), dim=1).diagonal().unsqueeze(1)
            passed = ((z.abs() >= tau) & (z.abs() >= theta)).float()
            x_old, x = x, passed * z + (1 - passed) * torch.sign(z) * torch.relu(z.abs() - theta)
        return x

    return run


def products_only(A: Tensor, b: Tensor, layers: int) -> Callable[[], None]:
    """The two matrix products of every layer and nothing else."""
    At, x, r = A.T.contiguous(), torch.zeros(len(b), A.shape[1]), torch.empty_like(b)

    def run() -> None:
        for _ in range(layers):
            torch.addmm(b, x, At, beta=-1, out=r)
            torch.mm(r, A, out=x)

    return run


def steps_to(solver: Callable, x: Tensor, target: float, limit: int) -> int | None:
    """Iterations after which ``solver(limit, callback)`` first meets ``target`` dB, or ``None``."""
    met: list[int] = []
    solver(limit, lambda k, estimate: float(nmse_db(estimate, x)) <= target and not met.append(k))
    return met[0] if met else None


def best_fista(A: Tensor, x: Tensor, b: Tensor, target: float, limit: int, **options) -> tuple[dict, int]:
    """Settings and number of steps of the quickest FISTA of a grid."""
    found = []
    for lam in (5e-3, 2e-3, 1e-3, 5e-4):
        for q in (0.98, 0.95, 0.9) if options else (None,):
            keys = {"lam": lam, "continuation": q, **options}
            count = steps_to(
                lambda k, stop, keys=keys: fista(A, b, max_iter=k, callback=stop, **keys), x, target, limit
            )
            if count is not None:
                found.append((count, lam, keys))
    count, _, keys = min(found, key=lambda entry: entry[:2])
    return keys, count


def scaled(ratio: Ratio, factor: float) -> Ratio:
    """The ratio of two functions that handle different numbers of instances, per instance."""
    times = {"median": ratio.median * factor, "lo": ratio.lo * factor, "hi": ratio.hi * factor}
    return dataclasses.replace(ratio, **times, ratios=tuple(v * factor for v in ratio.ratios))


def lasso_peers(A: Tensor, b: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor] | str]:
    """Solvers of other libraries on each instance of ``b``; a string names what is not installed."""
    from sklearn.linear_model import Lasso, orthogonal_mp_gram

    An, bn, m = A.double().numpy(), b.double().numpy(), A.shape[0]
    gram = An.T @ An
    alpha = 5e-3 / m  # scikit-learn divides the data term by the number of rows

    def scikit() -> Tensor:
        model = Lasso(alpha=alpha, fit_intercept=False, precompute=gram, tol=1e-6, max_iter=20000)
        return torch.stack([torch.as_tensor(model.fit(An, row).coef_) for row in bn])

    def pursuit() -> Tensor:
        atoms = int((x != 0).sum(1).max())
        return torch.stack([torch.as_tensor(orthogonal_mp_gram(gram, An.T @ row, n_nonzero_coefs=atoms)) for row in bn])

    peers: dict = {"scikit-learn Lasso": scikit, "scikit-learn OMP (exact)": pursuit}
    try:
        from celer import Lasso as Celer

        celer = Celer(alpha=alpha, fit_intercept=False, tol=1e-6)
        peers["celer Lasso"] = lambda: torch.stack([torch.as_tensor(celer.fit(An, row).coef_) for row in bn])
    except ImportError:
        peers["celer Lasso"] = "not installed (extra: bench)"
    try:
        from skglm import Lasso as Skglm

        skglm = Skglm(alpha=alpha, fit_intercept=False, tol=1e-6)
        peers["skglm Lasso"] = lambda: torch.stack([torch.as_tensor(skglm.fit(An, row).coef_) for row in bn])
    except ImportError:
        peers["skglm Lasso"] = "not installed (extra: bench)"
    return peers


def weight_rows(A: Tensor, block: float) -> list[dict]:
    """Closed forms against the official iterations; the peers run 20 steps and are scaled to 100,000."""
    A = A.double()
    eye = torch.eye(A.shape[1], dtype=A.dtype)

    def descent() -> None:
        G = torch.eye(A.shape[0], dtype=A.dtype)
        for _ in range(20):
            D = G @ A
            unit = D / D.norm(dim=0)
            gradient = 4 * D @ (D.T @ D - eye) + 10 * (D - unit)
            G = G - 1e-3 * gradient @ A.T

    rows = []
    cases = {
        "free": (lambda: analytic_weights(A), lambda: analytic_weights(A, method="pgd", steps=20)),
        "symmetric": (lambda: analytic_weights(A, symmetric=True), descent),
    }
    for name, (ours, peer) in cases.items():
        ratio = scaled(paired_ratio(peer, ours, min_block=block), 1e5 / 20)
        row = {"name": f"{name} analytic weights", "ours": "closed form", "peer": "100,000 gradient steps"}
        rows.append(row | {"ratio": ratio, "target": 1000.0, "detail": "peer timed on 20 steps, scaled"})
    return rows


def run(quick: bool = False) -> list[dict]:
    """One row a comparison; ratios are seconds of the peer over seconds of ours (for the floor the other way round)."""
    m, n, batch, block = (60, 120, 64, 0.005) if quick else (250, 500, 512, 0.05)
    layers, target, few = 16, (-15.0 if quick else -40.0), (2 if quick else 8)
    problem = SparseProblem(m, n, p=0.05 if quick else 0.1)
    A, (x, b) = problem.A, problem.sample(batch, "bench")
    net, part = HyperLISTA(A, FREE, layers, symmetric=False), min(256, batch)
    rows: list[dict] = []

    def add(
        name: str, peer: str, ratio: Ratio | None, target: float | None, detail: str, better: str = "higher"
    ) -> None:
        row = {"name": name, "ours": "HyperLISTA", "peer": peer, "ratio": ratio, "target": target}
        rows.append(row | {"better": better, "detail": detail})

    def timed(peer: Callable, ours: Callable) -> Ratio:
        with torch.no_grad():
            return paired_ratio(peer, ours, min_block=block)

    size = f"{m} x {n}, float32"
    official = official_layers(A, b[:part], SYMMETRIC, layers)
    symmetric = HyperLISTA(A, SYMMETRIC, layers)
    ratio = timed(official, lambda: net(b[:part]))
    add("16 layers", "official layer: 3 products, quantile", ratio, 5.0, f"{size}, batch {part}")
    ratio = timed(official, lambda: symmetric(b[:part]))
    add("16 layers, symmetric weights", "official layer: 3 products, quantile", ratio, None, f"{size}, batch {part}")
    alone, one = SingleSolver(net), b[0].numpy()
    ratio = timed(lambda: net(b[:1]), lambda: alone(one))
    add("one instance", "HyperLISTA in torch, batch 1", ratio, None, f"{size}; ours: SingleSolver")
    ratio = timed(lambda: net(b), products_only(A, b, layers))
    add("distance to the floor", "the matrix products alone", ratio, 2.5, f"{size}, batch {batch}", better="lower")

    with torch.no_grad():
        curve = [float(nmse_db(v, x)) for v in net(b, return_all=True)]
    depth = next((k + 1 for k, v in enumerate(curve) if v <= target), layers)
    for name, options in (("FISTA, best lambda", {}), ("FISTA, restart + continuation", {"restart": "gradient"})):
        keys, count = best_fista(A, x, b, target, 2000, **options)
        gram = A.T @ A
        ratio = timed(
            lambda keys=keys, count=count, gram=gram: fista(A, b, max_iter=count, gram=gram, **keys),
            lambda: net(b, depth),
        )
        detail = f"to {target:.0f} dB: {depth} layers against {count} steps, lambda {keys['lam']:g}, batch {batch}"
        add(f"to {target:.0f} dB: {name}", name, ratio, 20.0, detail)
    for name, peer in lasso_peers(A, b[:few], x[:few]).items():
        if isinstance(peer, str):
            add(f"to {target:.0f} dB: {name}", name, None, None, peer)
            continue
        reached = float(nmse_db(peer().float(), x[:few]))
        ratio = scaled(timed(peer, lambda: net(b, depth)), batch / few)
        goal = 100.0 if name == "scikit-learn Lasso" else None
        add(
            f"to {target:.0f} dB: {name}",
            name,
            ratio,
            goal,
            f"per instance; peer at {reached:.0f} dB, ours at {curve[depth - 1]:.0f} dB",
        )
    return [row | {"unit": "x"} for row in rows] + [
        row | {"better": "higher", "unit": "x"} for row in weight_rows(A, block)
    ]
