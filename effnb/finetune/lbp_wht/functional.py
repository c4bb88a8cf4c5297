"""Exact forward, low-rank backward: a linear map whose two gradient products run on Walsh coefficients."""

from collections.abc import Iterable

from torch import Tensor

from .axis import check_padding
from .backward import backprop_image, backprop_tokens, check_grid
from .operators import Grid, build
from .walsh import walsh_positions


def lowrank_backprop_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grid: Grid | None = None,
    order: int = 8,
    selection: str = "l1",
    k: int = 2,
    padding: str = "reflect",
    num_extra_tokens: int = 0,
    positions: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    r"""``x W^T + b`` with a backward pass in a low-rank space of Walsh functions over the token grid.

    With the analysis matrix :math:`A` (rows: chosen Walsh functions of each tile of ``order`` x ``order`` tokens,
    padding folded in) and the synthesis matrix :math:`M` (the same, margins cropped), only :math:`\hat x = A x` is
    stored instead of ``x``, and

    .. math:: \hat g = A g_y / o^2, \quad g_x = M^T \hat g W, \quad g_W = \hat g^T \hat x, \quad g_b = \sum g_y .

    The output and the gradient of the bias are exact. With ``m`` functions and ``P`` tiles both products cost
    ``P m / L`` of the exact ones, and so does the memory. From ``k = 7`` at order 8 the products hardly shrink: take
    exact back-propagation then, unless memory is the aim. Where nothing needs a gradient it is ``F.linear``.

    ``padding`` treats grids that are no multiple of ``order``: ``"reflect"`` is the official code (and counts the
    tokens next to the border twice in :math:`g_W`), ``"zero"`` takes :math:`A = M`, and ``"orthonormal"`` projects
    onto the span of the cropped functions, exactly, at the same cost.

    Args:
        x: tokens ``(batch, num_extra_tokens + height * width, in)`` in row-major order, or an image
            ``(batch, height, width, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        grid: ``(height, width)``; ``None`` for the shape of an image, or a square.
        order: ``o``, the side of a tile, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies.
        padding: ``"reflect"``, ``"zero"`` or ``"orthonormal"``.
        num_extra_tokens: class tokens in front, which keep exact gradients.
        positions: explicit pairs ``(i, j)`` instead of ``selection`` and ``k``.

    Returns:
        ``(..., out)``, the value of ``F.linear``.

    Raises:
        ValueError: an argument out of range, tokens that do not fit the grid, or reflection on too small a grid.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> x, w = torch.randn(2, 49, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    >>> y = lowrank_backprop_linear(x, w, k=4)
    >>> torch.equal(y, torch.nn.functional.linear(x, w)), [g.shape for g in torch.autograd.grad(y.sum(), (x, w))]
    (True, [torch.Size([2, 49, 3]), torch.Size([5, 3])])
    """
    check_padding(padding)
    chosen = walsh_positions(order, selection, k, positions)
    return backprop_tokens(x, weight, bias, grid, order, chosen, padding, num_extra_tokens)


def lowrank_backprop_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    order: int = 8,
    selection: str = "l1",
    k: int = 2,
    padding: str = "reflect",
    positions: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    """A 1x1 convolution with the backward pass of :func:`lowrank_backprop_linear`; the grid is the image.

    ``channels_last`` is the layout of tokens and the quicker one where the image is wider than ``order``.

    Args:
        x: ``(batch, in, height, width)`` in any memory format.
        weight: ``(out, in, 1, 1)``.
        bias: ``(out,)`` or ``None``.
        order: side of a tile, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies.
        padding: how incomplete tiles are filled: ``"reflect"``, ``"zero"`` or ``"orthonormal"``.
        positions: explicit pairs ``(i, j)`` instead of ``selection`` and ``k``.

    Returns:
        ``(batch, out, height, width)``, the value of ``F.conv2d``.

    Raises:
        ValueError: an argument out of range, or a kernel that is not 1x1.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> x, w = torch.randn(2, 3, 7, 7), torch.randn(5, 3, 1, 1)
    >>> torch.equal(lowrank_backprop_conv1x1(x, w), torch.nn.functional.conv2d(x, w))
    True
    """
    check_padding(padding)
    chosen = walsh_positions(order, selection, k, positions)
    return backprop_image(x, weight, bias, order, chosen, padding)


def token_projector(
    grid: Grid,
    order: int = 8,
    selection: str = "l1",
    k: int = 2,
    padding: str = "reflect",
    positions: Iterable[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The matrices of the backward pass, :math:`A/o` and :math:`M/o`, for looking at and for proofs.

    With them ``grad_x = synthesis.T @ analysis @ g_y @ W`` and ``grad_W = (analysis @ g_y).T @ (analysis @ x)``. For
    ``"zero"`` and ``"orthonormal"``, and for grids of whole tiles, the two are equal.

    Args:
        grid: ``(height, width)``.
        order: side of a tile, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies.
        padding: ``"reflect"``, ``"zero"`` or ``"orthonormal"``.
        positions: explicit pairs ``(i, j)`` instead of ``selection`` and ``k``.

    Returns:
        analysis and synthesis, each ``(rows, height * width)`` in float64, tile after tile along the grid.

    Raises:
        ValueError: an argument out of range, or reflection on too small a grid.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> q, _ = token_projector((7, 7), k=4, padding="orthonormal")
    >>> torch.allclose(q @ q.T, torch.eye(10, dtype=q.dtype))
    True
    """
    check_padding(padding)
    chosen = walsh_positions(order, selection, k, positions)
    return build(check_grid(grid), order, chosen, padding, separable=False).matrices()
