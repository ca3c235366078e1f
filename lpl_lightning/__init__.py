"""Latent Perceptual Loss (Berrada et al., ICLR 2025) for latent diffusion and flow models, on PyTorch Lightning."""

from lpl_lightning.data import ImageFolderDataModule, ShapesDataModule

__version__ = "0.1.0"

__all__ = ["ImageFolderDataModule", "ShapesDataModule"]
