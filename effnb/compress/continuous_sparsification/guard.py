"""Weight decay on gate scores is a silent error: look at the optimiser once, at its first step."""

import functools
import warnings
import weakref
from typing import TYPE_CHECKING

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .handle import CSHandle


def check_optimizer(handle: "CSHandle", optimizer: Optimizer) -> bool:
    """Warn when ``optimizer`` decays gate scores: decay pulls them to 0, the very threshold of the ticket.

    Args:
        handle: of the gated model.
        optimizer: any optimiser; it need not hold gates.

    Returns:
        Whether the optimiser holds any gate score. Run by itself at an optimiser's first step with the gates.

    Reference: savarese2020winning

    >>> from effnb.compress import apply_cs
    >>> handle = apply_cs(nn.Linear(2, 1))
    >>> check_optimizer(handle, torch.optim.SGD(handle.param_groups(lr=0.1, weight_decay=1e-4)))
    True
    """
    scores = {id(p) for p in handle.gate_parameters()}
    groups = [group for group in optimizer.param_groups if any(id(p) in scores for p in group["params"])]
    for group in groups:
        if group.get("weight_decay", 0) > 0:
            warnings.warn(
                f"gate scores have weight_decay={group['weight_decay']}: it drives them to 0, the decision boundary; "
                "build the optimiser from handle.param_groups(...)",
                stacklevel=2,
            )
    return bool(groups)


_WATCHED: weakref.WeakSet["CSHandle"] = weakref.WeakSet()


def _inspect(optimizer: Optimizer, *_) -> None:
    for handle in list(_WATCHED):
        hard = handle.gates and handle.is_hard  # scores without gradient are not touched, decay or not
        if not handle.gates or (not hard and check_optimizer(handle, optimizer)):
            _WATCHED.discard(handle)


@functools.cache
def _install() -> None:
    # One hook for the life of the process: torch forbids taking hooks off while they run.
    register_optimizer_step_pre_hook(_inspect)


def watch_weight_decay(handle: "CSHandle") -> None:
    """Run :func:`check_optimizer` once, at the first optimiser step with these gates.

    Args:
        handle: of the gated model; only a weak reference to it is kept.

    Reference: savarese2020winning
    """
    _install()
    _WATCHED.add(handle)
