"""The learned limit as a parametrisation of a weight: noise while searching, quantiser once the bits are fixed."""

import torch
from torch import Tensor, nn

from .digits import MAX_BITS, bits_from_s, quantize_weight, s_from_bits, steps_per_unit
from .groups import Granularity, Groups
from .noise import check_lam, check_noise, check_scale, draw_noise, perturb_weight


def initial_scale(weight: Tensor, scale: str | float | Tensor = "std", limit: float = 0.0) -> Tensor:
    """The fp32 scale ``a`` of a weight, which then reads ``a * u`` with ``u`` in (-2, 2).

    Args:
        weight: the initial weight.
        scale: ``"std"``, the standard deviation; ``"max"``, the largest magnitude over ``2 - limit``; a number that
            multiplies the standard deviation; or a tensor with the scale itself, which may differ by output channel.
        limit: initial ``sigma``, for ``"max"``.

    Returns:
        Float32 tensor, 0-d unless ``scale`` was a tensor of more entries.

    Raises:
        ValueError: unknown ``scale``, or a scale that is zero, negative or not finite.

    Reference: savarese2022bits

    >>> initial_scale(torch.tensor([-1.0, 1.0, 3.0]), "max", limit=0.5)
    tensor(2.)
    """
    w = weight.detach().double()
    if isinstance(scale, Tensor):
        found = scale.detach()
    elif scale == "max":
        found = w.abs().max() / (2 - limit) if w.numel() else w.new_zeros(())
    elif scale == "std" or (isinstance(scale, int | float) and not isinstance(scale, bool)):
        factor = 1.0 if scale == "std" else float(scale)
        check_scale(factor)
        found = factor * (w.std() if w.numel() > 1 else w.new_zeros(()))
    else:
        raise ValueError(f"scale must be 'std', 'max', a number or a tensor, got {scale!r}")
    found = found.to(torch.float32)
    if not bool(((found > 0) & found.isfinite()).all()):
        raise ValueError(f"scale of a weight of shape {tuple(w.shape)} must be positive and finite, got {found}")
    return found.to(weight.device)


class SmolGate(nn.Module):
    r"""Put trainable noise on a weight, ``W = w + a * sigma(s) * eps``; after :meth:`freeze`, ``W = a * Q(w / a, p)``.

    A parametrisation for :func:`torch.nn.utils.parametrize.register_parametrization`. It keeps the weight ``w = a * u``
    itself as the parameter. A plain learning rate for ``w`` is one of ``lr / a^2`` for ``u``, so that no rate has to
    follow the scale of a layer. In eval mode there is no noise, unless :attr:`sampling` says otherwise.

    Args:
        weight: initial weight.
        init_bits: bits that the limits start from, in (1, 16].
        granularity: which weights share a limit, see :class:`Groups`.
        noise: ``"uniform"`` or ``"rademacher"``.
        lam: penalty fused into the gradient of ``s``, >= 0.
        scale: see :func:`initial_scale`.
        strict: refuse blocks that do not divide the weight.
        generator: stream for the noise; ``None`` for torch's own.

    Raises:
        ValueError: an argument out of range, or a weight without scale.

    Reference: savarese2022bits

    >>> gate = SmolGate(torch.tensor([[-1.0, 1.0]]), init_bits=4)
    >>> gate.average_bits(), gate.eval()(torch.tensor([[0.5, 0.25]]))
    (4.0, tensor([[0.5000, 0.2500]]))
    """

    def __init__(
        self,
        weight: Tensor,
        init_bits: float = 8.0,
        granularity: Granularity = "weight",
        noise: str = "uniform",
        lam: float = 0.0,
        scale: str | float | Tensor = "std",
        strict: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 < init_bits <= MAX_BITS:
            raise ValueError(f"init_bits must be in (1, {MAX_BITS}], got {init_bits}: one bit would be s = inf")
        check_noise(noise)
        check_lam(lam)
        self.groups = Groups(weight.shape, granularity, strict)
        start = s_from_bits(float(init_bits))
        place = {"device": weight.device, "dtype": weight.dtype}
        self.s = nn.Parameter(torch.full(self.groups.shape, start, **place))
        self.register_buffer("scale", initial_scale(weight, scale, 2.0 ** (1 - init_bits)))
        self.register_buffer("bits", torch.zeros(self.groups.shape, dtype=torch.uint8, device=weight.device))
        self.noise, self.lam, self.generator, self.sampling = noise, float(lam), generator, "training"
        self._density: Tensor | float | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether the bits are fixed, and the weight quantised."""
        return bool(self._density is not None)

    def forward(self, w: Tensor) -> Tensor:
        """The effective weight, shape of ``w``."""
        if self.is_frozen:
            return quantize_weight(w, self._density, self.scale.to(w.dtype))
        if self.sampling == "off" or (self.sampling == "training" and not self.training):
            return w
        eps = draw_noise(w.numel(), self.noise, self.generator, w.device)
        return perturb_weight(w, self.s, eps, self.noise, self.groups, self._factor(w), self.lam)

    def _factor(self, w: Tensor) -> float | Tensor:
        # A Python number keeps the fused addcmul at one pass; on a GPU it would wait for the device at every step.
        scale = self.scale.to(w.dtype)
        return float(scale) if scale.ndim == 0 and not scale.is_cuda else scale

    def limits(self) -> Tensor:
        """``sigma(s)`` per group, without gradient."""
        return torch.sigmoid(self.s.detach())

    def penalty(self) -> Tensor:
        """Bits above one, ``sum(n_g * log2(1 + exp(-s_g)))``, with gradient."""
        return ((bits_from_s(self.s) - 1) * self.groups.sizes(self.s)).sum()

    def group_bits(self, rounding: str = "round", p_min: int = 1, p_max: int = 8) -> Tensor:
        """Whole bits per group as uint8: the fixed ones, else ``clamp(round(p(s)), p_min, p_max)``."""
        if self.is_frozen:
            return self.bits
        real = bits_from_s(self.s.detach().double())
        # ceil of a learned 3.0000001 must be 3: s has the precision of a float.
        whole = real.round() if rounding == "round" else (real - 1e-5).ceil()
        return whole.clamp_(p_min, p_max).to(torch.uint8)

    def weight_bits(self) -> Tensor:
        """:meth:`group_bits` for every weight, uint8 of the weight's shape."""
        return self.groups.expand(self.group_bits()).expand(self.groups.full)

    def average_bits(self, real: bool = False) -> float:
        """Mean bits of a weight, whole or (``real=True``) as learned."""
        per_group = bits_from_s(self.s.detach().double()) if real and not self.is_frozen else self.group_bits().double()
        return float((per_group * self.groups.sizes(per_group)).sum()) / max(1, self.groups.numel)

    def freeze(self, bits: Tensor) -> None:
        """Fix whole bits per group (or a tensor that broadcasts to it): quantise from now on, without noise."""
        self.bits.copy_(bits)
        self.s.requires_grad_(False)
        self.s.grad = None
        self._settle()

    def _settle(self) -> None:
        low, high = (int(v) for v in self.bits.aminmax()) if self.bits.numel() else (1, 1)
        dense = steps_per_unit(self.groups.expand(self.bits), self.s)
        self._density = steps_per_unit(low, self.s) if low == high else dense

    @torch.no_grad()
    def clip_(self, w: Tensor) -> None:
        """Clip a weight in place to ``|w| <= a * (2 - sigma)``, where noise cannot leave the range of the codes."""
        limit = torch.full_like(self.s, 2.0) if self.is_frozen else self.limits().neg_().add_(2.0)
        limit = self.groups.expand(limit.to(w.dtype))
        scale = self._factor(w)
        limit = limit.mul_(scale) if isinstance(scale, float) else limit * scale
        torch.minimum(w, limit, out=w)
        torch.maximum(w, limit.neg_(), out=w)

    def get_extra_state(self) -> Tensor:
        """Phase, penalty and noise as one float64 tensor, for ``state_dict``."""
        return torch.tensor([self.is_frozen, self.lam, self.noise == "rademacher"], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        frozen, self.lam, rademacher = state.tolist()
        self.noise = "rademacher" if rademacher else "uniform"
        self.s.requires_grad_(not frozen)
        self._density = None
        if frozen:
            self._settle()

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.s.device)  # stays fp32 when the model is cast: files hold it so
        if self.is_frozen:
            self._settle()
        return self

    def extra_repr(self) -> str:
        """Shape, sharing and average bits."""
        phase = "frozen" if self.is_frozen else self.noise
        return f"{self.groups.full}, {self.groups.granularity}, {phase}, bits={self.average_bits():.2f}"
