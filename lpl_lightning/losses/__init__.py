"""Losses over the decoder's features."""

from lpl_lightning.losses.lpl import LatentPerceptualLoss
from lpl_lightning.losses.outliers import inlier_mask

__all__ = ["LatentPerceptualLoss", "inlier_mask"]
