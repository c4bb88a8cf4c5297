"""What is left of the forgotten samples: distances to the retrained model, relearning, membership inference."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnb.common import check_choice, check_count, check_number, mode_restored
from effnb.unlearn.fast_ntk.jacobian import flatten, resolve
from effnb.unlearn.fast_ntk.training import LOSSES, Batches, check_labels, collect, loss_per_sample

__all__ = [
    "MembershipInference",
    "RelearnTime",
    "activation_distance",
    "membership_inference",
    "output_distance",
    "parameter_distance",
    "relearn_time",
    "update_cosine",
]


@torch.no_grad()
def outputs_in_eval(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Return outputs ``(n, K)`` in eval mode and without gradients."""
    with mode_restored(model, train=False):
        return torch.cat([model(part) for part in x.split(batch_size)])


def _finite(value: Tensor, what: str) -> float:
    """Return a number; raise if NaN or infinity in weights or outputs has spoilt it."""
    if not torch.isfinite(value):
        raise ValueError(f"{what} must be finite, got weights or outputs that make it {float(value)}")
    return float(value)


def _ratio(new: Tensor, target: Tensor, old: Tensor) -> float:
    """Return ``|new - target| / |old - target|``."""
    base = torch.linalg.vector_norm(old - target)
    if base == 0:
        raise ValueError("original and retrained must differ, got a distance of 0")
    return _finite(torch.linalg.vector_norm(new - target) / base, "the distance")


def activation_distance(model: nn.Module, retrained: nn.Module, x: Tensor) -> float:
    """Return the mean over samples of the L1 distance between the softmax outputs of two models, in [0, 2].

    Args:
        model: maps ``(n, ...)`` to logits ``(n, K)``; used in eval mode, its own mode is restored.
        retrained: the model to compare with.
        x: inputs ``(n, ...)``, at least one.

    Raises:
        ValueError: no input, or outputs that are not finite.

    Reference: golatkar2020forgetting

    >>> activation_distance(nn.Identity(), nn.Identity(), torch.eye(3))
    0.0
    """
    if len(x) == 0:
        raise ValueError("x must hold at least one sample, got none")
    difference = outputs_in_eval(model, x).softmax(1) - outputs_in_eval(retrained, x).softmax(1)
    return _finite(difference.abs().sum(1).mean(), "the distance")


def parameter_distance(
    model: nn.Module, retrained: nn.Module, original: nn.Module, params: str | Iterable[str] = "all"
) -> float:
    """Return how much of the way to the retrained weights is left, ``|w_new - w_retrain| / |w - w_retrain|``.

    Args:
        model: after unlearning.
        retrained: trained without the forgotten samples; at its weights the distance is 0.
        original: before unlearning; at its weights the distance is 1.
        params: the parameters to compare, names or a subset for :func:`peft_parameters`.

    Raises:
        ValueError: original and retrained weights agree, weights that are not finite, or unknown names.

    >>> a, b, c = (nn.Linear(1, 1, bias=False) for _ in range(3))
    >>> for m, value in ((a, 1.0), (b, 2.0), (c, 0.0)):
    ...     _ = m.weight.data.fill_(value)
    >>> parameter_distance(a, b, c)
    0.5
    """
    names = resolve(model, params)
    return _ratio(*(flatten(dict(m.named_parameters()), names) for m in (model, retrained, original)))


def output_distance(model: nn.Module, retrained: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Return the same ratio as :func:`parameter_distance` for the logits on some inputs; ValueError in the same cases.

    Args:
        model, retrained, original: see :func:`parameter_distance`; used in eval mode, their own mode is restored.
        x: inputs ``(n, ...)``, usually the forgotten ones.
    """
    return _ratio(*(outputs_in_eval(m, x).double() for m in (model, retrained, original)))


def update_cosine(
    model: nn.Module, retrained: nn.Module, original: nn.Module, params: str | Iterable[str] = "all"
) -> float:
    """Return the cosine between the step taken and the step to the retrained weights; 0 if either is zero.

    Args:
        model, retrained, original, params: see :func:`parameter_distance`, which raises the same errors.
    """
    names = resolve(model, params)
    new, target, old = (flatten(dict(m.named_parameters()), names) for m in (model, retrained, original))
    return _finite(torch.nn.functional.cosine_similarity(new - old, target - old, dim=0), "the cosine")


class RelearnTime(int):
    """Epochs until the forgotten samples are known again; ``censored`` if that did not happen within the cap.

    >>> str(RelearnTime(100, censored=True)), RelearnTime(3) + 1
    ('>= 100', 4)
    """

    censored: bool

    def __new__(cls, epochs: int, censored: bool = False) -> "RelearnTime":
        made = super().__new__(cls, epochs)
        made.censored = censored
        return made

    def __str__(self) -> str:
        return f">= {int(self)}" if self.censored else str(int(self))


@torch.enable_grad()
def relearn_time(
    model: nn.Module,
    data: Batches,
    forget: Batches,
    original: nn.Module | float,
    *,
    params: str | Iterable[str] = "all",
    loss: str = "ce",
    lr: float = 0.01,
    batch_size: int = 128,
    draws: int = 500,
    cap: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> RelearnTime:
    """Return the epochs of SGD on all data until the loss on the forgotten samples is back at the original model's.

    Plain SGD in eval mode without weight decay. The loss is looked at before each epoch, so a model that still knows
    the samples needs 0.

    Args:
        model: after unlearning; a copy of it is trained.
        data: all data, ``(x, y)`` tensors or a loader that is read once.
        forget: the forgotten samples.
        original: the model before unlearning, or its mean loss on ``forget``, to which ``tolerance`` is added.
        params: the parameters to train, all of them in the official code.
        loss, lr, batch_size: see :func:`finetune`.
        draws: samples an epoch, drawn with replacement by ``seed``; at most as many as there are.
        cap: epochs after which to stop, >= 0; then the result is ``censored``, and printed as ``>= cap``.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range, no data, labels outside ``0..K-1``, or a loss that is not finite.

    Reference: golatkar2020forgetting
    """
    check_choice("loss", loss, LOSSES)
    check_number("lr", lr, ge=0)
    check_number("tolerance", tolerance)
    for name, count, least in (("batch_size", batch_size, 1), ("draws", draws, 1), ("cap", cap, 0)):
        check_count(name, count, ge=least)
    if not isinstance(original, nn.Module):
        check_number("original", original)
    (x, y), (xf, yf) = collect(data, "data"), collect(forget, "forget")
    # Eval mode as in fine-tuning: in train mode the running statistics would relearn too.
    made = copy.deepcopy(model).eval().requires_grad_(False)
    leaves = [made.get_parameter(name).requires_grad_() for name in resolve(made, params)]
    check_labels(torch.cat([y, yf]), outputs_in_eval(made, xf[:1]).shape[1], "data and forget")

    def forgotten(m: nn.Module) -> float:
        # NaN would compare as "not yet", up to the cap.
        return _finite(loss_per_sample(outputs_in_eval(m, xf), yf, loss).mean(), "the loss on forget")

    goal = (forgotten(original) if isinstance(original, nn.Module) else original) + tolerance
    optimizer = torch.optim.SGD(leaves, lr=float(lr))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(cap):
        if forgotten(made) <= goal:
            return RelearnTime(epoch)
        for index in torch.randint(len(x), (min(draws, len(x)),), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss_per_sample(made(x[index]), y[index], loss).mean().backward()
            optimizer.step()
    return RelearnTime(cap, censored=forgotten(made) > goal)


class MembershipInference(NamedTuple):
    """``member_share`` of the forgotten samples that the attack calls members; ``auc`` of the balanced attack."""

    member_share: float
    auc: float


def membership_inference(
    model: nn.Module,
    retain: Batches,
    test: Batches,
    forget: Batches,
    *,
    held_out: Batches | None = None,
    loss: str = "ce",
    seed: int = 0,
) -> MembershipInference:
    r"""Return how well two attacks tell the forgotten samples: by the entropy of outputs, by loss on balanced classes.

    The first is the official attack: a support vector classifier (RBF kernel, ``C=3``, ``gamma="auto"``) learns from
    the entropy of the softmax alone to tell retained samples (members) from test samples; reported is the share of
    forgotten samples that it calls members. With unbalanced sets it degenerates to one answer. The second compares
    ``-loss`` of the forgotten samples with that of equally many unseen samples **of the same classes**: 0.5 means
    that they cannot be told apart, ``nan`` that no unseen sample has a forgotten sample's class.

    Args:
        model: maps ``(n, ...)`` to logits ``(n, K)``; used in eval mode, its own mode is restored.
        retain, test, forget: members, samples that the model has never seen, and the forgotten ones, each ``(x, y)``
            tensors or a loader.
        held_out: unseen samples for the balanced attack; ``test`` if not given.
        loss, seed: of the balanced attack, ``"ce"`` or ``"mse"``, and of the draw of its samples.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: an empty set, labels outside ``0..K-1``, an unknown loss, or outputs that are not finite.

    Reference: golatkar2020forgetting, golatkar2020eternal
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError("membership_inference needs scikit-learn: pip install scikit-learn") from error
    check_choice("loss", loss, LOSSES)
    sets = {"retain": retain, "test": test, "forget": forget}
    sets = {name: collect(part, name) for name, part in sets.items()}
    unseen, y_unseen = sets["test"] if held_out is None else collect(held_out, "held_out")

    def checked(x: Tensor) -> Tensor:
        out = outputs_in_eval(model, x)
        if not torch.isfinite(out).all():
            raise ValueError("model must have finite outputs, got NaN or infinity")
        return out

    logits = {name: checked(x) for name, (x, _) in sets.items()}
    for name, (_, y) in sets.items():
        check_labels(y, logits[name].shape[1], name)
    # p log p from the logarithms: log(p) of a saturated softmax is -inf, and 0 * -inf is NaN.
    log_p = {name: out.double().log_softmax(1) for name, out in logits.items()}
    entropy = {name: -(each.exp() * each).sum(1, keepdim=True).cpu().numpy() for name, each in log_p.items()}
    # The seed changes nothing (no probabilities are asked for), but None would draw from NumPy's global stream.
    attack = SVC(C=3, gamma="auto", kernel="rbf", random_state=0)
    labels = [1] * len(entropy["retain"]) + [0] * len(entropy["test"])
    attack.fit([*entropy["retain"].tolist(), *entropy["test"].tolist()], labels)
    share = float(attack.predict(entropy["forget"]).mean())

    generator = torch.Generator().manual_seed(seed)
    drawn, y_forget = [], sets["forget"][1]
    for label in y_forget.unique().tolist():  # equally many samples of each class on both sides
        both = [torch.nonzero(y == label).flatten().cpu() for y in (y_forget, y_unseen)]
        count = min(map(len, both))
        drawn.append([index[torch.randperm(len(index), generator=generator)[:count]] for index in both])
    mine, others = map(torch.cat, zip(*drawn, strict=True))
    if not len(mine):
        return MembershipInference(share, math.nan)
    known = -loss_per_sample(logits["forget"][mine], y_forget[mine], loss).double()
    new = -loss_per_sample(checked(unseen[others]), y_unseen[others], loss).double()
    gap = known[:, None] - new[None, :]  # of every pair; ties count one half
    return MembershipInference(share, float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()))
