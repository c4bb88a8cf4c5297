"""ZiCo: rank untrained networks by the inverse coefficient of variation of their gradients.

`zico` is the score, `zico_per_layer` its terms, `zico_floor` what it cannot fall below with two batches; `zico_terms`
gives several variants from the same passes, and `gradient_moments` the stream of moments that all of them read.
"""

from effnb.nas.zico.score import VARIANTS as VARIANTS
from effnb.nas.zico.score import GradientMoments, gradient_moments, zico_floor, zico_per_layer, zico_terms
from effnb.nas.zico.score import zico as zico

# `zico` is not listed: a star import would put the function in the place of this module in `effnb.nas`.
__all__ = ["GradientMoments", "gradient_moments", "zico_floor", "zico_per_layer", "zico_terms"]
