"""What a training step costs without and with the Latent Perceptual Loss, and how far that is from its floor."""

from lpl_lightning.profiling.decoder import DecoderCost, StageCost, profile_decoder
from lpl_lightning.profiling.report import Block, Report
from lpl_lightning.profiling.steps import PeakMemory, StepRecorder
from lpl_lightning.profiling.trainer import ProfilingTrainer

__all__ = [
    "Block",
    "DecoderCost",
    "PeakMemory",
    "ProfilingTrainer",
    "Report",
    "StageCost",
    "StepRecorder",
    "profile_decoder",
]
