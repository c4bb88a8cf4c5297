"""The same learned limits for activations: one per channel, priced by the number of activations."""

import torch
from torch import Tensor, nn

from .digits import quantize_weight
from .gate import SmolGate
from .noise import _Broadcast, draw_noise, perturb_weight


class SmolActivation(SmolGate):
    r"""Clip activations to ``a * (2 - sigma)``, put noise of size ``a * sigma(s_c)`` on channel ``c``, later quantise.

    The penalty counts the activations of one example. Without ``scale`` the first batch in training sets
    ``a = max |x| / 2``. Stays in the model after ``finalize()``, as the quantiser. Note that the format has no code
    for 0: a silent ReLU becomes ``+-a * 2^(1-p)``, a constant that the next layer's bias can take up.

    Args:
        channels: size of dimension ``dim`` of the input.
        init_bits: bits that the limits start from, in (1, 16].
        noise: ``"uniform"`` or ``"rademacher"``.
        lam: fused penalty, >= 0.
        scale: the scale ``a``; ``None`` for the first batch's.
        dim: dimension of the channels.
        generator: stream for the noise.

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
        if channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        start = torch.tensor(1.0 if scale is None else scale)
        super().__init__(torch.ones(channels), init_bits, "weight", noise, lam, start, generator=generator)
        self.dim, self.channels = dim, channels
        self.register_buffer("calibrated", torch.tensor(scale is not None))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Noisy or quantised activations, shape of ``x``."""
        if x.ndim <= self.dim or x.shape[self.dim] != self.channels:
            raise ValueError(f"input must have {self.channels} channels in dimension {self.dim}, got {tuple(x.shape)}")
        if self.training and not self.calibrated:
            self._calibrate(x)
        self.count.fill_(x.numel() // max(1, x.shape[0] * self.channels))
        shape = [self.channels if i == self.dim else 1 for i in range(x.ndim)]
        scale = self.scale.to(x.dtype)
        if self.is_frozen:
            density = self._density.view(shape) if isinstance(self._density, Tensor) else self._density
            return quantize_weight(x, density, scale)
        limit = scale * (2 - self.limits().view(shape))
        clipped = torch.minimum(torch.maximum(x, -limit), limit)
        if self.sampling == "off" or (self.sampling == "training" and not self.training):
            return clipped
        eps = draw_noise(x.numel(), self.noise, self.generator, x.device)
        groups, lam = _Broadcast(x.shape, torch.Size(shape)), self.lam / max(1, x.shape[0])
        return perturb_weight(clipped, self.s.view(shape), eps, self.noise, groups, self._factor(x), lam)

    def _calibrate(self, x: Tensor) -> None:
        largest = float(x.detach().abs().max())
        if not 0 < largest < float("inf"):
            raise ValueError(f"input must have a finite, non-zero activation to set the scale, got {largest}")
        self.scale.fill_(largest / 2)
        self.calibrated.fill_(True)

    def penalty(self) -> Tensor:
        """Bits above one over all activations of one example, with gradient; 0 before the first input."""
        return super().penalty() * self.count


def add_activations(model: nn.Module, channels: dict[str, int], **options) -> dict[str, SmolActivation]:
    """Put a :class:`SmolActivation` behind each named module, in place.

    Args:
        model: any module.
        channels: name of a module to the number of channels of its output.
        **options: further arguments of :class:`SmolActivation`.

    Returns:
        Name to the new layer; the module itself becomes ``nn.Sequential(module, layer)``.

    Raises:
        ValueError: a name that is not in the model.

    Reference: savarese2022bits

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> list(add_activations(model, {"1": 3})), model[1][0]
    (['1'], ReLU())
    """
    known = {name for name, _ in model.named_modules() if name}
    if unknown := sorted(set(channels) - known):
        raise ValueError(f"activations must name modules of the model, got {unknown}")
    added = {}
    for name, count in channels.items():
        parent, _, child = name.rpartition(".")
        owner, module = model.get_submodule(parent), model.get_submodule(name)
        added[name] = SmolActivation(count, **options).train(module.training)
        setattr(owner, child, nn.Sequential(module, added[name]))
    return added
