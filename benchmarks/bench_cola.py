"""COLA side by side: a training step against peft and full fine-tuning, the knots, merged inference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnb.finetune import ChainOfLoRA
from effnb.lab.measure import timing

WIDTHS, LAYERS, TOKENS, RANK = (384, 128, 64), 6, (32, 24), 2
LINKS, STEPS = 4, 240  # of the training run that the knots are compared with


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(LAYERS) for m in (nn.Linear(width, width), nn.GELU())))


def names() -> list[str]:
    return [str(i) for i in range(0, 2 * LAYERS, 2)]


def step(model: nn.Module, x: Tensor) -> Callable:
    """Forward and backward, with the gradients of everything that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model(x).square().mean(), parameters)


def chain(width: int) -> ChainOfLoRA:
    """A chain with factors that are not zero, so that a knot has something to tie."""
    made = ChainOfLoRA(network(width), names(), (RANK,), keep_links=False)
    for layer in made.model[::2]:
        nn.init.normal_(layer.B, std=1e-6)
    return made


def peft_model(width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(network(width), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names()))


def row(name: str, ours: str, peer: str, ratio: object, target: float | None, detail: str) -> dict:
    fields = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target}
    return fields | {"better": "lower", "unit": "x", "detail": detail}


def steps(width: int, pairs: int, block: float) -> list[dict]:
    """Seconds of a step of ours over one of peft, and over one of full fine-tuning."""
    x = torch.randn(*TOKENS, width)
    ours, full = step(chain(width).model, x), step(network(width), x)
    detail = f"{LAYERS} layers {width} x {width} with GELU, {TOKENS[0] * TOKENS[1]} tokens, r = {RANK}"
    try:
        ratio, note = timing.paired_ratio(ours, step(peft_model(width), x), pairs, block), detail
    except ImportError:
        ratio, note = None, "needs the extra llm"
    against_peft = row(f"step against peft, d = {width}", "LoRALinear", "peft LoRA", ratio, 0.85, note)
    ratio, target = timing.paired_ratio(ours, full, pairs, block), 1.0 if width == 384 else None
    name = f"step against full fine-tuning, d = {width}"
    return [against_peft, row(name, "LoRALinear", "all weights", ratio, target, detail)]


def knot(pairs: int, block: float) -> dict:
    """One knot of all layers and the start of the next link, over one training step."""
    width = WIDTHS[0]
    tied, trained = chain(width), chain(width)

    def tie() -> None:
        tied.tie_knot()
        tied.extend()
        for layer in tied.model[::2]:
            layer.B.detach().fill_(1e-9)  # a knot of zeros would warn that the link has not trained

    ratio = timing.paired_ratio(tie, step(trained.model, torch.randn(*TOKENS, width)), pairs, block)
    share = 100 * LINKS * ratio.median / STEPS
    detail = f"{LAYERS} layers, d = {width}; {LINKS} knots are {share:.2g} % of {STEPS} steps"
    return row("knot against one step", "tie_knot and extend", "training step", ratio, 1.0, detail)


def inference(pairs: int, block: float) -> dict:
    width, x = WIDTHS[0], torch.randn(*TOKENS, WIDTHS[0])
    merged, base = chain(width).unload(), network(width)
    with torch.inference_mode():
        ratio = timing.paired_ratio(lambda: merged(x), lambda: base(x), pairs, block)
    return row("merged inference against the base", "unloaded chain", "base model", ratio, 1.03, f"d = {width}")


def run(quick: bool = False) -> list[dict]:
    """All rows; ``quick`` is for tests."""
    pairs, block = (7, 0.002) if quick else (9, 0.2)
    rows = [r for width in (WIDTHS[-1:] if quick else WIDTHS) for r in steps(width, pairs, block)]
    return [*rows, knot(pairs, block), inference(pairs, block)]
