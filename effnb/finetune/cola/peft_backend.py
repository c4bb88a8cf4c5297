"""Where a chain keeps its adapters: in peft's layers, with or without taking them out between two links."""

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effnb.common import check_number
from effnb.finetune.cola.lora import (
    AdapterError,
    check_base,
    check_sum,
    check_untied,
    draw_factors_,
    restore_flags,
    round_into_,
)

# Options of peft with which the update is not s B A, or the start is not the base model.
REFUSED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")
ADAPTER = "default"


class PeftAdapters:
    """Adapters of ``peft.get_peft_model``, reset in place or merged, unloaded and wrapped again at every knot."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        rank: int,
        scale: float,
        in_place: bool = True,
        generator: Generator | None = None,
        master_dtype: torch.dtype | None = None,
        allow_tied: bool = False,
    ) -> None:
        check_config(model, config)
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.config, self.scale = config, scale
        self.in_place, self.generator, self.master_dtype = in_place, generator, master_dtype
        self.masters: dict[str, Tensor] = {}
        self.model = self._wrap(model, rank, first=True)
        try:
            self._check_layers(allow_tied)
        except Exception:
            restore_flags(self._strip(self.model.unload()), self.flags)
            raise
        self.names = [self._short(name) for name in self._layers()]
        self.limit = min(min(layer.in_features, layer.out_features) for layer in self._layers().values())

    def _wrap(self, model: nn.Module, rank: int, first: bool = False) -> nn.Module:
        from peft import get_peft_model

        own = first and self.generator is None
        with torch.random.fork_rng(devices=[], enabled=not own):  # the start is drawn below, the same in both variants
            wrapped = get_peft_model(model, self._config(rank), adapter_name=ADAPTER)
        if not own:
            self._draw(wrapped)
        return wrapped

    def _config(self, rank: int) -> Any:
        config = copy.deepcopy(self.config)
        alpha = self.scale * (math.sqrt(rank) if config.use_rslora else rank)
        config.r, config.lora_alpha = rank, int(alpha) if float(alpha).is_integer() else alpha
        return config

    def _draw(self, model: nn.Module) -> None:
        init = "kaiming" if self.config.init_lora_weights is True else "gaussian"
        for layer in self._layers(model).values():
            if self.generator is None:
                layer.reset_lora_parameters(ADAPTER, self.config.init_lora_weights)
            else:
                draw_factors_(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, init, self.generator)

    def _layers(self, model: nn.Module | None = None) -> dict[str, nn.Module]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {
            n: m for n, m in (self.model if model is None else model).named_modules() if isinstance(m, BaseTunerLayer)
        }

    def _short(self, name: str) -> str:
        return name.removeprefix("base_model.model.")

    def _check_layers(self, allow_tied: bool) -> None:
        from peft.tuners.lora.layer import Linear
        from transformers.pytorch_utils import Conv1D

        layers = self._layers()
        for name, layer in layers.items():
            check_base(layer.get_base_layer(), self._short(name), (nn.Linear, Conv1D))
            if type(layer) is not Linear or getattr(layer, "lora_variant", None):
                raise AdapterError(f"{self._short(name)} must carry peft's plain LoRA, got {type(layer).__name__}")
        if not allow_tied:
            check_untied(self.model, [f"{name}.base_layer.weight" for name in layers])

    def weights(self) -> dict[str, Tensor]:
        """The frozen weight of every adapted layer, ``(out, in)``."""
        bases = {name: (layer.get_base_layer().weight, layer) for name, layer in self._layers().items()}
        return {self._short(n): w.t() if layer.fan_in_fan_out else w for n, (w, layer) in bases.items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """``A``, ``B`` and the scale of every adapted layer."""
        return {
            self._short(name): (m.lora_A[ADAPTER].weight, m.lora_B[ADAPTER].weight, m.scaling[ADAPTER])
            for name, m in self._layers().items()
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Add every update to its frozen weight; all or none."""
        weights = self.weights()
        for name, (A, B, scale) in self.factors().items():
            check_sum(weights[name], A, B, scale, name)
        if self.in_place or self.master_dtype:
            for name, layer in self._layers().items():
                round_into_(layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER), self._master(name, layer))
                layer.lora_B[ADAPTER].weight.zero_()
        if not self.in_place:
            self.model = self._strip(self.model.merge_and_unload())

    def _master(self, name: str, layer: nn.Module) -> Tensor | None:
        weight = layer.get_base_layer().weight
        if self.master_dtype and name not in self.masters:
            self.masters[name] = weight.detach().to(self.master_dtype, copy=True)
        return self.masters.get(name)

    def _strip(self, model: nn.Module) -> nn.Module:
        if hasattr(model, "peft_config"):  # older peft leaves it behind and then warns of a second adapter
            del model.peft_config
        return model

    @torch.no_grad()
    def start(self, rank: int) -> None:
        """New factors of the given rank at the same scale."""
        if not self.in_place:
            self.model = self._wrap(self.model, rank)
            return
        self.model.peft_config[ADAPTER] = self._config(rank)
        for layer in self._layers().values():
            resize(layer, rank, self.model.peft_config[ADAPTER].lora_alpha)
        self._draw(self.model)

    def unload(self) -> nn.Module:
        """The model with plain layers and the ``requires_grad`` flags that it came with."""
        if self._layers():
            self.model = self._strip(self.model.unload())
        return restore_flags(self.model, self.flags)


def resize(layer: nn.Module, rank: int, alpha: float) -> None:
    """Give peft's layer factors of another rank; the scale stays. Gradients are dropped."""
    A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    A.weight.grad = B.weight.grad = None
    if rank != layer.r[ADAPTER]:
        A.weight = nn.Parameter(A.weight.new_empty(rank, A.in_features))
        B.weight = nn.Parameter(B.weight.new_empty(B.out_features, rank))
        A.out_features = B.in_features = layer.r[ADAPTER] = rank
        layer.lora_alpha[ADAPTER] = alpha


def check_config(model: nn.Module, config: Any) -> None:
    """Refuse what is no plain LoRA, and a model that carries adapters already."""
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("a chain with peft_config needs peft: pip install 'effnb[llm]'") from error
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"peft_config must be a peft.LoraConfig, got {type(config).__name__}")
    if config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(f"peft_config.init_lora_weights must be True or 'gaussian', got {config.init_lora_weights!r}")
    if wrong := [name for name in REFUSED if getattr(config, name, None)]:
        raise ValueError(f"peft_config must be plain LoRA, got {wrong[0]}={getattr(config, wrong[0])!r}")
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError("model must carry no peft adapter, got one that does: merge_and_unload it first")


def scale_of(config: Any) -> float:
    """The scale that peft derives from a config."""
    check_number("alpha", config.lora_alpha, gt=0)
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
