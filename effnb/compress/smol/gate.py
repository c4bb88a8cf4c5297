"""The learned limit as a module: on a weight, or behind a layer on its output; noise first, then the quantiser."""

import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_count, check_number
from effnb.compress.smol.noise import (
    MAX_BITS,
    NOISE_POWER,
    Granularity,
    Groups,
    bits_from_s,
    codes_per_unit,
    draw_noise,
    perturb_weight,
    quantize_weight,
    s_from_bits,
)

__all__ = ["SmolActivation", "SmolGate"]


def initial_scale(weight: Tensor, scale: str | float | Tensor = "std", limit: float = 0.0) -> Tensor:
    """Return the fp32 scale ``a`` of a weight, which then reads ``a * u``, for the ``scale`` of :class:`SmolGate`.

    ``limit`` is the initial ``sigma``, for ``"max"``. The result is 0-d unless ``scale`` was a tensor of more entries.
    """
    w = weight.detach().double()
    if isinstance(scale, Tensor):
        found = scale.detach()
    elif scale == "max":
        found = w.abs().max() / (2 - limit) if w.numel() else w.new_zeros(())
    elif scale == "std" or (isinstance(scale, int | float) and not isinstance(scale, bool)):
        factor = 1.0 if scale == "std" else float(scale)
        check_number("scale", factor, gt=0)
        found = factor * (w.std() if w.numel() > 1 else w.new_zeros(()))
    else:
        raise ValueError(f"scale must be 'std', 'max', a number or a tensor, got {scale!r}")
    found = found.to(torch.float32)
    check_number(f"scale of a weight of shape {tuple(w.shape)}", found, gt=0)
    return found.to(weight.device)


class SmolGate(nn.Module):
    r"""Trainable noise on a weight, ``W = w + a * sigma(s) * eps``; after :meth:`freeze`, ``W = a * Q(w / a, p)``.

    A parametrisation for :func:`torch.nn.utils.parametrize.register_parametrization`. It keeps the weight ``w = a * u``
    itself as the parameter. A plain learning rate for ``w`` is one of ``lr / a^2`` for ``u``, so that no rate has to
    follow the scale of a layer. In eval mode there is no noise, unless :attr:`sampling` says otherwise.

    Args:
        weight: initial weight.
        init_bits: bits that the limits start from, in (1, 16].
        granularity: which weights share a limit: ``"weight"``, ``"filter"`` (output channel), ``"input"`` (channel),
            ``"layer"``, or ``("block", g)`` for ``g`` consecutive weights.
        noise: ``"uniform"`` or ``"rademacher"``.
        lam: penalty fused into the gradient of ``s``, >= 0.
        scale: ``"std"``, the weight's standard deviation; a number that multiplies it; ``"max"``, the largest magnitude
            over ``2 - sigma``; or a tensor with the scale itself, which may differ by output channel.
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
        check_number("init_bits", init_bits, gt=1, le=MAX_BITS)  # one bit would be s = inf
        check_choice("noise", noise, NOISE_POWER)
        check_number("lam", lam, ge=0)
        self.groups = Groups(weight.shape, granularity, strict)
        start = s_from_bits(float(init_bits))
        place = {"device": weight.device, "dtype": weight.dtype}
        self.s = nn.Parameter(torch.full(self.groups.shape, start, **place))
        self.register_buffer("scale", initial_scale(weight, scale, 2.0 ** (1 - init_bits)))
        self.register_buffer("bits", torch.zeros(self.groups.shape, dtype=torch.uint8, device=weight.device))
        self.noise, self.lam, self.generator, self.sampling = noise, float(lam), generator, "training"
        self._per_unit: Tensor | float | None = None  # of the fixed bits, see codes_per_unit; None while searching

    @property
    def is_frozen(self) -> bool:
        """Whether the bits are fixed, and the weight quantised."""
        return self._per_unit is not None

    @property
    def is_noisy(self) -> bool:
        """Whether the next forward pass draws noise."""
        return not self.is_frozen and (self.sampling == "on" or (self.sampling == "training" and self.training))

    def forward(self, w: Tensor) -> Tensor:
        """Return the effective weight, shape of ``w``."""
        if self.is_frozen:
            return quantize_weight(w, self._per_unit, self.scale.to(w.dtype))
        if not self.is_noisy:
            return w
        eps = draw_noise(w.numel(), self.noise, self.generator, w.device)
        return perturb_weight(w, self.s, eps, self.noise, self.groups, self._factor(w), self.lam)

    def _factor(self, w: Tensor) -> float | Tensor:
        """The scale; as a Python number it saves a pass, but on a GPU it would wait for the device at every step."""
        scale = self.scale.to(w.dtype)
        return float(scale) if scale.ndim == 0 and not scale.is_cuda else scale

    def limits(self) -> Tensor:
        """Return ``sigma(s)`` per group, without gradient."""
        return torch.sigmoid(self.s.detach())

    def penalty(self) -> Tensor:
        """Return the bits above one, ``sum(n_g * log2(1 + exp(-s_g)))``, with gradient."""
        return ((bits_from_s(self.s) - 1) * self.groups.sizes(self.s)).sum()

    def group_bits(self, rounding: str = "round", p_min: int = 1, p_max: int = 8) -> Tensor:
        """Return whole bits per group as uint8: the fixed ones, else ``clamp(round(p(s)), p_min, p_max)``."""
        if self.is_frozen:
            return self.bits
        real = bits_from_s(self.s.detach().double())
        # ceil of a learned 3.0000001 must be 3: s has the precision of a float.
        whole = real.round() if rounding == "round" else (real - 1e-5).ceil()
        return whole.clamp_(p_min, p_max).to(torch.uint8)

    def weight_bits(self) -> Tensor:
        """Return :meth:`group_bits` for every weight, uint8 of the weight's shape."""
        return self.groups.expand(self.group_bits()).expand(self.groups.full)

    def average_bits(self, real: bool = False) -> float:
        """Return the mean bits of a weight, whole or (``real=True``) as learned."""
        per_group = bits_from_s(self.s.detach().double()) if real and not self.is_frozen else self.group_bits().double()
        return float((per_group * self.groups.sizes(per_group)).sum()) / max(1, self.groups.numel)

    def freeze(self, bits: Tensor) -> None:
        """Fix whole bits per group (or a tensor that broadcasts to it): quantise from now on, without noise."""
        self.bits.copy_(bits)
        self.s.requires_grad_(False)
        self.s.grad = None
        self._settle()

    def _settle(self) -> None:
        """Prepare the quantiser for :attr:`bits`; one number where all are equal, which is faster."""
        low, high = (int(v) for v in self.bits.aminmax()) if self.bits.numel() else (1, 1)
        self._per_unit = codes_per_unit(low if low == high else self.groups.expand(self.bits), self.s)

    @torch.no_grad()
    def clip_(self, w: Tensor) -> None:
        """Clip a weight in place to ``|w| <= a * (2 - sigma)``, where noise cannot leave the range of the codes."""
        # A tensor of our own in either case, free to be overwritten.
        limit = torch.full_like(self.s, 2.0) if self.is_frozen else self.limits().neg_().add_(2.0)
        limit = self.groups.expand(limit.to(w.dtype))
        scale = self._factor(w)
        limit = limit.mul_(scale) if isinstance(scale, float) else limit * scale
        torch.minimum(w, limit, out=w)
        torch.maximum(w, limit.neg_(), out=w)

    def get_extra_state(self) -> Tensor:
        """Return phase, penalty and noise as one float64 tensor, for ``state_dict``."""
        # A tensor, since torch.load(weights_only=True) takes nothing else.
        return torch.tensor([self.is_frozen, self.lam, self.noise == "rademacher"], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        frozen, self.lam, rademacher = state.tolist()
        self.noise = "rademacher" if rademacher else "uniform"
        self.s.requires_grad_(not frozen)
        self._per_unit = None
        if frozen:
            self._settle()

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.s.device)  # stays fp32 when the model is cast: files hold it so
        if self.is_frozen:
            self._settle()  # no buffer, so that nn.Module does not move it
        return self

    def extra_repr(self) -> str:
        """Return shape, sharing and average bits."""
        phase = "frozen" if self.is_frozen else self.noise
        return f"{self.groups.full}, {self.groups.granularity}, {phase}, bits={self.average_bits():.2f}"


class SmolActivation(SmolGate):
    r"""Activations clipped to ``a * (2 - sigma)``, with noise of size ``a * sigma(s_c)`` on channel ``c``; later codes.

    The penalty counts the activations of one example. Stays in the model after ``finalize()``, as the quantiser. Note
    that the format has no code for 0: a silent ReLU becomes ``+-a * 2^(1-p)``, a constant that the next layer's bias
    can take up.

    Args:
        channels: size of dimension ``dim`` of the input.
        scale: the scale ``a``; ``None``: the first batch in training sets ``a = max |x| / 2``.
        init_bits, noise, lam, generator: as in :class:`SmolGate`.

    Raises:
        ValueError: an argument out of range; an input with another number of channels, or all zero when ``a`` is set.

    Reference: savarese2022bits

    >>> layer = SmolActivation(2, init_bits=4)
    >>> _ = layer(torch.rand(5, 2))
    >>> layer.freeze(torch.tensor([1, 3]))
    >>> len(layer(torch.rand(100, 2))[:, 0].unique())
    1
    """

    def __init__(
        self,
        channels: int,
        init_bits: float = 8.0,
        noise: str = "uniform",
        lam: float = 0.0,
        scale: float | None = None,
        dim: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("channels", channels)
        start = torch.tensor(1.0 if scale is None else scale)
        super().__init__(torch.ones(channels), init_bits, "weight", noise, lam, start, generator=generator)
        self.dim, self.channels = dim, channels
        self.register_buffer("calibrated", torch.tensor(scale is not None))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Return noisy or quantised activations, shape of ``x``."""
        if x.ndim <= self.dim or x.shape[self.dim] != self.channels:
            raise ValueError(f"input must have {self.channels} channels in dimension {self.dim}, got {tuple(x.shape)}")
        if self.training and not self.calibrated:
            largest = float(x.detach().abs().max())
            if not 0 < largest < float("inf"):
                raise ValueError(f"input must have a finite, non-zero activation to set the scale, got {largest}")
            self.scale.fill_(largest / 2)
            self.calibrated.fill_(True)
        self.count.fill_(x.numel() // max(1, x.shape[0] * self.channels))
        shape = [1] * x.ndim
        shape[self.dim] = self.channels
        scale = self.scale.to(x.dtype)
        if self.is_frozen:
            per_unit = self._per_unit.view(shape) if isinstance(self._per_unit, Tensor) else self._per_unit
            return quantize_weight(x, per_unit, scale)
        limit = scale * (2 - self.limits().view(shape))
        clipped = torch.minimum(torch.maximum(x, -limit), limit)
        if not self.is_noisy:
            return clipped
        eps = draw_noise(x.numel(), self.noise, self.generator, x.device)
        # The loss is a mean over the batch, and so must be the penalty, which the groups count over all examples.
        groups, lam = Groups.broadcast(x.shape, shape), self.lam / max(1, x.shape[0])
        return perturb_weight(clipped, self.s.view(shape), eps, self.noise, groups, self._factor(x), lam)

    def penalty(self) -> Tensor:
        """Return the bits above one over all activations of one example, with gradient; 0 before the first input."""
        return super().penalty() * self.count
