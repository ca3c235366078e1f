"""Losses over the decoder's features."""

from lpl_lightning.execution import Execution
from lpl_lightning.losses.diagnostics import Diagnostics
from lpl_lightning.losses.distance import standardize
from lpl_lightning.losses.gate import Threshold, equivalents
from lpl_lightning.losses.lpl import LatentPerceptualLoss
from lpl_lightning.losses.outliers import inlier_mask
from lpl_lightning.losses.subset import Subset

__all__ = [
    "Diagnostics",
    "Execution",
    "LatentPerceptualLoss",
    "Subset",
    "Threshold",
    "equivalents",
    "inlier_mask",
    "standardize",
]
