"""Fine-tuning: adapters, chains of them and cheaper backward passes."""

from effnb.finetune import cola, lbp_wht
from effnb.finetune.cola import *
from effnb.finetune.lbp_wht import *

__all__ = [*cola.__all__, *lbp_wht.__all__]
