"""Membership inference: can the forgotten samples be told from samples that were never seen?"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import LOSSES, Batches, check_choice, check_labels, collect
from .losses import loss_per_sample
from .metrics import outputs_in_eval


class MembershipInference(NamedTuple):
    """``member_share`` of the forgotten samples that the attack calls members; ``auc`` of the balanced attack.

    Reference: golatkar2020forgetting
    """

    member_share: float
    auc: float


def _entropy(outputs: Tensor) -> Any:
    log_p = outputs.double().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True).cpu().numpy()


def area_under_curve(members: Tensor, others: Tensor) -> float:
    """Share of pairs in which the member has the larger score, ties counting one half."""
    gap = members.double()[:, None] - others.double()[None, :]
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())


def _balanced(y_forget: Tensor, y_other: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of equally many samples of each class on both sides."""
    ours, theirs = [], []
    for label in y_forget.unique().tolist():
        pair = [torch.nonzero(y == label).flatten().cpu() for y in (y_forget, y_other)]
        count = min(len(pair[0]), len(pair[1]))
        picked = [index[torch.randperm(len(index), generator=generator)[:count]] for index in pair]
        ours.append(picked[0])
        theirs.append(picked[1])
    return torch.cat(ours), torch.cat(theirs)


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
    r"""Attack the model in two ways: by the entropy of its outputs, and by the loss on balanced classes.

    The first is the official attack: a support vector classifier (RBF kernel, ``C=3``, ``gamma="auto"``) learns from
    the entropy of the softmax alone to tell retained samples (members) from test samples; reported is the share of
    forgotten samples that it calls members. With unbalanced sets it degenerates to one answer. The second compares
    ``-loss`` of the forgotten samples with that of equally many unseen samples **of the same classes**: 0.5 means
    that they cannot be told apart.

    Args:
        model: maps ``(n, ...)`` to logits ``(n, K)``; used in eval mode, its own mode is restored.
        retain: members, ``(x, y)`` tensors or a loader.
        test: samples that the model has never seen.
        forget: the forgotten samples.
        held_out: unseen samples for the balanced attack; ``test`` if not given.
        loss: ``"ce"`` or ``"mse"``, of the balanced attack.
        seed: of the draw of the balanced samples.

    Returns:
        ``(member_share, auc)``; ``auc`` is ``nan`` if no unseen sample has a forgotten sample's class.

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
    sets = [collect(part, name) for part, name in ((retain, "retain"), (test, "test"), (forget, "forget"))]
    outputs = [outputs_in_eval(model, x) for x, _ in sets]
    for (_, y), name in zip(sets, ("retain", "test", "forget"), strict=True):
        check_labels(y, outputs[0].shape[1], name)
    if not all(torch.isfinite(out).all() for out in outputs):
        raise ValueError("model must have finite outputs, got NaN or infinity")
    members, others, forgotten = (_entropy(out) for out in outputs)
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    labels = [1] * len(members) + [0] * len(others)
    attack.fit([*members.tolist(), *others.tolist()], labels)
    share = float(attack.predict(forgotten).mean())
    unseen = sets[1] if held_out is None else collect(held_out, "held_out")
    mine, theirs = _balanced(sets[2][1], unseen[1], torch.Generator().manual_seed(seed))
    if not len(mine):
        return MembershipInference(share, float("nan"))
    ours = -loss_per_sample(outputs[2][mine], sets[2][1][mine], loss)
    rest = -loss_per_sample(outputs_in_eval(model, unseen[0][theirs]), unseen[1][theirs], loss)
    return MembershipInference(share, area_under_curve(ours, rest))
