"""Layers with an exact forward and a low-rank backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .axis import check_padding
from .backward import backprop_image, backprop_tokens, check_grid
from .operators import Grid
from .walsh import walsh_positions


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
        order: side of a tile, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies; from 7 on (at order 8) only memory is saved.
        positions: explicit pairs ``(i, j)`` instead of ``selection`` and ``k``.
        padding: ``"reflect"`` (official), ``"zero"`` or ``"orthonormal"``.
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
        check_padding(padding)
        if num_extra_tokens < 0:
            raise ValueError(f"num_extra_tokens must be >= 0, got {num_extra_tokens}")
        chosen = walsh_positions(order, selection, k, positions)
        grid = None if grid is None else check_grid(grid)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.grid, self.order, self.positions = grid, order, chosen
        self.token_padding, self.num_extra_tokens = padding, num_extra_tokens

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
        return backprop_tokens(
            x,
            self.weight,
            self.bias,
            self.grid,
            self.order,
            self.positions,
            self.token_padding,
            self.num_extra_tokens,
        )

    def extra_repr(self) -> str:
        """Sizes and what is kept."""
        return f"{super().extra_repr()}, {_describe(self)}"


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
        order: side of a tile, a power of two.
        selection: ``"l1"`` or ``"linf"``, see :func:`walsh_positions`.
        k: how many frequencies; from 7 on (at order 8) only memory is saved.
        positions: explicit pairs ``(i, j)`` instead of ``selection`` and ``k``.
        padding: of the tiles: ``"reflect"`` (official), ``"zero"`` or ``"orthonormal"``; the convolution has none.

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
        check_padding(padding)
        chosen = walsh_positions(order, selection, k, positions)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.order, self.positions, self.token_padding = order, chosen, padding

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
        return backprop_image(x, self.weight, self.bias, self.order, self.positions, self.token_padding)

    def extra_repr(self) -> str:
        """Sizes and what is kept."""
        return f"{super().extra_repr()}, {_describe(self)}"


def _describe(layer: WalshLowRankLinear | WalshLowRankConv1x1) -> str:
    return f"order={layer.order}, m={len(layer.positions)}, padding={layer.token_padding!r}"


def _share(source: nn.Module, layer: nn.Module) -> Any:
    if not isinstance(source._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"weight of {type(source).__name__} must be a plain parameter, not parametrised")
    layer.weight, layer.bias = source.weight, source.bias
    return layer.train(source.training)
