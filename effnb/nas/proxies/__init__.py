"""Zero-cost proxies: scores of an untrained network that should rank as its trained accuracy does."""

from ..zico import zico, zico_floor
from .codes import linear_regions, naswot
from .gradient import GradientPass, fisher, grad_norm, l2_norm, plain, snip
from .kernel import grad_sign, knas, ntk_condition
from .saliency import grasp, jacob_cov, synflow
from .scoring import score_all
from .size import count_macs, count_params, nn_mass
from .zen import zen_score
def available_proxies():
    fs = [count_params, count_macs, l2_norm, grad_norm, snip, plain, grasp, fisher, synflow, jacob_cov, naswot, zen_score, ntk_condition, linear_regions, grad_sign, knas, nn_mass, zico, zico_floor]
    return {f.__name__: f for f in fs}
