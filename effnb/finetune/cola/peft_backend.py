"""Where a chain keeps its adapters: in peft's layers, with or without taking them out between two links."""

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effnb.common import check_number
from effnb.finetune.cola.lora import AdapterError, check_base, check_untied, draw_factors_, restore_flags, round_into_

# Options of peft with which the update is not s B A, or the start is not the base model.
REFUSED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters")
ADAPTER, PREFIX = "default", "base_model.model."


class PeftAdapters:
    """Adapters of ``peft.get_peft_model``, reset in place or merged, unloaded and wrapped again at every knot.

    ``parts``, ``merge``, ``start`` and ``unload`` are those of ``InjectedAdapters``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        rank: int,
        scale: float,
        in_place: bool,
        generator: Generator | None,
        master_dtype: torch.dtype | None,
        allow_tied: bool,
    ) -> None:
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.config, self.scale = config, scale
        self.in_place, self.generator, self.master_dtype = in_place, generator, master_dtype
        self.masters: dict[str, Tensor] = {}
        self._wrap(model, rank, drawn_by_peft=generator is None)
        self.names = list(self._layers())
        try:
            self._check_layers(allow_tied)
        except Exception:
            restore_flags(_strip(self.model.unload()), self.flags)
            raise

    def _wrap(self, model: nn.Module, rank: int, drawn_by_peft: bool = False) -> None:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[], enabled=not drawn_by_peft):  # drawn below, alike in both variants
            self.model = get_peft_model(model, self._config(rank), adapter_name=ADAPTER)
        if not drawn_by_peft:
            self._draw()

    def _config(self, rank: int) -> Any:
        config = copy.deepcopy(self.config)
        alpha = self.scale * (math.sqrt(rank) if config.use_rslora else rank)
        config.r, config.lora_alpha = rank, int(alpha) if float(alpha).is_integer() else alpha
        return config

    def _draw(self) -> None:
        init = "kaiming" if self.config.init_lora_weights is True else "gaussian"
        for layer in self._layers().values():
            if self.generator is None:
                layer.reset_lora_parameters(ADAPTER, self.config.init_lora_weights)
            else:
                draw_factors_(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, init, self.generator)

    def _layers(self) -> dict[str, nn.Module]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {n.removeprefix(PREFIX): m for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def _check_layers(self, allow_tied: bool) -> None:
        from peft.tuners.lora.layer import Linear
        from transformers.pytorch_utils import Conv1D

        for name, layer in self._layers().items():
            check_base(layer.get_base_layer(), name, (nn.Linear, Conv1D))
            if type(layer) is not Linear or getattr(layer, "lora_variant", None):
                raise AdapterError(f"{name} must carry peft's plain LoRA, got {type(layer).__name__}")
        if not allow_tied:
            check_untied(self.model, [f"{PREFIX}{name}.base_layer.weight" for name in self.names])

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor, float]]:
        found = {}
        for name, layer in self._layers().items():
            weight = layer.get_base_layer().weight
            factors = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            found[name] = weight.t() if layer.fan_in_fan_out else weight, *factors, layer.scaling[ADAPTER]
        return found

    @torch.no_grad()
    def merge(self) -> None:
        if self.in_place or self.master_dtype:
            for name, layer in self._layers().items():
                weight = layer.get_base_layer().weight
                if self.master_dtype and name not in self.masters:
                    self.masters[name] = weight.detach().to(self.master_dtype, copy=True)
                round_into_(weight, layer.get_delta_weight(ADAPTER), self.masters.get(name))
                layer.lora_B[ADAPTER].weight.zero_()
        if not self.in_place:
            self.model = _strip(self.model.merge_and_unload())

    @torch.no_grad()
    def start(self, rank: int) -> None:
        if not self.in_place:
            self._wrap(self.model, rank)
            return
        config = self.model.peft_config[ADAPTER] = self._config(rank)
        for layer in self._layers().values():
            A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            A.weight.grad = B.weight.grad = None
            if rank != layer.r[ADAPTER]:
                A.weight = nn.Parameter(A.weight.new_empty(rank, A.in_features))
                B.weight = nn.Parameter(B.weight.new_empty(B.out_features, rank))
                A.out_features = B.in_features = layer.r[ADAPTER] = rank
                layer.lora_alpha[ADAPTER] = config.lora_alpha
        self._draw()

    def unload(self) -> None:
        if self._layers():
            self.model = _strip(self.model.unload())
        restore_flags(self.model, self.flags)


def _strip(model: nn.Module) -> nn.Module:
    if hasattr(model, "peft_config"):  # older peft leaves it behind and then warns of a second adapter
        del model.peft_config
    return model


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
