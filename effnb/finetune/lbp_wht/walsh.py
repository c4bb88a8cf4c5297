"""Walsh functions over a grid of tokens: which are chosen, how tiles and borders hold them, what they cost."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from operator import index

import torch
from torch import Tensor

from effnb.common import check_choice, check_count

Positions = tuple[tuple[int, int], ...]
PADDINGS = ("reflect", "zero", "orthonormal")


def check_order(order: int) -> None:
    """Raise unless ``order``, the side of a tile, is a power of two: a cut of a larger matrix is not orthogonal."""
    if not isinstance(order, int) or isinstance(order, bool):
        raise TypeError(f"order must be an int, got {type(order).__name__}")
    if order < 1 or order & (order - 1):
        raise ValueError(f"order must be a power of two, got {order}")


def walsh_matrix(order: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return the Walsh matrix :math:`S`: entries :math:`\pm 1`, row ``i`` changes sign ``i`` times (sequency order).

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
    """Return the chosen pairs ``(i, j)``: the basis function is row ``i`` down the grid times row ``j`` along it.

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
    check_choice("selection", selection, ("l1", "linf"))
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
    r"""Return two-dimensional Walsh functions :math:`B_{ij} = S_i S_j^T`, orthogonal, of squared norm :math:`o^2`.

    For pictures and proofs: the layers never build them, they fold the two axes of :class:`WalshBasis` onto the tokens.

    Args:
        order, selection, k, positions: as for :func:`walsh_positions`.
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


@dataclass(frozen=True)
class WalshBasis:
    """A checked choice of Walsh functions on tiles of tokens; it travels as one through layers and operators.

    Args:
        order: ``o``, the side of a tile, a power of two.
        positions: the chosen pairs ``(i, j)``.
        padding: what fills incomplete tiles: ``"reflect"`` (the official code), ``"zero"`` or ``"orthonormal"``.
    """

    order: int
    positions: Positions
    padding: str

    @classmethod
    def choose(
        cls,
        order: int = 8,
        selection: str = "l1",
        k: int = 2,
        positions: Iterable[tuple[int, int]] | None = None,
        padding: str = "reflect",
    ) -> "WalshBasis":
        """Return the basis of :func:`walsh_positions` with its padding; raises as it does."""
        check_choice("padding", padding, PADDINGS)
        return cls(order, walsh_positions(order, selection, k, positions), padding)

    def __str__(self) -> str:
        return f"order={self.order}, m={len(self.positions)}, padding={self.padding!r}"

    @property
    def is_nested(self) -> bool:
        """Whether with ``(i, j)`` all pairs of lower frequencies are chosen: Gram-Schmidt on each axis is enough."""
        chosen = set(self.positions)
        return all((i == 0 or (i - 1, j) in chosen) and (j == 0 or (i, j - 1) in chosen) for i, j in chosen)


# --- the token grid, axis by axis


def tiles_along(size: int, order: int) -> int:
    """Tiles of ``order`` cells that cover ``size`` tokens."""
    return -(-size // order)


@dataclass(frozen=True)
class Axis:
    """Walsh functions of every tile, as rows over the real tokens of the axis.

    ``analysis`` reads coefficients off a signal, with the padding folded in; ``synthesis`` puts them back, with the
    margin cropped. Both are ``(tiles, order, size)`` in float64. ``reads`` and ``writes`` are the tokens that a tile
    touches: the writes of all tiles are a partition, the reads overlap where a reflection reaches into the next tile.
    """

    analysis: Tensor
    synthesis: Tensor
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]


def walsh_axis(size: int, order: int, padding: str) -> Axis:
    """Fold the Walsh functions onto an axis of ``size`` tokens.

    The margin is split as in the official code: the larger half in front.
    """
    tiles = tiles_along(size, order)
    front = -(-(tiles * order - size) // 2)
    if padding == "reflect" and front >= size:
        raise ValueError(
            f"padding must be 'zero' or 'orthonormal' for this grid: 'reflect' needs more than {front} tokens along "
            f"each side to fill tiles of order {order}, got {size}"
        )
    source = torch.arange(tiles * order) - front
    real = (source >= 0) & (source < size)
    mirrored = (size - 1 - (size - 1 - source.abs()).abs()).clamp_min(0)
    cells = torch.nn.functional.one_hot(mirrored, size).double().view(tiles, order, size)
    cropped = cells * real.view(tiles, order, 1)
    walsh = walsh_matrix(order, torch.float64)
    synthesis = walsh @ cropped
    analysis = walsh @ cells if padding == "reflect" else synthesis
    if padding == "orthonormal":
        analysis = synthesis = torch.stack([_gram_schmidt(rows) for rows in synthesis])
    reads = tuple(map(_extent, cells if padding == "reflect" else cropped))
    return Axis(analysis, synthesis, reads, tuple(map(_extent, cropped)))


def _extent(cells: Tensor) -> tuple[int, int]:
    used = cells.any(0).nonzero()
    return int(used[0]), int(used[-1]) + 1


def _gram_schmidt(rows: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Orthonormal rows with the same nested spans, zero where a row adds nothing to those before it."""
    basis = torch.zeros_like(rows)
    for i, row in enumerate(rows / rows.norm(dim=1, keepdim=True)):
        for _ in range(2):  # the second pass takes away what rounding left
            row = row - basis.T @ (basis @ row)
        if row.norm() > tolerance:
            basis[i] = row / row.norm()
    return basis


# --- FLOPs of one linear layer's backward pass for one image, twice the multiply-adds


def num_tiles(grid: tuple[int, int], order: int = 8) -> int:
    """Return ``P``, the number of ``order`` x ``order`` tiles that cover a token grid.

    Args:
        grid: ``(height, width)``.
        order: side of a tile, a power of two.

    Returns:
        ``ceil(height / order) * ceil(width / order)``.

    Raises:
        ValueError: a side below 1, or an order that is not a power of two.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> num_tiles((7, 7)), num_tiles((14, 14))
    (1, 4)
    """
    check_order(order)
    height, width = grid
    check_count("height", height)
    check_count("width", width)
    return tiles_along(height, order) * tiles_along(width, order)


def dense_backward_cost(L: int, c_in: int, c_out: int, needs_input_grad: bool = True) -> int:
    r"""Return the FLOPs of exact back-propagation for one image: :math:`4 L C_i C_o`, half of it for each gradient.

    Args:
        L: tokens of one image.
        c_in: input channels.
        c_out: output channels.
        needs_input_grad: ``False`` for the first trainable layer, whose input needs no gradient.

    Returns:
        FLOPs.

    Raises:
        ValueError: a size below 1.

    Reference: yang2023efficient

    >>> dense_backward_cost(49, 448, 1792)
    157351936
    """
    check_count("L", L)
    check_count("c_in", c_in)
    check_count("c_out", c_out)
    return 2 * (1 + needs_input_grad) * L * c_in * c_out


def lora_backward_cost(L: int, c_in: int, c_out: int, rank: int, needs_input_grad: bool = True) -> int:
    r"""Return LoRA's FLOPs: :math:`2 L C_i C_o` for :math:`g_x` through the frozen weight, :math:`6 L r (C_i + C_o)`.

    The second term counts the adapter's own forward pass, as the low-rank backward pass counts its transform of the
    input: both are work that fine-tuning the dense layer does not have.

    Args:
        L: tokens of one image.
        c_in: input channels.
        c_out: output channels.
        rank: of the adapter.
        needs_input_grad: ``False`` for the first trainable layer: neither the frozen weight nor ``A`` passes a
            gradient on.

    Returns:
        FLOPs.

    Raises:
        ValueError: a size below 1.

    Reference: hu2022lora, yang2023efficient

    >>> lora_backward_cost(49, 448, 1792, 8) / dense_backward_cost(49, 448, 1792)
    0.5334821428571429
    """
    check_count("L", L)
    check_count("c_in", c_in)
    check_count("c_out", c_out)
    check_count("rank", rank)
    adapter = 6 * L * rank * (c_in + c_out)
    return 2 * L * c_in * c_out + adapter if needs_input_grad else adapter - 2 * L * rank * c_in


def walsh_backward_cost(
    L: int,
    c_in: int,
    c_out: int,
    order: int = 8,
    m: int = 3,
    tiles: int = 1,
    needs_input_grad: bool = True,
    transforms: bool = True,
) -> int:
    r"""Return the FLOPs of L1-k: :math:`4 P m C_i C_o`, and :math:`P m o^2 (2 C_i + C_o)` additions.

    The additions are the transform of the input (in the forward pass), of the output's gradient, and the way back of
    the input's gradient, each coefficient of a tile by itself, as the paper counts them. The products are never
    cheaper than ``1/L`` of the exact ones (``m`` and the tiles 1).

    Args:
        L: tokens of one image; ``tiles`` tiles must be able to hold them.
        c_in: input channels.
        c_out: output channels.
        order: ``o``, side of a tile, a power of two.
        m: functions a tile, 1 to ``order**2``.
        tiles: ``P``, see :func:`num_tiles`.
        needs_input_grad: ``False`` for the first trainable layer, whose input needs no gradient.
        transforms: ``False`` counts the two products alone.

    Returns:
        FLOPs.

    Raises:
        ValueError: a size out of range.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> dense_backward_cost(49, 448, 1792) / walsh_backward_cost(49, 448, 1792, m=3, transforms=False)
    16.333333333333332
    """
    check_order(order)
    check_count("L", L)
    check_count("c_in", c_in)
    check_count("c_out", c_out)
    check_count("m", m)
    check_count("tiles", tiles)
    if m > order**2:
        raise ValueError(f"m must be at most order^2 = {order**2}, got {m}")
    if tiles * order**2 < L:
        raise ValueError(f"tiles must hold all tokens: {tiles} of {order} x {order} cells are too few for L = {L}")
    sides = 1 + needs_input_grad
    products = 2 * sides * tiles * m * c_in * c_out
    return products + transforms * tiles * m * order**2 * (sides * c_in + c_out)
