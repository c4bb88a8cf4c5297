"""What all handles share: choosing layers, reading masks, checkpoint and rewind, folding into a plain model."""

import fnmatch
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .sparse import sparsify_linears


def select_layers(
    model: nn.Module,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
) -> dict[str, nn.Module]:
    """Layers of ``model`` whose ``weight`` can be masked, by name.

    Args:
        model: any module.
        include: types of layers to take.
        exclude: names (``"head"``, patterns such as ``"*downsample*"``) and types to leave out.

    Returns:
        Name to layer, in the model's order; the name of the model itself is ``""``.

    Raises:
        ValueError: nothing matches, a weight is parametrised already, not initialised, or shared by two layers.

    Reference: savarese2020winning

    >>> list(select_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), exclude=["2"]))
    ['0']
    """
    exclude = list(exclude)
    names = [item for item in exclude if isinstance(item, str)]
    types = tuple(item for item in exclude if not isinstance(item, str))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, include)
        and not isinstance(layer, types)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
    }
    if not layers:
        raise ValueError(f"include must match at least one layer of {type(model).__name__}, got none")
    check_plain(layers)
    return layers


def check_plain(layers: Mapping[str, nn.Module]) -> None:
    """Raise unless every layer has an initialised ``weight`` of its own without a parametrisation.

    Args:
        layers: name to layer.

    Raises:
        ValueError: no weight, parametrised already, not initialised, or shared by two layers.

    Reference: savarese2020winning

    >>> check_plain({"fc": nn.Linear(2, 1)})
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"layer {name!r} must have a plain weight, got one that is parametrised already")
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise ValueError(f"layer {name!r} must have a parameter named weight, got {type(layer).__name__}")
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} must be initialised, run the model once before")
        if id(layer.weight) in owners:
            raise ValueError(f"layers must not share weights, got {owners[id(layer.weight)]!r} and {name!r}")
        owners[id(layer.weight)] = name


def warn_dead(masks: dict[str, Tensor]) -> None:
    """Warn once for each layer whose mask keeps nothing: the network's output no longer depends on its input there.

    Args:
        masks: name to bool mask.

    Reference: savarese2020winning

    >>> warn_dead({"head": torch.tensor([True])})
    """
    for name, mask in masks.items():
        if not mask.any():
            warnings.warn(f"layer {name!r} is dead: its mask keeps no weight (see min_keep)", stacklevel=3)


class GatedLayers:
    """A model with one parametrised ``weight`` per chosen layer; base of the handles, not made directly.

    Args:
        model: the model, changed in place.
        gates: layer's name to the parametrisation to register on its weight.

    Reference: savarese2020winning

    >>> from effnb.compress import apply_masks
    >>> isinstance(apply_masks(nn.Linear(2, 1), {"": torch.tensor([[True, False]])}), GatedLayers)
    True
    """

    def __init__(self, model: nn.Module, gates: dict[str, nn.Module]) -> None:
        self.model, self.gates = model, gates
        self.layers = {name: model.get_submodule(name) for name in gates}
        self._saved: dict[str, Tensor] | None = None
        for name, gate in gates.items():
            parametrize.register_parametrization(self.layers[name], "weight", gate)
            self.layers[name].parametrizations.train(self.layers[name].training)

    def _alive(self) -> None:
        if not self.gates:
            raise RuntimeError("the handle is finished: finalize() has removed the gates from the model")

    def weights(self) -> dict[str, Tensor]:
        """Raw weights (before the gate), name to parameter."""
        self._alive()
        return {name: layer.parametrizations.weight.original for name, layer in self.layers.items()}

    def masks(self) -> dict[str, Tensor]:
        """Binary masks, name to bool tensor of the weight's shape."""
        self._alive()
        return {name: gate.mask() for name, gate in self.gates.items()}

    def per_layer(self) -> dict[str, float]:
        """Fraction of weights that each layer's mask keeps."""
        return {name: float(mask.float().mean()) for name, mask in self.masks().items()}

    def density(self) -> float:
        """Fraction of weights kept, over all masked layers."""
        masks = self.masks().values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def _plain_key(self, key: str) -> str | None:
        head, found, tail = key.partition("parametrizations.weight.")
        if not found or head.removesuffix(".") not in self.layers:
            return key
        return f"{head}weight" if tail == "original" else None

    def plain_state(self) -> dict[str, Tensor]:
        """Copy of the model's parameters and buffers under the names they have without gates; gates left out."""
        self._alive()
        pairs = ((self._plain_key(key), value) for key, value in self.model.state_dict().items())
        return {key: value.detach().clone() for key, value in pairs if key is not None}

    def checkpoint(self) -> None:
        """Remember all weights, biases and buffers (not the gates) for :meth:`rewind`."""
        self._saved = self.plain_state()

    @property
    def has_checkpoint(self) -> bool:
        """Whether :meth:`checkpoint` was called."""
        return self._saved is not None

    def rewind(self) -> None:
        """Put back what :meth:`checkpoint` saved; the gates stay as they are. Use a new optimiser afterwards."""
        self._alive()
        if self._saved is None:
            raise RuntimeError("rewind() needs checkpoint() to be called before")
        state = self.model.state_dict()
        for key in state:
            if (plain := self._plain_key(key)) is not None:
                state[key] = self._saved[plain]
        self.model.load_state_dict(state)

    def finalize(self, sparse: bool = False) -> nn.Module:
        """Fold the masks into the weights and take the gates off; the handle is used up.

        Args:
            sparse: also turn every masked ``nn.Linear`` into a CSR layer for inference.

        Returns:
            The plain model: the same object, or the new layer where the model itself is a Linear and ``sparse``.
        """
        warn_dead(self.masks())
        for layer in self.layers.values():
            with torch.no_grad():
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        names, self.gates, self.layers = list(self.gates), {}, {}
        return sparsify_linears(self.model, names) if sparse else self.model
