"""Latent Perceptual Loss (Berrada et al., ICLR 2025) for latent diffusion and flow models, on PyTorch Lightning."""

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.autoencoder_module import AutoencoderModule
from lpl_lightning.backbones import (
    DiTDenoiser,
    FluxDenoiser,
    PixArtDenoiser,
    SanaDenoiser,
    SD3Denoiser,
    UNetDenoiser,
)
from lpl_lightning.callbacks import (
    EMA,
    Evaluation,
    ImagesPerSecond,
    ImageWriter,
    LossByNoise,
    LPLCallback,
    Preemption,
    RunSummary,
    SampleGrid,
    SaveAutoencoder,
    SaveDiffusers,
    SaveWeights,
    StepGuard,
)
from lpl_lightning.captions import Captions
from lpl_lightning.checkpoints import SafeCheckpointIO
from lpl_lightning.conditioning import ClassLabels, ClassTokens
from lpl_lightning.data import ImageFolderDataModule, ShapesDataModule
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.estimates import estimate_z0
from lpl_lightning.export import export_diffusers
from lpl_lightning.fine_tuning import Freeze, LoRA
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.mixin import LPLMixin
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.noise import DDPM, EDM, FlowMatching
from lpl_lightning.sampling import Sampler
from lpl_lightning.strategies import FSDP2Strategy
from lpl_lightning.text_encoders import OpenCLIPText, SideBySide, TransformersText

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "EMA",
    "Autoencoder",
    "AutoencoderModule",
    "Captions",
    "ClassLabels",
    "ClassTokens",
    "Denoiser",
    "DiTDenoiser",
    "Evaluation",
    "FSDP2Strategy",
    "FlowMatching",
    "FluxDenoiser",
    "Freeze",
    "ImageFolderDataModule",
    "ImageWriter",
    "ImagesPerSecond",
    "LPLCallback",
    "LPLMixin",
    "LatentDiffusionModule",
    "LatentPerceptualLoss",
    "LoRA",
    "LossByNoise",
    "OpenCLIPText",
    "PixArtDenoiser",
    "Preemption",
    "RunSummary",
    "SD3Denoiser",
    "SafeCheckpointIO",
    "SampleGrid",
    "Sampler",
    "SanaDenoiser",
    "SaveAutoencoder",
    "SaveDiffusers",
    "SaveWeights",
    "ShapesDataModule",
    "SideBySide",
    "StepGuard",
    "TransformersText",
    "UNetDenoiser",
    "estimate_z0",
    "export_diffusers",
]
