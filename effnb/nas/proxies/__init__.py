"""Zero-cost proxies: scores of an untrained network that should rank as its trained accuracy does.

Every proxy is ``proxy(model, batch, *, loss_fn=..., seed=...) -> float``, leaves the network and the random state as
they were, and is better when higher unless `available_proxies` says otherwise.
"""

from effnb.nas.proxies.activations import linear_regions, naswot, zen_score
from effnb.nas.proxies.gradient import GradientPass, fisher, grad_norm, grasp, jacob_cov, plain, snip, synflow
from effnb.nas.proxies.kernel import grad_sign, knas, ntk_condition
from effnb.nas.proxies.scoring import Proxy, available_proxies, rank_average, score_all, vote
from effnb.nas.proxies.size import SkipCell, count_macs, count_params, l2_norm, nn_mass
from effnb.nas.zico.score import zico as zico
from effnb.nas.zico.score import zico_floor as zico_floor

# Without `zico` and `zico_floor`, which `effnb.nas.zico` lists.
__all__ = [
    "GradientPass", "Proxy", "SkipCell", "available_proxies", "count_macs", "count_params", "fisher", "grad_norm",
    "grad_sign", "grasp", "jacob_cov", "knas", "l2_norm", "linear_regions", "naswot", "nn_mass", "ntk_condition",
    "plain", "rank_average", "score_all", "snip", "synflow", "vote", "zen_score",
]  # fmt: skip
