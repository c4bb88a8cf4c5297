"""FLOPs of one linear layer's backward pass for one image: exact, LoRA and low-rank; twice the multiply-adds."""

from .axis import tiles_along
from .walsh import check_order


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def num_tiles(grid: tuple[int, int], order: int = 8) -> int:
    """``P``, the number of ``order`` x ``order`` tiles that cover a token grid.

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
    _check(height=height, width=width)
    return tiles_along(height, order) * tiles_along(width, order)


def dense_backward_cost(L: int, c_in: int, c_out: int, needs_input_grad: bool = True) -> int:
    r"""Exact back-propagation: :math:`4 L C_i C_o`, half of it for each gradient.

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
    _check(L=L, c_in=c_in, c_out=c_out)
    return 2 * (1 + needs_input_grad) * L * c_in * c_out


def lora_backward_cost(L: int, c_in: int, c_out: int, rank: int, needs_input_grad: bool = True) -> int:
    r"""LoRA: :math:`2 L C_i C_o` for :math:`g_x` through the frozen weight, and :math:`6 L r (C_i + C_o)`.

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
    _check(L=L, c_in=c_in, c_out=c_out, rank=rank)
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
    r"""Low-rank back-propagation: :math:`4 P m C_i C_o`, and :math:`P m o^2 (2 C_i + C_o)` additions.

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
    _check(L=L, c_in=c_in, c_out=c_out, m=m, tiles=tiles)
    if m > order**2:
        raise ValueError(f"m must be at most order^2 = {order**2}, got {m}")
    if tiles * order**2 < L:
        raise ValueError(f"tiles must hold all tokens: {tiles} of {order} x {order} cells are too few for L = {L}")
    sides = 1 + needs_input_grad
    products = 2 * sides * tiles * m * c_in * c_out
    return products + transforms * tiles * m * order**2 * (sides * c_in + c_out)
