"""Where a chain keeps its adapters: in layers of ours."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from effnb.finetune.cola.inject import inject_lora, remove_lora
from effnb.finetune.cola.lora import LoRALinear
from effnb.finetune.cola.merge import check_sum


class InjectedAdapters:
    """The adapters of :func:`inject_lora`, as a chain sees them."""

    def __init__(self, model: nn.Module, targets: str | Sequence[str], rank: int, scale: float, **options: Any) -> None:
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.names = inject_lora(model, targets, rank, scale * rank, **options)
        self.model = model
        self.limit = min(min(layer.in_features, layer.out_features) for layer in self._layers().values())

    def _layers(self) -> dict[str, LoRALinear]:
        layers = {name: self.model.get_submodule(name) for name in self.names}
        return {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}

    def weights(self) -> dict[str, Tensor]:
        """The frozen weight of every adapted layer."""
        return {name: layer.base.weight for name, layer in self._layers().items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """``A``, ``B`` and the scale of every adapted layer."""
        return {name: (layer.A, layer.B, layer.scale) for name, layer in self._layers().items()}

    def merge(self) -> None:
        """Add every update to its frozen weight; all or none."""
        layers = self._layers()
        for name, layer in layers.items():
            check_sum(layer.base.weight, layer.A, layer.B, layer.scale, name)
        for layer in layers.values():
            layer.merge_()

    def start(self, rank: int) -> None:
        """New factors of the given rank at the same scale."""
        for layer in dict.fromkeys(self._layers().values()):
            layer.reset_(rank)

    def unload(self) -> nn.Module:
        """The model with plain layers and the ``requires_grad`` flags that it came with."""
        remove_lora(self.model)
        return restore_flags(self.model, self.flags)


def restore_flags(model: nn.Module, flags: dict[str, bool]) -> nn.Module:
    """Give back the ``requires_grad`` flags, by name, and drop gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        parameter.grad = None
    return model
