"""What methods that gate weights share: choosing layers, one gate per weight, rewinding, folding, the decay guard."""

import functools
import warnings
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from effnb.common import find_modules


def select_layers(
    model: nn.Module,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Iterable[str | type[nn.Module]] = (),
) -> dict[str, nn.Module]:
    """Return the layers of ``model`` whose ``weight`` can be gated, by name (``""`` the model itself), in its order.

    Args:
        model: any module.
        include: types of layers to take.
        exclude: names (``"head"``, patterns such as ``"*downsample*"``) and types to leave out. A name must match a
            layer of ``include``; a type may match none.

    Raises:
        TypeError: ``exclude`` holds something else.
        ValueError: nothing is left, an excluded name without a match, or a weight that is parametrised already, not
            initialised, or shared by two layers.

    >>> list(select_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), exclude=["2"]))
    ['0']
    """
    exclude = [exclude] if isinstance(exclude, str | type) else list(exclude)
    names = [item for item in exclude if isinstance(item, str)]
    types = tuple(item for item in exclude if not isinstance(item, str))
    if not all(isinstance(item, type) for item in types):
        raise TypeError(f"exclude must hold names and types of layers, got {exclude}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, include)}
    if layers:
        # By identity: a layer that stands in the model twice is left out under either name.
        out = {id(model.get_submodule(n)) for n in find_modules(model, names, "exclude", endings=False, kinds=include)}
        layers = {n: layer for n, layer in layers.items() if not isinstance(layer, types) and id(layer) not in out}
    if not layers:
        raise ValueError(f"include must match at least one layer of {type(model).__name__}, got none")
    check_plain(layers)
    return layers


def check_plain(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless every layer has an initialised ``weight`` of its own without a parametrisation."""
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


def shuffled(values: Tensor, generator: Generator) -> Tensor:
    """Return the entries in random order, in the same shape; one seed gives one order on every device."""
    order = torch.randperm(values.numel(), generator=generator, device=generator.device)
    return values.reshape(-1)[order.to(values.device)].view(values.shape)


class GatedLayers:
    """A model with one gate (a parametrisation) on the ``weight`` of each chosen layer; base of the handles.

    A subclass whose gates learn says in ``decay_harm`` what weight decay does to them ("on gate scores drives ..."), in
    ``is_fixed`` whether they have stopped learning, and calls :func:`watch_decay`.

    Args:
        model: the model, changed in place.
        gates: layer's name to the parametrisation to register on its weight.
    """

    decay_harm = "on the parameters of gates pulls them to 0"
    is_fixed = False

    def __init__(self, model: nn.Module, gates: Mapping[str, nn.Module]) -> None:
        self.model, self._gates = model, dict(gates)
        self.layers = {name: model.get_submodule(name) for name in gates}
        self._saved: dict[str, Tensor] | None = None
        for name, gate in gates.items():
            parametrize.register_parametrization(self.layers[name], "weight", gate)
            # torch makes the new list of parametrisations in training mode, whatever the layer's mode is.
            self.layers[name].parametrizations.train(self.layers[name].training)

    @property
    def is_finished(self) -> bool:
        """Whether :meth:`finalize` has taken the gates off."""
        return not self._gates

    @property
    def gates(self) -> dict[str, nn.Module]:
        """Layer's name to its gate; RuntimeError once the handle is finished, as in everything that needs gates."""
        if self.is_finished:
            raise RuntimeError("the handle is finished: finalize() has removed the gates from the model")
        return self._gates

    def weights(self) -> dict[str, Tensor]:
        """Raw weights (before the gate), name to parameter."""
        return {name: self.layers[name].parametrizations.weight.original for name in self.gates}

    def gate_parameters(self) -> list[nn.Parameter]:
        """What the gates learn; for an optimiser group **without** weight decay."""
        return [p for gate in self.gates.values() for p in gate.parameters()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters of the model: weights, biases, normalisation, layers without a gate."""
        known = {id(p) for p in self.gate_parameters()}
        return [p for p in self.model.parameters() if id(p) not in known]

    def param_groups(self, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0) -> list[dict]:
        """Groups for one optimiser: weights (with decay); what gates learn (without, at ``gate_lr`` or else ``lr``)."""
        groups = [{"params": self.weight_parameters(), "lr": lr, "weight_decay": weight_decay}]
        if scores := self.gate_parameters():
            groups.append({"params": scores, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0})
        return groups

    def _plain_names(self) -> dict[str, str]:
        """Names in ``state_dict`` to those without gates; what belongs to a gate left out."""
        gated = {f"{name}.parametrizations.weight.".removeprefix(".") for name in self.gates}
        names = {}
        for key in self.model.state_dict():
            head, found, tail = key.partition("parametrizations.weight.")
            if head + found not in gated:
                names[key] = key
            elif tail == "original":
                names[key] = f"{head}weight"
        return names

    def plain_state(self) -> dict[str, Tensor]:
        """Copy of the model's parameters and buffers under the names they have without gates; gates left out."""
        state = self.model.state_dict()
        return {plain: state[key].detach().clone() for key, plain in self._plain_names().items()}

    def checkpoint(self) -> None:
        """Remember all weights, biases and buffers (not the gates) for :meth:`rewind`."""
        self._saved = self.plain_state()

    @property
    def saved_state(self) -> dict[str, Tensor]:
        """What the last :meth:`checkpoint` saved; RuntimeError if there was none."""
        if self._saved is None:
            raise RuntimeError("there is nothing to go back to: call handle.checkpoint() at the rewind point")
        return self._saved

    @property
    def has_checkpoint(self) -> bool:
        """Whether :meth:`checkpoint` was called."""
        return self._saved is not None

    def rewind(self) -> None:
        """Put back what :meth:`checkpoint` saved; the gates stay as they are. Use a new optimiser afterwards."""
        saved = {key: self.saved_state[plain] for key, plain in self._plain_names().items()}
        # The gates' own entries come from the model, so that `load_state_dict` stays strict.
        self.model.load_state_dict({**self.model.state_dict(), **saved})

    def finalize(self) -> nn.Module:
        """Fold the gates into the weights and take them off; the handle is finished. Returns the plain model."""
        for name in self.gates:
            layer, shared = self.layers[name], type(self.layers[name])
            # torch will delete the property `weight` from the class, which deep copies of the model share: copy it too.
            layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            with torch.no_grad():
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        self._gates, self.layers = {}, {}
        return self.model


def check_optimizer(handle: GatedLayers, optimizer: Optimizer) -> bool:
    """Warn where ``optimizer`` decays what gates learn, and return whether it holds any of that.

    It runs by itself at an optimiser's first step with the gates.

    Args:
        handle: of a gated model, not finished.
        optimizer: any optimiser; it need not hold gates.

    >>> from effnb.compress import apply_cs
    >>> handle = apply_cs(nn.Linear(2, 1))
    >>> check_optimizer(handle, torch.optim.SGD(handle.param_groups(lr=0.1, weight_decay=1e-4)))
    True
    """
    # By identity: `in` on a list of tensors would compare their entries.
    known = {id(p) for p in handle.gate_parameters()}
    groups = [group for group in optimizer.param_groups if any(id(p) in known for p in group["params"])]
    for group in groups:
        if group.get("weight_decay", 0) > 0:
            warnings.warn(
                f"weight_decay={group['weight_decay']} {handle.decay_harm}; "
                "build the optimiser from handle.param_groups(...)",
                stacklevel=2,
            )
    return bool(groups)


_WATCHED: weakref.WeakSet[GatedLayers] = weakref.WeakSet()


def _look_once(optimizer: Optimizer, *_) -> None:
    for handle in list(_WATCHED):
        # Parameters that no longer learn have no gradient: an optimiser skips them, decay or not.
        if handle.is_finished or (not handle.is_fixed and check_optimizer(handle, optimizer)):
            _WATCHED.discard(handle)


@functools.cache
def _install() -> None:
    # One hook for the life of the process: torch forbids taking hooks off while they run.
    register_optimizer_step_pre_hook(_look_once)


def watch_decay(handle: GatedLayers) -> None:
    """Look for weight decay at the first step of an optimiser that holds the handle's gate parameters; then no more.

    Decay on gates is a silent error. Call it again where a new optimiser is due. The handle is not kept alive.
    """
    _install()
    _WATCHED.add(handle)
