"""Zero-cost proxies: scores of an untrained network that should rank as its trained accuracy does.

Every proxy is ``proxy(model, batch, *, loss_fn=..., seed=...) -> float``, leaves the network and the random state as
they were, and is better when higher unless `available_proxies` says otherwise.
"""

from ..zico import zico, zico_floor
from .codes import linear_regions, naswot
from .gradient import GradientPass, fisher, grad_norm, plain, snip
from .kernel import grad_sign, knas, ntk_condition
from .registry import Proxy, available_proxies
from .saliency import grasp, jacob_cov, synflow
from .scoring import score_all
from .size import SkipCell, count_macs, count_params, l2_norm, nn_mass
from .voting import rank_average, vote
from .zen import zen_score

__all__ = [
    "GradientPass",
    "Proxy",
    "SkipCell",
    "available_proxies",
    "count_macs",
    "count_params",
    "fisher",
    "grad_norm",
    "grad_sign",
    "grasp",
    "jacob_cov",
    "knas",
    "l2_norm",
    "linear_regions",
    "naswot",
    "nn_mass",
    "ntk_condition",
    "plain",
    "rank_average",
    "score_all",
    "snip",
    "synflow",
    "vote",
    "zen_score",
    "zico",
    "zico_floor",
]
