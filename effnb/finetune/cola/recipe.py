"""The paper's setting as a command: a causal language model, prompts with verbalised answers, LoRA against a chain.

    python -m effnb.finetune.cola.recipe --model facebook/opt-1.3b --train rte.jsonl --test rte-test.jsonl

Every line of a data file is ``{"prompt": "...", "choices": [" Yes", " No"], "label": 0}``. Equal total steps for every
number of links. Needs the extra ``llm`` and, at the paper's scale, a GPU.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnb.finetune.cola.chain import ChainOfLoRA, fit_chain, linear_decay


def read_examples(path: str | Path) -> list[dict[str, Any]]:
    """The examples of a file of JSON lines; raises ``ValueError`` with the line where one is malformed."""
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        example = json.loads(line)
        if not {"prompt", "choices", "label"} <= example.keys() or not 0 <= example["label"] < len(example["choices"]):
            raise ValueError(f"{path}, line {number}: must hold prompt, choices and a label among them, got {line}")
        examples.append(example)
    return examples


def encode(tokenizer: Any, pairs: list[tuple[str, str]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and a mask of the answers' tokens, padded on the right."""
    columns = []
    for prompt, answer in pairs:
        p, a = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        columns.append(torch.tensor([p + a, [1] * len(p + a), [0] * len(p) + [1] * len(a)]).T)
    ids, mask, answered = nn.utils.rnn.pad_sequence(columns, batch_first=True).to(device).unbind(2)
    return ids, mask, answered


def answer_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of every answer's tokens, ``(batch,)``."""
    ids, mask, answered = batch
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weights = answered[:, 1:]
    return (losses * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, examples: list[dict[str, Any]], batch_size: int) -> float:
    """Share of the examples whose right choice has the lowest loss, in percent."""
    device, hits = next(model.parameters()).device, 0
    model.eval()
    for example in examples:
        pairs = [(example["prompt"], choice) for choice in example["choices"]]
        parts = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        losses = torch.cat([answer_losses(model, encode(tokenizer, part, device)) for part in parts])
        hits += int(losses.argmin()) == example["label"]
    return 100 * hits / len(examples)


def train(options: argparse.Namespace, links: int, seed: int) -> float:
    """Test accuracy after ``links`` links with the given total of steps."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    examples, order = read_examples(options.train), torch.Generator().manual_seed(seed)
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=options.targets, task_type="CAUSAL_LM")
    generator = torch.Generator(options.device).manual_seed(seed)
    chain = ChainOfLoRA(model, ranks=(options.rank,) * links, peft_config=config, generator=generator)

    def loss(model: nn.Module, _: int) -> Tensor:
        rows = torch.randint(len(examples), (options.batch_size,), generator=order).tolist()
        pairs = [(examples[i]["prompt"], examples[i]["choices"][examples[i]["label"]]) for i in rows]
        model.train()
        return answer_losses(model, encode(tokenizer, pairs, torch.device(options.device))).mean()

    fit_chain(chain, loss, options.steps, partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.0), linear_decay)
    return accuracy(chain.unload(), tokenizer, read_examples(options.test), options.batch_size)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Parse the command line, train every number of links on every seed, print and return the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="facebook/opt-1.3b", help="name or folder of a causal language model")
    parser.add_argument("--train", required=True, help="JSON lines; the paper takes 1000 examples a task")
    parser.add_argument("--test", required=True, help="JSON lines")
    parser.add_argument("--links", type=int, nargs="+", default=[1, 2, 3], help="chain lengths, 1 is LoRA")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--steps", type=int, default=625, help="in all, for every number of links")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    results = {}
    for links in options.links:
        results[f"links={links}"] = [train(options, links, seed) for seed in options.seeds]
        print(f"links={links}: {[round(a, 2) for a in results[f'links={links}']]}", flush=True)
    return results


if __name__ == "__main__":
    main()
