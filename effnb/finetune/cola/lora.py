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

INITS = ("kaiming", "gaussian")
# torch.func's transforms need plain operations; without the (private) question they are never assumed.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class AdapterError(TypeError, ValueError):
    """A layer that cannot carry an adapter: its class, its quantised or its shared weight."""


# --- the adapted map, in one node of the graph


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``total += scale * left @ right`` in one pass; out of place only where a graph is recorded.

    It is ``addmm`` into its own argument, since counters of operations do not know ``addmm_``.
    """
    return torch.addmm(total, left, right, alpha=scale, out=None if torch.is_grad_enabled() else total)


class _AdaptedLinear(torch.autograd.Function):
    """A product with a short side of ``rank`` runs several times faster with the long side last.

    Everything that has ``rank`` columns is therefore computed as its transpose, and the adapter's part of the input's
    gradient is added inside the second product instead of in a pass of its own.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        flat = x.reshape(-1, x.shape[-1])
        xA = A @ flat.t()
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        add_product_(out, xA.t(), B.t(), scale)
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
        dx = add_product_(g @ weight, gB.t(), A).view(x.shape) if x_grad else None
        dW = g.t() @ flat if weight_grad else None
        db = g.sum(0) if bias_grad else None
        dA = gB @ flat if A_grad else None
        dB = ((xA * ctx.scale) @ g).t() if B_grad else None
        return dx, dW, db, dA, dB, None


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``x W^T + b + s (x A^T) B^T``, in one node of the graph where dtypes agree and nothing else intervenes."""
    if x.dtype == weight.dtype == A.dtype and not (_transformed() or torch.is_autocast_enabled(x.device.type)):
        return _AdaptedLinear.apply(x, weight, bias, A, B, scale)
    out = F.linear(x, weight, bias)
    return out + adapter_linear(x, A, B, scale).to(out.dtype)


def adapter_linear(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The adapter's part alone, ``s (x A^T) B^T``, in the precision of the factors."""
    return F.linear(F.linear(x.to(A.dtype), A), B * scale)


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
    if not bound < torch.finfo(torch.promote_types(A.dtype, torch.float32)).max:
        raise ValueError(f"{name} must have finite factors, got NaN, Inf or an overflow: the weights stay as they were")
    limit = torch.finfo(weight.dtype).max
    if bound + weight.abs().max().item() >= limit:
        total = torch.addmm(weight.to(A.dtype), B, A, alpha=scale)
        if not (total.abs() <= limit).all():
            raise ValueError(f"{name} makes W + s B A overflow {weight.dtype}: the weights stay as they were")


@torch.no_grad()
def add_low_rank_(weight: Tensor, A: Tensor, B: Tensor, scale: float, master: Tensor | None = None) -> Tensor:
    """``weight += scale * B @ A`` in place: one rank-r product, in float32 where the weight is of half precision.

    Args:
        weight: ``(out, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: ``alpha / r``.
        master: the weight in higher precision; takes the sum, and ``weight`` becomes its rounded copy.

    Returns:
        ``weight``.

    Raises:
        ValueError: the factors are not finite or the sum overflows; ``weight`` is unchanged then.
    """
    check_sum(weight, A, B, scale)
    dtype = torch.promote_types(factor_dtype(weight), A.dtype)
    if master is None and weight.dtype == A.dtype == dtype:
        return add_product_(weight, B, A, scale)
    return round_into_(weight, scale * (B.to(dtype) @ A.to(dtype)), master)


@torch.no_grad()
def round_into_(weight: Tensor, delta: Tensor, master: Tensor | None = None) -> Tensor:
    """``weight += delta`` with the sum in the precision of ``delta`` or of ``master``; warns of what rounding loses."""
    if master is None and weight.dtype == delta.dtype:
        return weight.add_(delta)
    if master is None:
        start = weight.to(delta.dtype)
        total = start + delta
        rounded = total.to(weight.dtype)
        _warn_of_loss(start, total, rounded)
        return weight.copy_(rounded)
    if not torch.equal(master.to(weight.dtype), weight):
        master.copy_(weight)  # somebody loaded other weights since
    return weight.copy_(master.add_(delta))


def _warn_of_loss(start: Tensor, total: Tensor, rounded: Tensor) -> None:
    moved = total != start
    lost = (moved & (rounded == start)).sum().item() / max(moved.sum().item(), 1)
    if lost > 0:
        warnings.warn(
            f"{lost:.0%} of the updates are below half an ulp of {rounded.dtype} and vanish in this merge; "
            "master_dtype=torch.float32 keeps them",
            stacklevel=2,
        )


def numerical_rank(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> int:
    """Rank of the sum of ``B A`` over pairs ``(A, B)``, from the triangles of the stacked factors."""
    if not pairs:
        return 0
    rows = torch.linalg.qr(torch.cat([A for A, _ in pairs]).T).R
    columns = torch.linalg.qr(torch.cat([B for _, B in pairs], 1)).R
    values = torch.linalg.svdvals(columns @ rows.T)
    return int((values > tolerance * values[0]).sum())


def check_ranks(ranks: Sequence[int], limit: float = math.inf) -> tuple[int, ...]:
    """At least one rank, all integers from 1 to the shorter side of the smallest layer."""
    if isinstance(ranks, int) or not len(ranks):
        raise ValueError(f"ranks must hold one rank for each link, got {ranks!r}")
    if not all(isinstance(r, int) and not isinstance(r, bool) and 1 <= r <= limit for r in ranks):
        raise ValueError(f"ranks must be integers in [1, {limit}], got {tuple(ranks)}")
    return tuple(ranks)


# --- the layer


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
    if alpha is not None:
        check_number("alpha", alpha, gt=0)
    check_number("dropout", dropout, ge=0, lt=1)
    check_choice("init", init, INITS)
    if master_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"master_dtype must be torch.float32, torch.float64 or None, got {master_dtype}")


# --- adapters into a model, and back to plain layers


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
        r: rank of every adapter.
        alpha: the scale is ``alpha / r``; ``None`` means a scale of 1.
        dropout: on the adapters' inputs while training, in [0, 1).
        init: see :class:`LoRALinear`.
        modules_to_save: endings of the names of modules that go on training in full, such as a task head.
        generator: stream for the factors ``A``.
        master_dtype: see :class:`LoRALinear`.
        merge_on_eval: see :class:`LoRALinear`.
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
    check_targets(model, names, r, allow_tied)
    if clash := sorted(set(names) & set(kept)):
        raise ValueError(f"target_modules and modules_to_save must not overlap, got {clash} in both")
    model.requires_grad_(False)
    for name in kept:
        model.get_submodule(name).requires_grad_(True)
    wrapped: dict[nn.Module, LoRALinear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if layer not in wrapped:
            wrapped[layer] = LoRALinear(layer, r, alpha, dropout, init, generator, master_dtype, merge_on_eval)
        model.set_submodule(name, wrapped[layer])
    return names


def remove_lora(model: nn.Module) -> nn.Module:
    """Put the frozen layers back in the place of their adapters, which are lost unless merged before."""
    adapters = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)]
    for name, layer in adapters:
        model.set_submodule(name, layer.base)
    return model


def find_modules(model: nn.Module, patterns: str | Sequence[str], argument: str) -> list[str]:
    """Names of the modules that match, in the order of the model; every pattern must match one."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not listed or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f"{argument} must name at least one module, got {patterns!r}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    # Peft's grammar: one string is a regular expression as well, entries of a list are endings.
    hits = {p: [n for n in names if _matches(n, p, isinstance(patterns, str))] for p in listed}
    for pattern, found in hits.items():
        if not found:
            raise ValueError(f"{argument} must match a module, got {pattern!r}; {near(pattern, names)}")
    return [name for name in names if any(name in found for found in hits.values())]


def _matches(name: str, pattern: str, regular: bool) -> bool:
    ending = name == pattern or name.endswith("." + pattern)
    return ending or (regular and re.fullmatch(pattern, name) is not None)


def check_targets(model: nn.Module, names: list[str], r: int, allow_tied: bool) -> None:
    """Every target is a plain linear layer of sufficient size whose weight nobody else uses."""
    for name in names:
        check_base(model.get_submodule(name), name)
        check_rank(r, model.get_submodule(name))
    if not allow_tied:
        check_untied(model, [f"{name}.weight" for name in names])


def check_untied(model: nn.Module, weights: list[str]) -> None:
    """Refuse weights whose memory another parameter or buffer shares, in whole or in part."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors if t.nbytes and t.data_ptr()}
    for weight in filter(spans.__contains__, weights):
        start, end = spans[weight]
        shared = [name for name, (a, b) in spans.items() if name != weight and a < end and start < b]
        if shared:
            raise AdapterError(
                f"{weight} is tied to {shared[0]}: a merge would change both, allow_tied=True accepts that"
            )


def restore_flags(model: nn.Module, flags: dict[str, bool]) -> nn.Module:
    """Give back the ``requires_grad`` flags, by name, and drop gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        parameter.grad = None
    return model
