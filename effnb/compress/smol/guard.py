"""Weight decay on limits is a silent error: look at the optimiser once, at its first step."""

import functools
import warnings
import weakref
from typing import TYPE_CHECKING

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .handle import SmolHandle


def warn_of_decay(handle: "SmolHandle", optimizer: Optimizer) -> bool:
    """Warn when ``optimizer`` decays limits ``s``: decay pulls them to 0, which is 2 bits for every weight.

    Args:
        handle: of the model in phase I.
        optimizer: any optimiser; it need not hold limits.

    Returns:
        Whether the optimiser holds any limit. Run by itself at an optimiser's first step with the limits.

    Reference: savarese2022bits

    >>> from effnb.compress import apply_smol
    >>> handle = apply_smol(nn.Linear(2, 1))
    >>> warn_of_decay(handle, torch.optim.Adam(handle.param_groups(lr=0.1, weight_decay=1e-4)))
    True
    """
    limits = {id(p) for p in handle.precision_parameters()}
    groups = [group for group in optimizer.param_groups if any(id(p) in limits for p in group["params"])]
    for group in groups:
        if group.get("weight_decay", 0) > 0:
            warnings.warn(
                f"limits s have weight_decay={group['weight_decay']}: it pulls them to 0, which is 2 bits for every "
                "weight; build the optimiser from handle.precision_parameters() without decay",
                stacklevel=2,
            )
    return bool(groups)


_WATCHED: weakref.WeakSet["SmolHandle"] = weakref.WeakSet()


def _inspect(optimizer: Optimizer, *_) -> None:
    for handle in list(_WATCHED):
        frozen = handle.gates and handle.is_frozen
        if not handle.gates or (not frozen and warn_of_decay(handle, optimizer)):
            _WATCHED.discard(handle)


@functools.cache
def _install() -> None:
    # One hook for the life of the process: torch forbids taking hooks off while they run.
    register_optimizer_step_pre_hook(_inspect)


def watch_weight_decay(handle: "SmolHandle") -> None:
    """Run :func:`warn_of_decay` once, at the first optimiser step with these limits."""
    _install()
    _WATCHED.add(handle)
