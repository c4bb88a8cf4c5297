"""The problem ``b = A x + e``: dictionaries and what follows from them alone, random codes, image patches, scores."""

import dataclasses
import math
import warnings
import zlib
from typing import Any, Self

import torch
from torch import Tensor

from effnb.common import check_choice, check_count, check_number


def check_matrix(A: Any, name: str = "A", width: int | None = None) -> None:
    """Raise unless ``A`` is a finite floating-point matrix, not empty; with ``width``, a batch of that many columns."""
    if not isinstance(A, Tensor) or not A.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(A, 'dtype', type(A).__name__)}")
    if width is None and (A.ndim != 2 or A.numel() == 0):
        raise ValueError(f"{name} must be a non-empty matrix (2-D), got shape {tuple(A.shape)}")
    if width is not None and (A.ndim != 2 or A.shape[1] != width):
        raise ValueError(f"{name} must have shape (batch, {width}), got {tuple(A.shape)}")
    if not torch.isfinite(A).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_unit_columns(A: Tensor) -> None:
    """Raise unless every column of ``A`` has length one."""
    worst = float((normalize_columns(A.detach())[1] - 1).abs().max())
    if worst > 1e-4:  # float32 columns normalised in float32 miss one by about 1e-7
        raise ValueError(f"A must have columns of length 1, got an error of {worst:.3g} (normalize=True rescales them)")


def check_full_row_rank(A: Tensor) -> None:
    """Raise unless the rows of ``A`` are independent, so that ``A A^T`` can be inverted."""
    m, n = A.shape
    if m > n:
        raise ValueError(f"A must have at least as many columns as rows, got shape ({m}, {n})")
    condition = float(torch.linalg.cond(A.detach().double()))
    # By A's own precision, though the inverses are taken in float64: beyond it, A's entries do not fix the inverse.
    limit = 1.0 / (torch.finfo(A.dtype).eps * n)
    if condition > limit:
        raise ValueError(f"A must have full row rank, got condition number {condition:.3g} (limit {limit:.3g})")


def check_weights(W: Tensor, A: Tensor) -> None:
    """Raise unless ``W`` has the shape of ``A`` and ``W^T A`` a unit diagonal."""
    if W.shape != A.shape:
        raise ValueError(f"weights must have the shape of A {tuple(A.shape)}, got {tuple(W.shape)}")
    worst = float(((W * A).sum(0) - 1).abs().max())
    if not worst <= 1e-3:  # written so that NaN fails too
        raise ValueError(f"weights must satisfy diag(W^T A) = 1, got an error of {worst:.3g}")


def normalize_columns(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A (m, n)`` with columns of length one, and their former lengths ``(n,)``.

    Args:
        A: ``(m, n)``.

    Raises:
        ValueError: if a column is zero.

    >>> normalize_columns(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))[1].tolist()
    [5.0, 2.0]
    """
    check_matrix(A)
    norms = torch.linalg.vector_norm(A, dim=0)
    if (norms == 0).any():
        raise ValueError(f"A must have no zero column, got {int((norms == 0).sum())} of them")
    return A / norms, norms


def unit_dictionary(A: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return a checked copy of ``A`` with unit columns, and the lengths by which a solution is to be divided."""
    check_matrix(A)
    A, norms = normalize_columns(A.detach()) if normalize else (A.detach().clone(), A.new_ones(A.shape[1]))
    check_unit_columns(A)
    return A, norms


def mutual_coherence(A: Tensor, W: Tensor | None = None) -> float:
    r"""Return the largest off-diagonal entry of :math:`|W^T A|` (of :math:`|A^T A|` without ``W``).

    Args:
        A: ``(m, n)``.
        W: ``(m, n)`` or ``None``.

    Raises:
        ValueError: if ``A`` is not a matrix or ``W`` has another shape.

    Reference: liu2019alista

    >>> mutual_coherence(torch.eye(3))
    0.0
    """
    check_matrix(A)
    W = A if W is None else W
    if W.shape != A.shape:
        raise ValueError(f"W must have the shape of A {tuple(A.shape)}, got {tuple(W.shape)}")
    return float((W.T @ A).abs().fill_diagonal_(0).max())


def _symmetric_weights(A: Tensor, projections: int | None) -> Tensor:
    r"""Minimise :math:`\|A^T M A - I\|^2` over :math:`M\succeq0` with unit :math:`a_j^T M a_j`; return ``M A``.

    With ``V = H^-1/2 A`` and ``N = H^1/2 M H^1/2`` the objective is ``||N - I||^2`` up to a constant: ``N`` is the
    projection of the identity onto an affine set (closed form) and the cone (needed only if the first leaves it).
    """
    m, n = A.shape
    if n > m * (m + 1) // 2:  # a symmetric M has fewer free entries than the diagonal has conditions
        raise ValueError(f"symmetric weights need n <= m(m+1)/2 = {m * (m + 1) // 2}, got n = {n}; use symmetric=False")
    values, vectors = torch.linalg.eigh(A @ A.T)
    V = (vectors * values.rsqrt()) @ (vectors.T @ A)
    solver = torch.linalg.lu_factor((V.T @ V).square())

    def to_affine(N: Tensor) -> Tensor:
        gap = 1 - (V * (N @ V)).sum(0)
        return N + (V * torch.linalg.lu_solve(*solver, gap.unsqueeze(1)).T) @ V.T

    N = to_affine(torch.eye(m, dtype=A.dtype, device=A.device))
    if projections is None and torch.linalg.eigvalsh(N)[0] < -1e-10:
        warnings.warn("closed form is not positive semidefinite; using projected iterations", stacklevel=3)
        projections = 500
    # Dykstra's alternating projections: plain ones would end at some point of both sets, not at the nearest one. Only
    # the cone needs a correction, a projection onto an affine set forgets its own.
    correction = torch.zeros_like(N)
    for _ in range(projections or 0):
        eigenvalues, basis = torch.linalg.eigh(N + correction)
        cone = (basis * eigenvalues.clamp_min(0)) @ basis.T
        correction = N + correction - cone
        N = to_affine(cone)
    return (vectors * values.rsqrt()) @ (vectors.T @ (N @ V))


def analytic_weights(
    A: Tensor, symmetric: bool = False, method: str = "closed", *, step: float = 0.01, steps: int = 2000
) -> Tensor:
    r"""Return the weights ``W (m, n)`` that make :math:`W^T A` as close to the identity as its unit diagonal allows.

    :math:`\min_W \|W^T A\|_F^2` subject to :math:`w_j^T a_j = 1`, solved by
    :math:`w_j = H^{-1}a_j / (a_j^T H^{-1}a_j)` with :math:`H = AA^T`. The symmetric version asks for :math:`W = MA`
    with :math:`M \succeq 0`: with :math:`P=H^{-1}A` and the projection :math:`K=A^TP`, solve
    :math:`(K\circ K)\nu = 1` and take :math:`M = P\,\mathrm{diag}(\nu)P^T`. Both are computed in float64 and returned
    in the dtype of ``A``.

    Args:
        A: ``(m, n)``, columns of length one, rows independent.
        symmetric: make :math:`W^T A` symmetric (HyperLISTA).
        method: ``"closed"``, or ``"pgd"``: the official projected gradient iteration (for symmetric weights,
            alternating projections onto the constraint and the cone), kept as a reference.
        step, steps: size and number of the steps of ``"pgd"``.

    Raises:
        ValueError: if ``A`` is not 2-D, has columns of other lengths, dependent rows, or, with ``symmetric``, more than
            m(m+1)/2 columns.

    Reference: liu2019alista, chen2021hyperparameter

    >>> A = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=0)
    >>> W = analytic_weights(A)
    >>> torch.allclose((W * A).sum(0), torch.ones(8, dtype=torch.float64))
    True
    """
    check_matrix(A)
    check_choice("method", method, ("closed", "pgd"))
    check_unit_columns(A)
    check_full_row_rank(A)
    wide = A.detach().double()
    if symmetric:
        W = _symmetric_weights(wide, steps if method == "pgd" else None)
    elif method == "closed":
        P = torch.cholesky_solve(wide, torch.linalg.cholesky(wide @ wide.T))
        W = P / (wide * P).sum(0)
    else:
        W, eye = wide.clone(), torch.eye(A.shape[1], dtype=wide.dtype, device=A.device)
        for _ in range(steps):
            W = W - step * (wide @ (wide.T @ W - eye))
            W = W + (1 - (wide * W).sum(0)) * wide  # back to w_j^T a_j = 1; right only for columns of length one
    return W.to(A.dtype)


@dataclasses.dataclass(frozen=True)
class SparseProblem:
    r"""Random problem :math:`b = A x^* + e` with unit-norm columns and Bernoulli-Gauss codes.

    ``A`` depends on ``seed``, fresh codes on ``seed`` and the name of their split; both are drawn on the CPU in
    float64, so that no device or dtype changes them.

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
        dtype, device: of everything returned.

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
        check_count("m", self.m)
        check_count("n", self.n)
        ends = self.p if isinstance(self.p, tuple) else (self.p, self.p)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"p must be a probability or an ordered pair of two, got {self.p}")
        check_choice("magnitude", self.magnitude, ("normal", "sign"))
        check_number("scale", self.scale, gt=0)
        if math.isnan(self.snr) or self.snr == -math.inf:
            raise ValueError(f"snr must be a level in dB or infinity, got {self.snr}")
        if self.cond is not None:
            check_number("cond", self.cond, ge=1)
        A = torch.randn(self.m, self.n, generator=self._generator("matrix"), dtype=torch.float64)
        A = normalize_columns(A)[0]
        if self.cond is not None:
            U, s, V = torch.linalg.svd(A, full_matrices=False)
            s = torch.logspace(0, -math.log10(self.cond), len(s), dtype=s.dtype)
            A = normalize_columns((U * (s * math.sqrt(self.n) / s.norm())) @ V)[0]
        # The official generator draws its validation samples before it changes A; here every sample is of the final A.
        object.__setattr__(self, "_streams", {})
        object.__setattr__(self, "A", A.to(self.device, self.dtype))

    def _generator(self, purpose: str) -> torch.Generator:
        """Return a generator of its own for the matrix and for every split."""
        mixed = zlib.crc32(f"{purpose}/{self.seed}".encode()) + (self.seed << 32)
        return torch.Generator().manual_seed(mixed % 2**63)

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value of the final matrix."""
        return float(torch.linalg.cond(self.A.double()))

    def shifted(self, **changes) -> Self:
        """Return the problem with some fields changed; ``A`` changes only with ``m``, ``n``, ``cond`` or ``seed``."""
        return dataclasses.replace(self, **changes)

    def sample(self, batch: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """Return the next codes ``x (batch, n)`` and measurements ``b (batch, m)`` of the stream named ``split``."""
        check_count("batch", batch)
        g = self._streams.setdefault(split, self._generator(f"codes/{split}"))
        shape = (batch, self.n)
        low, high = self.p if isinstance(self.p, tuple) else (self.p, self.p)
        # Everything is drawn whether it is used or not, so that a shifted problem has the same places and values.
        chance = low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)
        nonzero = torch.rand(shape, generator=g, dtype=torch.float64) < chance
        value = torch.randn(shape, generator=g, dtype=torch.float64)
        noise = torch.randn(batch, self.m, generator=g, dtype=torch.float64)
        x = nonzero * (value.sign() if self.magnitude == "sign" else value) * self.scale
        x = x.to(self.device, self.dtype)
        b = x @ self.A.T
        if self.snr != math.inf:
            sigma = b.std(-1, keepdim=True, correction=0) * 10 ** (-self.snr / 20)  # of each instance, as in the papers
            b = b + sigma * noise.to(self.device, self.dtype)
        return x, b


def overcomplete_dct(patch: int, atoms: int) -> Tensor:
    """Return an overcomplete cosine dictionary ``(patch^2, atoms^2)`` of two dimensions, columns of length one.

    Args:
        patch: side of a patch.
        atoms: frequencies a side.

    Raises:
        ValueError: if ``atoms`` is below ``patch``.

    >>> overcomplete_dct(4, 6).shape
    torch.Size([16, 36])
    """
    check_count("patch", patch)
    check_count("atoms", atoms, patch)
    place, frequency = torch.arange(patch, dtype=torch.float64), torch.arange(atoms, dtype=torch.float64)
    line = torch.cos(torch.outer(place + 0.5, frequency) * torch.pi / atoms)
    line[:, 1:] -= line[:, 1:].mean(0)  # only the first atom carries the patch's mean
    return normalize_columns(torch.kron(line, line))[0].float()


def image_patches(image: Tensor, patch: int) -> Tensor:
    """Return the patches ``(number, patch^2)`` of an image, row by row; what is left over at its ends is dropped.

    Args:
        image: ``(height, width)``.
        patch: side of a patch.

    Raises:
        ValueError: if the image is smaller than a patch.

    >>> image_patches(torch.arange(16.0).reshape(4, 4), 2)[1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    check_matrix(image, "image")
    check_count("patch", patch, 1, min(image.shape))
    return image.unfold(0, patch, patch).unfold(1, patch, patch).reshape(-1, patch * patch)


def psnr_db(image: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in decibels.

    Args:
        image, reference: of the same shape.
        peak: largest possible value.

    Raises:
        ValueError: if the shapes differ.

    >>> round(psnr_db(torch.full((2, 2), 0.1), torch.zeros(2, 2)))
    20
    """
    if image.shape != reference.shape:
        raise ValueError(f"image must have the shape of reference {tuple(reference.shape)}, got {tuple(image.shape)}")
    return float(10 * torch.log10(peak**2 / (image - reference).square().mean()))


def nmse_db(x: Tensor, x_true: Tensor, reduce: str = "ratio") -> Tensor:
    r"""Return the error in decibels: :math:`10\log_{10}(\sum\|x-x^*\|^2/\sum\|x^*\|^2)`; minus infinity if exact.

    Args:
        x, x_true: ``(batch, n)``.
        reduce: ``"ratio"`` sums over the batch first, as the papers do, so that one hard instance can dominate;
            ``"instance"`` returns one value per instance ``(batch,)``.

    Raises:
        ValueError: for shapes that differ, an unknown ``reduce``, or ``x_true`` that is zero throughout.

    >>> float(nmse_db(torch.tensor([[1.1]]), torch.tensor([[1.0]])).round())
    -20.0
    """
    check_choice("reduce", reduce, ("ratio", "instance"))
    if x.shape != x_true.shape:
        raise ValueError(f"x must have the shape of x_true {tuple(x_true.shape)}, got {tuple(x.shape)}")
    error, power = (x - x_true).square().sum(-1), x_true.square().sum(-1)
    if reduce == "ratio":
        error, power = error.sum(), power.sum()
    if not power.any():
        raise ValueError("x_true must not be zero throughout: the error has no reference")
    # 0/0 (an empty instance solved exactly) is no error, not NaN
    return 10 * torch.log10(torch.where(error == 0, 0.0, error / power))
