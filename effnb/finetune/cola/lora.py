"""The low-rank adapter of a linear layer, the one LoRA of the book: its map, its merge, and how models get it."""

import math
import re
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from effnb.common import check_choice, check_number, near

# torch.func's transforms need plain operations; without the (private) question they are never assumed.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class AdapterError(TypeError, ValueError):
    """A layer that cannot carry an adapter: its class, its quantised or its shared weight."""


# --- the adapted map, in one node of the graph


class AdaptedLinear(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T``.

    A product with a short side of ``rank`` runs several times faster with the long side last. Everything that has
    ``rank`` columns is therefore computed as its transpose, and the adapter's part of the input's gradient is added
    inside the second product instead of in a pass of its own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        flat = x.reshape(-1, x.shape[-1])
        xA = A @ flat.t()
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        torch.addmm(out, xA.t(), B.t(), alpha=scale, out=out)  # counters of operations do not know `addmm_`
        ctx.save_for_backward(x, weight, A, B, xA)
        ctx.scale = scale
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, xA = ctx.saved_tensors
        x_grad, weight_grad, bias_grad, A_grad, B_grad, _ = ctx.needs_input_grad
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
        if torch.is_grad_enabled():  # a second derivative is wanted, and the saved product has no history
            xA = A @ flat.t()
        gB = B.t().contiguous().mul_(ctx.scale) @ g.t()
        dx = g @ weight if x_grad else None
        if x_grad:  # in place, unless a graph is recorded
            dx = torch.addmm(dx, gB.t(), A, out=None if torch.is_grad_enabled() else dx).view(x.shape)
        dW = g.t() @ flat if weight_grad else None
        db = g.sum(0) if bias_grad else None
        dA = gB @ flat if A_grad else None
        dB = ((xA * ctx.scale) @ g).t() if B_grad else None
        return dx, dW, db, dA, dB, None


# --- the merge: what may be merged, and a sum in a precision that keeps it


def check_base(layer: nn.Module, name: str = "base", kinds: tuple[type, ...] = (nn.Linear,)) -> None:
    """Refuse what ``W + s B A`` would lose or misplace: no ``nn.Linear``, quantised or computed weights."""
    if not isinstance(layer, kinds):
        raise AdapterError(f"{name} must be an nn.Linear, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer, "weight"):
        raise AdapterError(f"{name}.weight is computed by a parametrization: a merge would be lost, remove it first")
    weight = layer.weight
    if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.itemsize < 2:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise AdapterError(f"{name}.weight must be a plain floating-point tensor, got {kind}: merging would lose dW")


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Precision of factors, products and sums: at least float32, float64 for float64 weights."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def check_sum(weight: Tensor, A: Tensor, B: Tensor, scale: float, name: str = "adapter") -> None:
    """Refuse NaN, Inf and overflow before any weight changes; a bound from the largest entries is nearly always enough.

    Raises:
        ValueError: names the adapter; ``weight`` is only read.
    """
    bound = abs(scale) * A.shape[0] * A.abs().max().item() * B.abs().max().item()
    if not bound < torch.finfo(factor_dtype(A)).max:
        raise ValueError(f"{name} must have finite factors, got NaN, Inf or an overflow: the weights stay as they were")
    limit = torch.finfo(weight.dtype).max
    if bound + weight.abs().max().item() >= limit:
        total = torch.addmm(weight.to(A.dtype), B, A, alpha=scale)
        if not (total.abs() <= limit).all():
            raise ValueError(f"{name} makes W + s B A overflow {weight.dtype}: the weights stay as they were")


@torch.no_grad()
def round_into_(weight: Tensor, delta: Tensor, master: Tensor | None = None) -> Tensor:
    """``weight += delta`` with the sum in the precision of ``delta`` or of ``master``; warns of what rounding loses."""
    if master is not None:
        if not torch.equal(master.to(weight.dtype), weight):
            master.copy_(weight)  # somebody loaded other weights since
        return weight.copy_(master.add_(delta))
    if weight.dtype == delta.dtype:
        return weight.add_(delta)
    start = weight.to(delta.dtype)
    total = start + delta
    rounded = total.to(weight.dtype)
    moved = total != start
    if lost := (moved & (rounded == start)).sum().item():
        warnings.warn(
            f"{lost / moved.sum().item():.0%} of the updates are below half an ulp of {rounded.dtype} and vanish in "
            "this merge; master_dtype=torch.float32 keeps them",
            stacklevel=2,
        )
    return weight.copy_(rounded)


# --- the layer


def check_rank(r: int, layer: nn.Linear) -> None:
    """``1 <= r <= min(in, out)``, an integer."""
    limit = min(layer.in_features, layer.out_features)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= limit:
        raise ValueError(f"r must be an integer in [1, {limit}] for this layer, got {r!r}")


def check_options(alpha: float | None, dropout: float, init: str, master_dtype: torch.dtype | None) -> None:
    """The ranges of an adapter's options."""
    if alpha is not None:
        check_number("alpha", alpha, gt=0)
    check_number("dropout", dropout, ge=0, lt=1)
    check_choice("init", init, ("kaiming", "gaussian"))
    if master_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"master_dtype must be torch.float32, torch.float64 or None, got {master_dtype}")


@torch.no_grad()
def draw_factors_(A: Tensor, B: Tensor, init: str, generator: Generator | None = None) -> None:
    """A link's start, in place: ``A`` random (peft's two laws), ``B`` zero, so that the function is unchanged."""
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
        like = {"dtype": factor_dtype(self.base.weight), "device": self.base.weight.device}
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
        parts = weight, A, B = self.base.weight, self.A, self.B
        cached = self.merge_on_eval and not (self.training or torch.is_grad_enabled())
        state = [(id(p), p._version, p.data_ptr()) for p in parts] if cached else None
        if cached and self._cache and self._cache[0] == state:
            return self._cache[1]
        total = torch.addmm(weight.to(A.dtype), B, A, alpha=self.scale).to(weight.dtype)
        if cached:
            self._cache = state, total, parts  # the parts are held: no other tensor may get their ids
        return total

    def delta_weight(self) -> Tensor:
        """The update ``s B A``, of shape ``(out, in)`` and the precision of the factors."""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        base, A, B = self.base, self.A, self.B
        if self._plain and self.merge_on_eval and not (self.training or torch.is_grad_enabled()):
            return F.linear(x, self.weight, base.bias)
        fused = self._plain and not (self.training and self.dropout) and x.dtype == base.weight.dtype == A.dtype
        if fused and not (_transformed() or torch.is_autocast_enabled(x.device.type)):
            return AdaptedLinear.apply(x, base.weight, base.bias, A, B, self.scale)
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training).to(A.dtype), A), B * self.scale)
        out = base(x)
        return out + update.to(out.dtype)

    @torch.no_grad()
    def merge_(self) -> "LoRALinear":
        """Move the update into the frozen weight, ``W += s B A``, and set ``B`` to zero: the function is unchanged.

        Raises:
            ValueError: NaN or Inf in the factors, or an overflow; ``W`` stays as it was.
        """
        weight, A, B = self.base.weight.detach(), self.A, self.B
        check_sum(weight, A, B, self.scale)
        dtype = torch.promote_types(factor_dtype(weight), A.dtype)
        if self._master is None and weight.dtype == A.dtype == dtype:
            torch.addmm(weight, B, A, alpha=self.scale, out=weight)
        else:
            self._master = None if self._master is None else self._master.to(weight.device)
            round_into_(weight, self.scale * (B.to(dtype) @ A.to(dtype)), self._master)
        B.zero_()
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


# --- adapters into a model


def inject_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    *,
    init: str = "kaiming",
    modules_to_save: Sequence[str] = (),
    generator: Generator | None = None,
    master_dtype: torch.dtype | None = None,
    merge_on_eval: bool = True,
    allow_tied: bool = False,
) -> list[str]:
    """Put a :class:`LoRALinear` in the place of every target layer, in place, and freeze the rest of the model.

    Args:
        model: changed in place; nothing is changed where an argument is refused.
        target_modules: endings of module names (``["q", "attn.v"]``), or a string: a regular expression that matches
            the full name, or one ending.
        r, alpha, dropout, init, generator, master_dtype, merge_on_eval: of every adapter, as in :class:`LoRALinear`.
        modules_to_save: endings of the names of modules that go on training in full, such as a task head.
        allow_tied: accept a target whose weight another parameter shares; a merge then changes both.

    Returns:
        Names of the adapted layers, in the order of ``model.named_modules()``.

    Raises:
        ValueError: an option outside its range, a target without a module (near names are listed), a tied or quantised
            weight.
        TypeError: a target that is no ``nn.Linear`` (the error is a ``ValueError`` as well).

    Reference: hu2022lora

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject_lora(model, ["0"], r=2, modules_to_save=["2"])
    ['0']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.A', '0.B', '2.weight', '2.bias']
    """
    check_options(alpha, dropout, init, master_dtype)
    names = find_modules(model, target_modules, "target_modules")
    kept = find_modules(model, modules_to_save, "modules_to_save") if modules_to_save else []
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        check_base(layer, name)
        check_rank(r, layer)
    if not allow_tied:
        check_untied(model, [f"{name}.weight" for name in names])
    if clash := sorted(set(names) & set(kept)):
        raise ValueError(f"target_modules and modules_to_save must not overlap, got {clash} in both")
    model.requires_grad_(False)
    for name in kept:
        model.get_submodule(name).requires_grad_(True)
    wrapped: dict[nn.Module, LoRALinear] = {}  # a layer that stands in two places keeps one adapter
    for name, layer in layers.items():
        if layer not in wrapped:
            wrapped[layer] = LoRALinear(layer, r, alpha, dropout, init, generator, master_dtype, merge_on_eval)
        model.set_submodule(name, wrapped[layer])
    return names


def find_modules(model: nn.Module, patterns: str | Sequence[str], argument: str) -> list[str]:
    """Names of the modules that match, in the order of the model; every pattern must match one."""
    # Peft's grammar: one string is a regular expression as well, entries of a list are endings.
    regular = isinstance(patterns, str)
    listed = [patterns] if regular else list(patterns or ())
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f"{argument} must name at least one module, got {patterns!r}")
    names, found = [name for name, _ in model.named_modules(remove_duplicate=False) if name], set()
    for pattern in listed:
        hits = [n for n in names if f".{n}".endswith(f".{pattern}") or (regular and re.fullmatch(pattern, n))]
        if not hits:
            raise ValueError(f"{argument} must match a module, got {pattern!r}; {near(pattern, names)}")
        found.update(hits)
    return [name for name in names if name in found]


def check_untied(model: nn.Module, weights: list[str]) -> None:
    """Refuse weights whose memory another parameter or buffer shares, in whole or in part."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors if t.nbytes and t.data_ptr()}
    for weight in filter(spans.__contains__, weights):
        start, end = spans[weight]
        shared = [name for name, (a, b) in spans.items() if name != weight and a < end and start < b]
        if shared:
            told = "a merge would change both, allow_tied=True accepts that"
            raise AdapterError(f"{weight} is tied to {shared[0]}: {told}")


def restore_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    """Give back the ``requires_grad`` flags, by name, and drop gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        parameter.grad = None
