from typing import Any
from torch.nn import functional as F
from .gradient import GradientPass
def score_all(model, batches, names=None, *, loss_fn=F.cross_entropy, seed=0):
    from . import available_proxies
    known = available_proxies()
    first = batches[0]
    return {n: known[n](model, batches if n.startswith("zico") else first, loss_fn=loss_fn, seed=seed) for n in (names or known)}
