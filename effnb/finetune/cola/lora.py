"""The low-rank adapter of a linear layer: the one LoRA of the book."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from effnb.finetune.cola.kernel import adapted_linear, adapter_linear
from effnb.finetune.cola.merge import add_low_rank_, check_base, factor_dtype

INITS = ("kaiming", "gaussian")


def draw_factors_(A: Tensor, B: Tensor, init: str, generator: Generator | None = None) -> None:
    """A link's start, in place: ``A`` random (peft's two laws), ``B`` zero, so that the function is unchanged."""
    with torch.no_grad():
        if init == "kaiming":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(A, std=1 / A.shape[0], generator=generator)
        B.zero_()


class LoRALinear(nn.Module):
    r"""A frozen linear layer with a trainable low-rank update, ``y = x (W + s B A)^T + b`` with ``s = alpha / r``.

    In training the update is never formed: the two thin products are added to the frozen one. In evaluation without
    gradients the layer uses ``W + s B A``, formed once and dropped by :meth:`train`; ``W`` itself is not touched by
    that, hence going to and fro does not drift. :meth:`merge_` is what changes ``W``.

    Attributes: ``base`` (the frozen layer), ``A`` of shape ``(r, in)``, ``B`` of shape ``(out, r)``, ``r``, ``alpha``,
    ``scale``. ``weight`` reads the effective weight.

    Args:
        base: the layer; its weight and bias are frozen and shared, not copied.
        r: rank, 1 <= r <= min(in, out).
        alpha: numerator of the scale, > 0; ``None`` means ``r``, a scale of 1.
        dropout: probability of dropping an entry of the adapter's input while training, in [0, 1).
        init: law of ``A``: ``"kaiming"`` (uniform in +-1/sqrt(in), peft's default) or ``"gaussian"`` (standard
            deviation 1/r, as in peft).
        generator: stream for ``A``; ``None`` draws from torch's global one, as ``nn.Linear`` does.
        master_dtype: keep a copy of ``W`` in this precision, which collects what merges would round away.
        merge_on_eval: ``False`` keeps the factors apart in evaluation too, which saves a copy of ``W``.

    Raises:
        ValueError: a rank, alpha, dropout or init outside its range, or a base that is quantised or parametrised.
        TypeError: ``base`` is no ``nn.Linear`` (the error is a ``ValueError`` as well).

    Reference: hu2022lora

    >>> layer = LoRALinear(nn.Linear(6, 4), r=2, alpha=4)
    >>> x = torch.randn(3, 6)
    >>> torch.equal(layer(x), layer.base(x)), layer.scale
    (True, 2.0)
    >>> _ = nn.init.normal_(layer.B)
    >>> y = layer(x)
    >>> torch.allclose(layer.merge_().base(x), y, atol=1e-5)
    True
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "kaiming",
        generator: Generator | None = None,
        master_dtype: torch.dtype | None = None,
        merge_on_eval: bool = True,
    ) -> None:
        check_base(base)
        check_rank(r, base)
        check_options(alpha, dropout, init, master_dtype)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.scale = r, 1.0 if alpha is None else alpha / r
        self.dropout, self.init, self.generator = float(dropout), init, generator
        self.merge_on_eval = merge_on_eval
        self._plain = type(base).forward is nn.Linear.forward
        self._master = None if master_dtype is None else base.weight.detach().to(master_dtype, copy=True)
        self._make_factors()
        self.train(base.training)

    def _make_factors(self) -> None:
        weight = self.base.weight
        like = {"dtype": factor_dtype(weight), "device": weight.device}
        self.A = nn.Parameter(torch.empty(self.r, self.in_features, **like))
        self.B = nn.Parameter(torch.empty(self.out_features, self.r, **like))
        draw_factors_(self.A, self.B, self.init, self.generator)

    @property
    def alpha(self) -> float:
        """Numerator of the scale, ``scale * r``."""
        return self.scale * self.r

    @property
    def bias(self) -> nn.Parameter | None:
        """The frozen layer's bias."""
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """The effective weight ``W + s B A``; differentiable where gradients are on, cached in evaluation."""
        if self.training or torch.is_grad_enabled() or not self.merge_on_eval:
            return self._effective_weight()
        state = tuple((p, p._version, p.data_ptr()) for p in (self.base.weight, self.A, self.B))
        if self._cache is None or any(
            a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(state, self._cache[0], strict=True)
        ):
            self._cache = state, self._effective_weight()
        return self._cache[1]

    def _effective_weight(self) -> Tensor:
        weight = self.base.weight
        total = torch.addmm(weight.to(self.A.dtype), self.B, self.A, alpha=self.scale)
        return total.to(weight.dtype)

    def delta_weight(self) -> Tensor:
        """The update ``s B A``, of shape ``(out, in)`` and the precision of the factors."""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        if self._plain and self.merge_on_eval and not (self.training or torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.base.bias)
        if (self.training and self.dropout) or not self._plain:
            update = adapter_linear(F.dropout(x, self.dropout, self.training), self.A, self.B, self.scale)
            out = self.base(x)
            return out + update.to(out.dtype)
        return adapted_linear(x, self.base.weight, self.base.bias, self.A, self.B, self.scale)

    def merge_(self) -> "LoRALinear":
        """Move the update into the frozen weight, ``W += s B A``, and set ``B`` to zero: the function is unchanged.

        Raises:
            ValueError: NaN or Inf in the factors, or an overflow; ``W`` stays as it was.
        """
        if self._master is not None:
            self._master = self._master.to(self.base.weight.device)
        add_low_rank_(self.base.weight.detach(), self.A.detach(), self.B.detach(), self.scale, self._master)
        self.B.detach().zero_()
        return self

    def reset_(self, r: int | None = None) -> "LoRALinear":
        """Start a new update: ``A`` drawn anew from the running stream, ``B`` zero, no gradients.

        Args:
            r: new rank; the scale stays as it is, so that alpha changes in proportion.
        """
        if r is not None and r != self.r:
            check_rank(r, self.base)
            self.r = r
            self._make_factors()
        else:
            self.A.grad = self.B.grad = None
            draw_factors_(self.A, self.B, self.init, self.generator)
        return self

    def train(self, mode: bool = True) -> "LoRALinear":
        """Set the mode and drop the merged copy of evaluation."""
        self._cache = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "LoRALinear":
        self._cache = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def check_rank(r: int, layer: nn.Linear, name: str = "r") -> None:
    """``1 <= r <= min(in, out)``, an integer."""
    limit = min(layer.in_features, layer.out_features)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= limit:
        raise ValueError(f"{name} must be an integer in [1, {limit}] for this layer, got {r!r}")


def check_options(alpha: float | None, dropout: float, init: str, master_dtype: torch.dtype | None) -> None:
    """The ranges of an adapter's options."""
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    if master_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"master_dtype must be torch.float32, torch.float64 or None, got {master_dtype}")
