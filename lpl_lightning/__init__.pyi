# What the package has at its top; each part is imported when it is first asked for.

from .autoencoder import Autoencoder
from .autoencoder_module import AutoencoderModule
from .backbones import (
    DiTDenoiser,
    FluxDenoiser,
    PixArtDenoiser,
    SanaDenoiser,
    SD3Denoiser,
    UNetDenoiser,
)
from .callbacks import (
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
from .captions import Captions
from .checkpoints import SafeCheckpointIO
from .conditioning import ClassLabels, ClassTokens
from .data import ImageFolderDataModule, ShapesDataModule
from .denoiser import Denoiser
from .estimates import estimate_z0
from .export import export_diffusers
from .fine_tuning import Freeze, LoRA
from .losses import LatentPerceptualLoss
from .mixin import LPLMixin
from .module import LatentDiffusionModule
from .noise import DDPM, EDM, FlowMatching
from .sampling import Sampler
from .strategies import FSDP2Strategy
from .text_encoders import OpenCLIPText, SideBySide, TransformersText

__version__: str

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
