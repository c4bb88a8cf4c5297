"""The synthetic sparse-coding problem of the papers, and how its solutions are scored."""

from __future__ import annotations

import dataclasses
import math
import zlib

import torch
from torch import Tensor

from effnb.solvers.unrolled_solvers._check import check_choice, check_count, check_matrix, check_number


def normalize_columns(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A`` with columns of length one, and their former lengths.

    Args:
        A: ``(m, n)``.

    Returns:
        ``(m, n)`` and ``(n,)``.

    Raises:
        ValueError: if a column is zero.

    Reference: chen2018theoretical

    >>> normalize_columns(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))[1].tolist()
    [5.0, 2.0]
    """
    check_matrix(A)
    norms = torch.linalg.vector_norm(A, dim=0)
    if (norms == 0).any():
        raise ValueError(f"A must have no zero column, got {int((norms == 0).sum())} of them")
    return A / norms, norms


def nmse_db(x: Tensor, x_true: Tensor, reduce: str = "ratio") -> Tensor:
    r"""Return the error in decibels: :math:`10\log_{10}(\sum\|x-x^*\|^2/\sum\|x^*\|^2)`.

    Args:
        x: ``(batch, n)``.
        x_true: ``(batch, n)``.
        reduce: ``"ratio"`` sums over the batch first, as the papers do, so that one hard instance can dominate;
            ``"instance"`` returns one value per instance ``(batch,)``.

    Returns:
        A number, or ``(batch,)``. An exact solution gives minus infinity.

    Raises:
        ValueError: for shapes that differ, an unknown ``reduce``, or ``x_true`` that is zero throughout.

    Reference: chen2018theoretical

    >>> float(nmse_db(torch.tensor([[1.1]]), torch.tensor([[1.0]])).round())
    -20.0
    """
    check_choice(reduce, "reduce", ("ratio", "instance"))
    if x.shape != x_true.shape:
        raise ValueError(f"x must have the shape of x_true {tuple(x_true.shape)}, got {tuple(x.shape)}")
    error, power = (x - x_true).square().sum(-1), x_true.square().sum(-1)
    if reduce == "ratio":
        error, power = error.sum(), power.sum()
    if not power.any():
        raise ValueError("x_true must not be zero throughout: the error has no reference")
    # 0/0 (an empty instance solved exactly) is no error, not NaN
    return 10 * torch.log10(torch.where(error == 0, 0.0, error / power))


@dataclasses.dataclass(frozen=True)
class SparseProblem:
    r"""Random problem :math:`b = A x^* + e` with unit-norm columns and Bernoulli-Gauss codes.

    ``A`` is drawn once from ``seed``; ``sample`` draws fresh codes from streams that depend on the seed and the
    split's name, on the CPU in float64, so that no device or dtype changes them.

    Args:
        m: measurements.
        n: unknowns.
        p: probability of a nonzero, or a pair: each entry's own probability is uniform between the two.
        snr: signal-to-noise ratio in dB of every instance; infinity means no noise.
        cond: ``None``, or the spread of the singular values *before* the columns are normalised again. The final
            condition number differs; see ``condition_number``.
        magnitude: ``"normal"`` or ``"sign"`` (nonzeros of plus and minus one).
        scale: factor on the nonzeros.
        seed: of the matrix and the streams.
        dtype: of everything returned.
        device: of everything returned; draws are made on the CPU, so that it changes none.

    Raises:
        ValueError: for sizes, probabilities or levels outside their ranges.

    Reference: chen2018theoretical

    >>> problem = SparseProblem(20, 40)
    >>> x, b = problem.sample(8)
    >>> x.shape, bool((b == x @ problem.A.T).all())
    (torch.Size([8, 40]), True)
    """

    m: int = 250
    n: int = 500
    p: float | tuple[float, float] = 0.1
    snr: float = math.inf
    cond: float | None = None
    magnitude: str = "normal"
    scale: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_count(self.m, "m")
        check_count(self.n, "n")
        ends = self.p if isinstance(self.p, tuple) else (self.p, self.p)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"p must be a probability or an ordered pair of two, got {self.p}")
        check_choice(self.magnitude, "magnitude", ("normal", "sign"))
        check_number(self.scale, "scale", 0, strict=True)
        if math.isnan(self.snr) or self.snr == -math.inf:
            raise ValueError(f"snr must be a level in dB or infinity, got {self.snr}")
        if self.cond is not None:
            check_number(self.cond, "cond", 1)
        object.__setattr__(self, "_streams", {})
        object.__setattr__(self, "A", self._draw_matrix())

    def _generator(self, purpose: str) -> torch.Generator:
        mixed = zlib.crc32(f"{purpose}/{self.seed}".encode()) + (self.seed << 32)
        return torch.Generator().manual_seed(mixed % 2**63)

    def _draw_matrix(self) -> Tensor:
        A = torch.randn(self.m, self.n, generator=self._generator("matrix"), dtype=torch.float64)
        A = normalize_columns(A)[0]
        if self.cond is not None:
            U, s, V = torch.linalg.svd(A, full_matrices=False)
            s = torch.logspace(0, -math.log10(self.cond), len(s), dtype=s.dtype)
            A = normalize_columns((U * (s * math.sqrt(self.n) / s.norm())) @ V)[0]
        return A.to(self.device, self.dtype)

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value of the final matrix."""
        return float(torch.linalg.cond(self.A.double()))

    def shifted(self, **changes) -> SparseProblem:
        """Return the problem with some fields changed; ``A`` changes only with ``m``, ``n``, ``cond`` or ``seed``."""
        return dataclasses.replace(self, **changes)

    def sample(self, batch: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """Draw the next ``batch`` instances of a stream.

        Args:
            batch: how many.
            split: name of the stream; different names never share draws.

        Returns:
            Codes ``x (batch, n)`` and measurements ``b (batch, m)``.
        """
        check_count(batch, "batch")
        g = self._streams.setdefault(split, self._generator(f"codes/{split}"))
        shape = (batch, self.n)
        low, high = self.p if isinstance(self.p, tuple) else (self.p, self.p)
        chance = low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)
        nonzero = torch.rand(shape, generator=g, dtype=torch.float64) < chance
        value = torch.randn(shape, generator=g, dtype=torch.float64)
        noise = torch.randn(batch, self.m, generator=g, dtype=torch.float64)
        x = nonzero * (value.sign() if self.magnitude == "sign" else value) * self.scale
        x = x.to(self.device, self.dtype)
        b = x @ self.A.T
        if self.snr != math.inf:
            sigma = b.std(-1, keepdim=True, correction=0) * 10 ** (-self.snr / 20)
            b = b + sigma * noise.to(self.device, self.dtype)
        return x, b
