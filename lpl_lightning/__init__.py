"""Latent Perceptual Loss (Berrada et al., ICLR 2025) for latent diffusion and flow models, on PyTorch Lightning."""

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.autoencoder_module import AutoencoderModule
from lpl_lightning.callbacks import (
    ImagesPerSecond,
    ImageWriter,
    LPLCallback,
    SampleGrid,
    SaveAutoencoder,
    SaveWeights,
)
from lpl_lightning.conditioning import ClassLabels, ClassTokens
from lpl_lightning.data import ImageFolderDataModule, ShapesDataModule
from lpl_lightning.denoiser import Denoiser, DiTDenoiser, SD3Denoiser
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.mixin import LPLMixin
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.noise import DDPM, EDM, FlowMatching
from lpl_lightning.sampling import Sampler

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "Autoencoder",
    "AutoencoderModule",
    "ClassLabels",
    "ClassTokens",
    "Denoiser",
    "DiTDenoiser",
    "FlowMatching",
    "ImageFolderDataModule",
    "ImageWriter",
    "ImagesPerSecond",
    "LPLCallback",
    "LPLMixin",
    "LatentDiffusionModule",
    "LatentPerceptualLoss",
    "SD3Denoiser",
    "SampleGrid",
    "Sampler",
    "SaveAutoencoder",
    "SaveWeights",
    "ShapesDataModule",
]
