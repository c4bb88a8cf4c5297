"""A stochastic problem in one dimension on which a rate that sees the current gradient goes wrong."""

from collections.abc import Sequence

import numpy as np

METHODS = ("adam", "delayed_adam", "sgd")


def clipped_chains(
    method: str,
    beta2: float | Sequence[float],
    *,
    curvature: float = 8.0,
    probability: float = 0.2,
    lr: float = 0.1,
    eps: float = 1e-8,
    steps: int = 20_000,
    chains: int = 200,
    tail: float = 0.2,
    seed: int = 0,
) -> np.ndarray:
    r"""Run many chains of stochastic descent on ``[0, 1]`` and return the mean of each over its last steps.

    The loss is :math:`C w^2/2` with probability ``p`` and :math:`-w` otherwise, so the expected loss has its minimum
    at :math:`w^* = (1-p)/(pC)` (0.5 by default). There is no momentum, the step size is ``lr / sqrt(t)``, and ``w`` is
    clipped to ``[0, 1]`` after each step.

    Args:
        method: ``"adam"`` (rate from :math:`v_t`), ``"delayed_adam"`` (from :math:`v_{t-1}`), or ``"sgd"`` (rate one;
            AvaGrad in one dimension).
        beta2: decay rate of the second moment, in [0, 1); with several, all see the same random numbers.
        curvature: ``C`` > 0.
        probability: ``p`` in (0, 1).
        lr: step size at the first step, > 0.
        eps: added to the root of the second moment, > 0.
        steps: steps of each chain, >= 1.
        chains: independent chains, >= 1.
        tail: fraction of the steps to average over, in (0, 1].
        seed: of the random numbers.

    Returns:
        ``(chains,)`` means, or ``(len(beta2), chains)``.

    Raises:
        ValueError: an argument out of its range.

    Reference: savarese2021avagrad.

    >>> bool(clipped_chains("adam", 0.0, steps=2000, chains=10).mean() > 0.95)  # the boundary, far from 0.5
    True
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    decay = np.asarray(beta2, dtype=float)[..., None]
    if not ((decay >= 0) & (decay < 1)).all() or not 0 < probability < 1 or not 0 < tail <= 1:
        raise ValueError(
            f"beta2 must be in [0, 1), probability in (0, 1), tail in (0, 1], got {beta2}, {probability}, {tail}"
        )
    if min(curvature, lr, eps) <= 0 or min(steps, chains) < 1:
        raise ValueError(
            f"curvature, lr and eps must be > 0, steps and chains >= 1, got {curvature}, {lr}, {eps}, {steps}, {chains}"
        )
    rng = np.random.default_rng(seed)
    w = np.broadcast_to(rng.random(chains), (*decay.shape[:-1], chains))
    v = np.zeros_like(w)
    start, total = steps - max(1, round(steps * tail)), np.zeros_like(w)
    for t in range(1, steps + 1):
        g = np.where(rng.random(chains) < probability, curvature * w, -1.0)
        rate, v = _rate_and_moment(method, v, g, decay, eps, t)
        w = np.clip(w - lr / np.sqrt(t) * rate * g, 0, 1)
        if t > start:
            total += w
    return total / (steps - start)


def _rate_and_moment(method: str, v: np.ndarray, g: np.ndarray, beta2: np.ndarray, eps: float, t: int):
    after = beta2 * v + (1 - beta2) * g * g
    if method == "adam":
        return 1 / (np.sqrt(after / (1 - beta2**t)) + eps), after
    if method == "sgd":
        return 1.0, after
    if t == 1:  # no second moment yet: no step
        return 0.0, after
    return 1 / (np.sqrt(v / (1 - beta2 ** (t - 1))) + eps), after
