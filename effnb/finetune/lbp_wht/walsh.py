"""Walsh matrices in sequency order, and which products of their rows span the subspace of a backward pass."""

from collections.abc import Iterable
from functools import lru_cache
from operator import index

import torch
from torch import Tensor

Positions = tuple[tuple[int, int], ...]


def check_order(order: int) -> None:
    """Raise unless ``order`` is a power of two: a cut-out of a larger matrix is not orthogonal."""
    if not isinstance(order, int) or isinstance(order, bool):
        raise TypeError(f"order must be an int, got {type(order).__name__}")
    if order < 1 or order & (order - 1):
        raise ValueError(f"order must be a power of two, got {order}")


def walsh_matrix(order: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""The Walsh matrix :math:`S`: entries :math:`\pm 1`, row ``i`` changes sign exactly ``i`` times (sequency order).

    It is symmetric and :math:`S S^T = o I`. It is the natural Hadamard matrix with its rows permuted by the
    bit-reversed Gray code; in natural order, "low frequencies first" would be wrong.

    Args:
        order: ``o``, a power of two, >= 1.
        dtype: of the result; ``None`` for torch's default.

    Returns:
        ``(order, order)``.

    Raises:
        ValueError: ``order`` is not a power of two.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> walsh_matrix(4).int()
    tensor([[ 1,  1,  1,  1],
            [ 1,  1, -1, -1],
            [ 1, -1, -1,  1],
            [ 1, -1,  1, -1]], dtype=torch.int32)
    """
    check_order(order)
    bits = order.bit_length() - 1
    gray = (i ^ (i >> 1) for i in range(order))
    natural = [int(f"{g:0{bits}b}"[::-1], 2) if bits else 0 for g in gray]
    rows = [[-1.0 if (n & j).bit_count() % 2 else 1.0 for j in range(order)] for n in natural]
    return torch.tensor(rows, dtype=dtype or torch.get_default_dtype())


def walsh_positions(
    order: int = 8, selection: str = "l1", k: int = 2, positions: Iterable[tuple[int, int]] | None = None
) -> Positions:
    """The chosen pairs ``(i, j)``: the basis function is row ``i`` down the grid times row ``j`` along it.

    ``"l1"`` takes all pairs with ``i + j < k``, which are ``k (k + 1) / 2`` up to ``k = order``; ``"linf"`` takes the
    ``k^2`` pairs with ``i < k`` and ``j < k``. Both run over ``i`` outside and ``j`` inside. The official code falls
    back to ``k=1``, the mean alone, where nothing is set.

    Args:
        order: ``o``, a power of two.
        selection: ``"l1"`` or ``"linf"``.
        k: how many frequencies; ``1 .. 2 order - 1`` for ``"l1"``, ``1 .. order`` for ``"linf"``.
        positions: an explicit list instead, in any order; ``selection`` and ``k`` are then not looked at.

    Returns:
        A tuple of pairs.

    Raises:
        ValueError: an argument out of range, or positions that are empty, repeated or outside the matrix.
        TypeError: ``order``, ``k`` or a position is not an int.

    Reference: yang2023efficient

    >>> walsh_positions(8, "l1", 2)
    ((0, 0), (0, 1), (1, 0))
    """
    check_order(order)
    if positions is not None:
        return _checked(order, tuple((index(i), index(j)) for i, j in positions))
    if selection not in ("l1", "linf"):
        raise ValueError(f"selection must be 'l1' or 'linf', got {selection!r}")
    largest = 2 * order - 1 if selection == "l1" else order
    if not 1 <= k <= largest:
        raise ValueError(f"k must be in [1, {largest}] for {selection!r} and order {order}, got {k}")
    return _lowest(order, selection, index(k))


@lru_cache(maxsize=256)
def _lowest(order: int, selection: str, k: int) -> Positions:
    limit = min(order, k)
    last = (lambda i: min(order, k - i)) if selection == "l1" else (lambda i: limit)
    return tuple((i, j) for i in range(limit) for j in range(last(i)))


def _checked(order: int, positions: Positions) -> Positions:
    if not positions:
        raise ValueError("positions must hold at least one pair, got none")
    outside = [p for p in positions if not (0 <= p[0] < order and 0 <= p[1] < order)]
    if outside:
        raise ValueError(f"positions must lie in [0, {order - 1}], got {outside}")
    if len(set(positions)) < len(positions):
        raise ValueError(f"positions must not repeat, got {sorted({p for p in positions if positions.count(p) > 1})}")
    return positions


def walsh_bases(
    order: int = 8,
    selection: str = "l1",
    k: int = 2,
    positions: Iterable[tuple[int, int]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Two-dimensional Walsh functions :math:`B_{ij} = S_i S_j^T`, pairwise orthogonal with squared norm :math:`o^2`.

    Args:
        order: ``o``, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies.
        positions: an explicit list of pairs ``(i, j)`` instead.
        dtype: of the result; ``None`` for torch's default.

    Returns:
        ``(m, order, order)`` with entries +1 and -1.

    Raises:
        ValueError: as :func:`walsh_positions`.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> walsh_bases(2, "linf", 2).int().tolist()
    [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]
    """
    pairs = torch.tensor(walsh_positions(order, selection, k, positions))
    s = walsh_matrix(order, dtype)
    return s[pairs[:, 0], :, None] * s[pairs[:, 1], None, :]
