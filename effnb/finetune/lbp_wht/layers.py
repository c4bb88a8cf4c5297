"""Exact forward, low-rank backward: the functional forms, the layers, and how a whole model gets them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effnb.common import check_count, near
from effnb.finetune.lbp_wht.projection import Grid, backprop_image, backprop_tokens, build, check_grid
from effnb.finetune.lbp_wht.walsh import WalshBasis

LINEAR_ONLY = ("grid", "num_extra_tokens")


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
    basis = WalshBasis.choose(order, selection, k, positions, padding)
    return backprop_tokens(x, weight, bias, grid, basis, num_extra_tokens)


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
        order, selection, k, positions, padding: as for :func:`lowrank_backprop_linear`.

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
    return backprop_image(x, weight, bias, WalshBasis.choose(order, selection, k, positions, padding))


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
        order, selection, k, positions, padding: as for :func:`lowrank_backprop_linear`.

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
    basis = WalshBasis.choose(order, selection, k, positions, padding)
    return build(check_grid(grid), basis, separable=False).matrices()


class WalshLowRankLinear(nn.Linear):
    r"""``nn.Linear`` on tokens whose backward pass in training mode is :func:`lowrank_backprop_linear`.

    Same parameters, same ``state_dict``; in eval mode, and where no gradient is needed, it is ``nn.Linear`` bit for
    bit. Without ``grid`` every batch has the grid of its own shape.

    Args:
        in_features: channels in.
        out_features: channels out.
        bias: whether to add one.
        device: of the parameters.
        dtype: of the parameters.
        grid: ``(height, width)``; ``None`` for the shape of an image ``(batch, height, width, in)``, or a square.
        order, selection, k, positions, padding: as for :func:`lowrank_backprop_linear`.
        num_extra_tokens: class tokens in front, which keep exact gradients.

    Raises:
        ValueError: an argument out of range; in ``forward``, tokens that do not fit the grid.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> layer = WalshLowRankLinear(3, 5, k=4)
    >>> layer(torch.zeros(2, 49, 3)).shape, list(layer.state_dict())
    (torch.Size([2, 49, 5]), ['weight', 'bias'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        grid: Grid | None = None,
        order: int = 8,
        selection: str = "l1",
        k: int = 2,
        positions: Iterable[tuple[int, int]] | None = None,
        padding: str = "reflect",
        num_extra_tokens: int = 0,
    ) -> None:
        check_count("num_extra_tokens", num_extra_tokens, ge=0)
        basis = WalshBasis.choose(order, selection, k, positions, padding)
        grid = None if grid is None else check_grid(grid)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.grid, self.basis, self.num_extra_tokens = grid, basis, num_extra_tokens

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "WalshLowRankLinear":
        """A layer that shares the parameters of ``linear``: the same objects, so optimisers and ties stay valid.

        Args:
            linear: any ``nn.Linear`` without parametrisation.
            **options: ``grid``, ``order``, ``selection``, ``k``, ``positions``, ``padding``, ``num_extra_tokens``.

        Raises:
            ValueError: an option out of range, or a parametrised weight.
            TypeError: not an ``nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
        return _share(linear, layer)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, in)`` or ``(batch, height, width, in)`` to the same with ``out`` channels."""
        if not self.training:
            return super().forward(x)
        return backprop_tokens(x, self.weight, self.bias, self.grid, self.basis, self.num_extra_tokens)

    def extra_repr(self) -> str:
        """Sizes and what is kept."""
        return f"{super().extra_repr()}, {self.basis}"


class WalshLowRankConv1x1(nn.Conv2d):
    r"""A 1x1 ``nn.Conv2d`` whose backward pass in training mode is :func:`lowrank_backprop_conv1x1`.

    The grid is each batch's image. Same parameters, same ``state_dict``, eval mode bit for bit. ``channels_last`` is
    the layout of tokens, and the quicker one.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: 1.
        stride: 1.
        groups: 1.
        bias: whether to add one.
        device: of the parameters.
        dtype: of the parameters.
        order, selection, k, positions, padding: as for :func:`lowrank_backprop_linear`.

    Raises:
        ValueError: an argument out of range, or a kernel, stride or groups other than 1.
        TypeError: ``order`` is not an int.

    Reference: yang2023efficient

    >>> WalshLowRankConv1x1(3, 5)(torch.zeros(2, 3, 7, 7)).shape
    torch.Size([2, 5, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        order: int = 8,
        selection: str = "l1",
        k: int = 2,
        positions: Iterable[tuple[int, int]] | None = None,
        padding: str = "reflect",
    ) -> None:
        for name, value in {"kernel_size": kernel_size, "stride": stride, "groups": groups}.items():
            if value not in (1, (1, 1), [1, 1]):
                raise ValueError(f"{name} must be 1 for a convolution that acts on single tokens, got {value}")
        basis = WalshBasis.choose(order, selection, k, positions, padding)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.basis = basis

    @classmethod
    def from_linear(cls, conv: nn.Conv2d, **options: Any) -> "WalshLowRankConv1x1":
        """A layer that shares the parameters of the 1x1 convolution ``conv``.

        Args:
            conv: an ``nn.Conv2d`` with kernel, stride and groups 1, without padding and parametrisation.
            **options: ``order``, ``selection``, ``k``, ``positions``, ``padding``.

        Raises:
            ValueError: an option out of range, or a convolution that does not act on single tokens.
            TypeError: not an ``nn.Conv2d``.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be an nn.Conv2d, got {type(conv).__name__}")
        if conv.padding not in ((0, 0), "valid", "same"):
            raise ValueError(f"padding of conv must be 0, got {conv.padding}")
        sizes = (conv.kernel_size, conv.stride, conv.groups)
        layer = cls(conv.in_channels, conv.out_channels, *sizes, conv.bias is not None, device="meta", **options)
        return _share(conv, layer)

    from_conv = from_linear

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, height, width)`` to ``(batch, out, height, width)``."""
        if not self.training:
            return super().forward(x)
        return backprop_image(x, self.weight, self.bias, self.basis)

    def extra_repr(self) -> str:
        """Sizes and what is kept."""
        return f"{super().extra_repr()}, {self.basis}"


def _share(source: nn.Module, layer: nn.Module) -> Any:
    if not isinstance(source._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"weight of {type(source).__name__} must be a plain parameter, not parametrised")
    layer.weight, layer.bias = source.weight, source.bias
    return layer.train(source.training)


def apply_walsh_backprop(
    model: nn.Module, include: Iterable[str] = ("qkv", "proj", "fc1", "fc2"), **options: Any
) -> list[str]:
    """Replace linear layers and 1x1 convolutions of ``model`` by their twins with a low-rank backward pass.

    Parameters are shared, not copied: an optimiser made before stays valid and tied weights stay tied. Layers of
    another kind whose name ends so (a patch embedding called ``proj``) are left alone, unless their full name is given.

    Args:
        model: changed in place.
        include: endings of names (``"fc1"``, ``"attn.proj"``), or full names (``"blocks.0.mlp.fc1"``).
        **options: as for :class:`WalshLowRankLinear`; a convolution does not look at ``grid`` and has no extra tokens.

    Returns:
        Names of the layers replaced, in the model's order.

    Raises:
        ValueError: nothing matches, or an option is out of range.
        TypeError: a layer given by its full name is of another kind.

    Reference: yang2023efficient

    >>> from effnb.models import ViT
    >>> len(apply_walsh_backprop(ViT(depth=2), k=2))
    8
    """
    wanted = (include,) if isinstance(include, str) else tuple(include)
    found: dict[str, nn.Module] = {}
    twins: dict[int, nn.Module] = {}  # a module used in two places stays one module
    for name, module in model.named_modules(remove_duplicate=False):
        if name and any(name == ending or name.endswith("." + ending) for ending in wanted):
            twin = twins.get(id(module)) or _twin(module, name, options, by_full_name="." in name and name in wanted)
            if twin is not None:
                found[name] = twins[id(module)] = twin
    if not found:
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and name]
        hint = near(wanted[0], names)
        raise ValueError(f"include must match a linear layer or 1x1 convolution, got {sorted(wanted)}; {hint}")
    for name, twin in found.items():
        model.set_submodule(name, twin)
    return list(found)


def _twin(module: nn.Module, name: str, options: dict[str, Any], by_full_name: bool) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return WalshLowRankLinear.from_linear(module, **options)
    if isinstance(module, nn.Conv2d) and (module.kernel_size == (1, 1) or by_full_name):
        return WalshLowRankConv1x1.from_linear(module, **{k: v for k, v in options.items() if k not in LINEAR_ONLY})
    if by_full_name:
        raise TypeError(f"{name} must be a linear layer or a 1x1 convolution, got {type(module).__name__}")
    return None
