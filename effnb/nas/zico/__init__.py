"""ZiCo: rank untrained networks by the inverse coefficient of variation of their gradients.

`zico` is the score, `zico_per_layer` its terms, `zico_floor` what it cannot fall below with two batches; `zico_terms`
gives several variants from the same passes, and `gradient_moments` the stream of moments that all of them read.
"""

from .moments import GradientMoments
from .passes import gradient_moments
from .score import VARIANTS, zico, zico_floor, zico_per_layer, zico_terms

__all__ = [
    "VARIANTS",
    "GradientMoments",
    "gradient_moments",
    "zico",
    "zico_floor",
    "zico_per_layer",
    "zico_terms",
]
