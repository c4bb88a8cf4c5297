"""What unlearning starts from and is compared with: data, losses, training of a subset, prompts, simple baselines."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from effnb.common import check_choice, check_count, check_number, kind
from effnb.models import ViT
from effnb.unlearn.fast_ntk.jacobian import check_model, head_of, resolve

__all__ = ["PromptedViT", "finetune", "max_loss", "random_label", "retain_forget_split", "retrain", "zero_class_row"]

LOSSES = ("mse", "ce")
Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
State = Mapping[str, Tensor] | nn.Module


def batches(data: Batches, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the non-empty batches of a loader, or the one batch of a pair of tensors, with their shapes checked."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    for batch in [data] if pair else data:
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(p, Tensor) for p in batch):
            raise TypeError(f"{name} must be (x, y) tensors or yield such pairs, got {type(batch).__name__}")
        x, y = batch
        if y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{name} must pair n inputs with n labels, got {tuple(x.shape)} and {tuple(y.shape)}")
        if y.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8):
            raise TypeError(f"{name} must have integer labels, got {y.dtype}")
        if len(x):
            yield x, y.long()


def collect(data: Batches, name: str) -> tuple[Tensor, Tensor]:
    """Return all batches of a loader as one pair of tensors; raise if there is none."""
    found = list(batches(data, name))
    if not found:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def check_labels(y: Tensor, outputs: int, name: str) -> None:
    """Raise unless all labels are in ``0..outputs - 1``."""
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
        wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise ValueError(f"{name} must have labels from 0 to {outputs - 1}, got {wrong}")


def _training_data(model: nn.Module, **parts: Batches) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return each part as one pair of tensors, finite and with labels that the model knows, and its outputs."""
    found = [collect(data, name) for name, data in parts.items()]
    check_model(model)
    for (x, _), name in zip(found, parts, strict=True):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    with torch.no_grad():  # the head may be any layer: ask the model for its outputs
        outputs = model(found[0][0][:1]).shape[1]
    for (_, y), name in zip(found, parts, strict=True):
        check_labels(y, outputs, name)
    return found, outputs


def retain_forget_split(x: Tensor, y: Tensor, forget: Tensor | list[int]) -> tuple[tuple, tuple]:
    """Return a data set split by the indices of the samples to forget, ``((x_r, y_r), (x_f, y_f))``.

    The retained pair is in the order of the data, the forgotten one in the order of ``forget``.

    Args:
        x, y: inputs ``(n, ...)`` and labels ``(n,)``.
        forget: distinct indices from 0 to ``n - 1``; none and all of them are both legal.

    Raises:
        TypeError: ``forget`` does not hold integers.
        ValueError: ``x`` and ``y`` differ in length or are empty; an index outside the data or given twice.

    >>> (_, kept), (_, gone) = retain_forget_split(torch.zeros(4, 1), torch.tensor([0, 1, 2, 3]), [2])
    >>> kept.tolist(), gone.tolist()
    ([0, 1, 3], [2])
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be of one length >= 1, got {len(x)} and {len(y)}")
    index = torch.as_tensor(forget)
    if index.numel() and (index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool):
        raise TypeError(f"forget must hold integer indices, got {index.dtype}")
    index = index.long().reshape(-1).to(y.device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(y):
        raise ValueError(f"forget must hold indices from 0 to {len(y) - 1}, got {int(index.min())}..{int(index.max())}")
    if index.unique().numel() < index.numel():
        raise ValueError("forget must hold distinct indices, got one twice")
    # Not by values: the same sample may stand on both sides.
    keep = torch.ones(len(y), dtype=torch.bool, device=y.device).index_fill_(0, index, False)
    return (x[keep], y[keep]), (x[index], y[index])


def targets(y: Tensor, like: Tensor, centred: bool = False) -> Tensor:
    """Return one-hot targets, minus ``1 / K`` if ``centred``."""
    found = F.one_hot(y, like.shape[1]).to(like)
    return found - 1 / like.shape[1] if centred else found


def loss_per_sample(outputs: Tensor, y: Tensor, loss: str, centred: bool = False) -> Tensor:
    """Return ``0.5 |f - t|^2`` (mse) or the cross-entropy (ce) of each sample."""
    if loss == "ce":
        return F.cross_entropy(outputs, y, reduction="none")
    return 0.5 * (outputs - targets(y, outputs, centred)).square().sum(1)


def residual(outputs: Tensor, y: Tensor, loss: str, centred: bool = False) -> Tensor:
    """Return the gradient of the loss with respect to the outputs, ``(n, K)``."""
    if loss == "ce":
        return outputs.softmax(1) - targets(y, outputs)
    return outputs - targets(y, outputs, centred)


def curvature_rows(jac: Tensor, outputs: Tensor, loss: str, hessian: str) -> Tensor:
    """Return rows whose Gram matrix is ``sum_i J_i^T H_i J_i``, ``(n, K, P)``; overwrite ``jac`` where that helps.

    For cross-entropy ``H = diag(p) - p p^T``, whose rows are ``sqrt(p_k) (J_k - sum_l p_l J_l)``.
    """
    if hessian == "identity" or loss == "mse":
        return jac
    p = outputs.softmax(1)
    mean = torch.bmm(p.unsqueeze(1), jac)
    return jac.sub_(mean).mul_(p.sqrt().unsqueeze(2))


def as_mapping(state: State) -> Mapping[str, Tensor]:
    """Return a state dict from a state dict or a model."""
    if isinstance(state, nn.Module):
        return state.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(f"init_state must be a state dict or a model, got {kind(state)}")
    return state


def initial_values(model: nn.Module, names: list[str], init_state: State) -> dict[str, Tensor]:
    """Return the values of the named parameters before fine-tuning, checked against the model."""
    state, known = as_mapping(init_state), dict(model.named_parameters())
    for name in names:
        if name not in state:
            raise ValueError(f"init_state must hold every name of params, got none for {name!r}")
        if state[name].shape != known[name].shape:
            wrong = f"{tuple(state[name].shape)} for {name!r}"
            raise ValueError(f"init_state must have the shapes of the model {tuple(known[name].shape)}, got {wrong}")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"init_state must be finite, got NaN or infinity in {name!r}")
    return {name: state[name].detach().to(known[name].device) for name in names}


@torch.enable_grad()
def descend(
    model, params, objective, n, *, weight_decay, init_state, epochs, lr, momentum, batch_size, seed, from_init=False
) -> nn.Module:
    """Return a copy trained on ``objective(model, indices of n, generator) + weight_decay / 2 |w - w0|^2``.

    The arguments of the public functions are checked here.
    """
    names = resolve(model, params)
    check_number("weight_decay", weight_decay, ge=0)
    check_number("lr", lr, ge=0)
    check_number("momentum", momentum, ge=0, lt=1)
    check_count("epochs", epochs, ge=0)
    check_count("batch_size", batch_size)
    start = initial_values(model, names, init_state)
    made = copy.deepcopy(model).requires_grad_(False)
    leaves = [made.get_parameter(name).requires_grad_() for name in names]
    anchors = [start[name].to(p) for name, p in zip(names, leaves, strict=True)]
    if from_init:  # the rest of the model stays: it is the pre-trained part of any such model
        for p, anchor in zip(leaves, anchors, strict=True):
            p.data.copy_(anchor)
    optimizer = torch.optim.SGD(leaves, lr=float(lr), momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * -(-n // batch_size)))
    # One stream for the order and for what the objective draws: the same seed gives the same order to all baselines
    # that draw nothing, as a fair retraining needs.
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for index in torch.randperm(n, generator=generator).split(batch_size):
            optimizer.zero_grad(set_to_none=False)
            objective(made, index, generator).backward()
            for p, anchor in zip(leaves, anchors, strict=True):
                if p.grad is None:  # the network does not use it; it still decays
                    p.grad = torch.zeros_like(p)
                # Decay towards w0, not by SGD's own towards zero: with that the closed form is wrong.
                p.grad.add_(p.data - anchor, alpha=float(weight_decay))
            optimizer.step()
            schedule.step()
        if not all(torch.isfinite(p).all() for p in leaves):
            hint = f"lower lr ({lr:g}) or the weight of an ascent"
            raise ValueError(f"training must keep weights finite, got NaN or infinity in epoch {epoch + 1}; {hint}")
    made.zero_grad()
    for p, original in zip(made.parameters(), model.parameters(), strict=True):
        p.requires_grad_(original.requires_grad)
    return made


def finetune(
    model: nn.Module,
    params: str | Iterable[str],
    data: Batches,
    *,
    weight_decay: float,
    init_state: State,
    loss: str = "mse",
    epochs: int = 60,
    lr: float = 0.1,
    momentum: float = 0.9,
    batch_size: int = 64,
    seed: int = 0,
    centred: bool = False,
    from_init: bool = False,
) -> nn.Module:
    r"""Return a copy fine-tuned on some data: mean loss :math:`+ \lambda/2\,|w - w_0|^2` over the named parameters.

    The copy stays in eval mode, so running statistics are frozen; SGD with momentum and a cosine schedule down to zero.
    On the retained data this is the baseline *fine-tune*; on all data, with ``from_init``, it makes the original model.

    Args:
        model: in eval mode; where training starts unless ``from_init``. It is not changed.
        params: names of the parameters to train, or a subset for :func:`peft_parameters`.
        data: ``(x, y)`` tensors, or a loader that is read once.
        weight_decay: ``lam`` >= 0, towards ``init_state``.
        init_state: values ``w0`` before fine-tuning, a state dict or a model.
        loss: ``"mse"`` (half the squared distance to one-hot targets) or ``"ce"``.
        centred: targets one-hot minus ``1 / K`` (mse only).
        epochs: passes over the data, >= 0, in an order that follows from ``seed``.
        lr, momentum: of SGD; the rate at the start, >= 0, and a number in [0, 1).
        batch_size: samples a step, >= 1.
        from_init: start from ``init_state`` instead of the model's own values.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, data that are empty or not finite, labels outside ``0..K-1``, a model not
            in eval mode, or weights that become infinite or NaN on the way.

    >>> model, data = nn.Linear(2, 2).eval(), (torch.eye(2), torch.tensor([0, 1]))
    >>> tuned = finetune(model, "head", data, weight_decay=0.0, init_state=model, epochs=200)
    >>> tuned(torch.eye(2)).argmax(1)
    tensor([0, 1])
    """
    check_choice("loss", loss, LOSSES)
    ((x, y),), _ = _training_data(model, data=data)

    def objective(m: nn.Module, index: Tensor, _: Generator) -> Tensor:
        return loss_per_sample(m(x[index]), y[index], loss, centred).mean()

    schedule = {"epochs": epochs, "lr": lr, "momentum": momentum, "batch_size": batch_size, "seed": seed}
    start = {"weight_decay": weight_decay, "init_state": init_state, "from_init": from_init}
    return descend(model, params, objective, len(x), **start, **schedule)


def retrain(model: nn.Module, params: str | Iterable[str], retain: Batches, **options: Any) -> nn.Module:
    """Return a copy tuned anew from ``init_state`` on the retained data: what unlearning should come close to.

    Args:
        model: any model of the same architecture whose parameters outside ``params`` are the pre-trained ones.
        params, retain: see :func:`finetune`; the retained data.
        **options: see :func:`finetune`, ``weight_decay`` and ``init_state`` are required; schedule and seed should be
            those of the original model. The errors are the same.
    """
    return finetune(model, params, retain, **options, from_init=True)


def max_loss(
    model: nn.Module,
    params: str | Iterable[str],
    retain: Batches,
    forget: Batches,
    *,
    alpha: float = 1.0,
    loss: str = "mse",
    centred: bool = False,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    batch_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    r"""Return a baseline: descend on the retained data while ascending on the rest, :math:`L_r - \alpha L_f`.

    Args:
        model, params, loss, centred, lr, momentum, seed: see :func:`finetune`; the fine-tuned model.
        retain, epochs: the retained data and the passes over it, >= 0.
        forget: the samples to forget; a random batch of them goes with every batch of retained ones.
        alpha: weight of the ascent, >= 0; the objective has no minimum where it wins: a long run diverges, and raises.
        batch_size: samples of each kind a step, >= 1.
        **options: ``weight_decay`` and ``init_state``, see :func:`finetune`, also for the errors.

    Reference: golatkar2020forgetting
    """
    check_choice("loss", loss, LOSSES)
    check_number("alpha", alpha, ge=0)
    ((xr, yr), (xf, yf)), _ = _training_data(model, retain=retain, forget=forget)

    def objective(m: nn.Module, index: Tensor, generator: Generator) -> Tensor:
        other = torch.randperm(len(xf), generator=generator)[:batch_size]
        ascent = loss_per_sample(m(xf[other]), yf[other], loss, centred).mean()
        return loss_per_sample(m(xr[index]), yr[index], loss, centred).mean() - alpha * ascent

    schedule = {"epochs": epochs, "lr": lr, "momentum": momentum, "batch_size": batch_size, "seed": seed}
    return descend(model, params, objective, len(xr), **schedule, **options)


def random_label(
    model: nn.Module, params: str | Iterable[str], retain: Batches, forget: Batches, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Return a baseline: each sample to forget gets a label drawn uniformly among the others; fine-tune on all.

    Args:
        model, params: see :func:`finetune`; the fine-tuned model.
        retain, forget: the retained data and the samples to forget.
        seed: of the labels and of the order of the samples.
        **options: see :func:`finetune`; ``weight_decay`` and ``init_state`` are required.

    Raises:
        TypeError: see :func:`finetune`.
        ValueError: see :func:`finetune`; or a model with one output.

    Reference: golatkar2020forgetting
    """
    ((xr, yr), (xf, yf)), classes = _training_data(model, retain=retain, forget=forget)
    if classes < 2:
        raise ValueError(f"model must have at least two outputs, got {classes}")
    # A shift by 1..K-1, modulo K, is uniform over the other classes.
    other = torch.randint(1, classes, yf.shape, generator=torch.Generator().manual_seed(seed)).to(yf.device)
    data = torch.cat([xr, xf]), torch.cat([yr, (yf + other) % classes])
    return finetune(model, params, data, seed=seed, **options)


def zero_class_row(model: nn.Module, label: int) -> nn.Module:
    """Return a trivial baseline: a copy whose head has zeros for one class; it too scores 0 % on a forgotten class.

    Args:
        model: with a linear head (the last linear layer).
        label: the class, from 0.

    Raises:
        TypeError: a ``label`` that is no integer.
        ValueError: no linear layer, or ``label`` outside the head's outputs.

    >>> zero_class_row(nn.Linear(2, 3), 1).weight[1].tolist()
    [0.0, 0.0]
    """
    made = copy.deepcopy(model)
    head = head_of(made)
    check_count("label", label, ge=0, le=head.out_features - 1)
    for p in head.parameters():
        p.data[label] = 0
    return made


class PromptedViT(nn.Module):
    """A vision transformer with prompt tokens behind those of the image, seen by every block.

    The positions of the image's tokens stay as they were, and a class token stays token 0. With mean pooling the
    prompts are left out of the mean.

    Args:
        vit: the transformer, kept as the submodule ``vit``.
        num_prompts: prompt tokens, >= 1.
        std: standard deviation of their initial values, >= 0.
        generator: stream for the prompts; ``None`` draws from torch's global one.

    Raises:
        TypeError: ``vit`` is no ``effnb.models.ViT``.
        ValueError: ``num_prompts`` < 1 or ``std`` < 0.

    Reference: jia2022visual

    >>> from effnb.unlearn import peft_parameters
    >>> model = PromptedViT(ViT(width=16, depth=1), num_prompts=4)
    >>> model(torch.zeros(2, 1, 28, 28)).shape, peft_parameters(model, "prompt+head")
    (torch.Size([2, 10]), ['prompt', 'vit.head.weight', 'vit.head.bias'])
    """

    def __init__(self, vit: ViT, num_prompts: int = 8, std: float = 0.02, generator: Generator | None = None) -> None:
        if not isinstance(vit, ViT):
            raise TypeError(f"vit must be an effnb.models.ViT, got {kind(vit)}")
        check_count("num_prompts", num_prompts)
        check_number("std", std, ge=0)
        super().__init__()
        values = torch.randn(num_prompts, vit.positions.shape[-1], generator=generator) * std
        self.prompt = nn.Parameter(values.to(vit.positions))  # the name is what the subset "prompt" looks for
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(batch, classes)`` for images ``(batch, in_channels, side, side)``."""
        tokens = self.vit.embed(x)
        count = tokens.shape[1]
        tokens = self.vit.blocks(torch.cat([tokens, self.prompt.expand(len(x), -1, -1)], dim=1))
        return self.vit.head(self.vit.pool(tokens[:, :count]))
