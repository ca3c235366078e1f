"""Losses over the decoder's features."""

from lpl_lightning.losses.diagnostics import Diagnostics
from lpl_lightning.losses.gate import Threshold
from lpl_lightning.losses.lpl import LatentPerceptualLoss
from lpl_lightning.losses.outliers import inlier_mask

__all__ = ["Diagnostics", "LatentPerceptualLoss", "Threshold", "inlier_mask"]
