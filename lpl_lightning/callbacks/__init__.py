"""Lightning callbacks: the loss, images, averages, rates and what a run leaves behind."""

from lpl_lightning.callbacks.accumulation import AccumulatedGradients
from lpl_lightning.callbacks.best_checkpoints import BestCheckpoints
from lpl_lightning.callbacks.ema import EMA
from lpl_lightning.callbacks.evaluation import Evaluation
from lpl_lightning.callbacks.images import ImageWriter, SampleGrid
from lpl_lightning.callbacks.loss_by_noise import LossByNoise
from lpl_lightning.callbacks.lpl import LPLCallback
from lpl_lightning.callbacks.preemption import Preemption
from lpl_lightning.callbacks.run_config import SaveRunConfig
from lpl_lightning.callbacks.saving import SaveAutoencoder, SaveDiffusers, SaveWeights
from lpl_lightning.callbacks.step_guard import StepGuard
from lpl_lightning.callbacks.summary import RunSummary
from lpl_lightning.callbacks.throughput import ImagesPerSecond
from lpl_lightning.callbacks.unfinished_validation import UnfinishedValidation

__all__ = [
    "EMA",
    "AccumulatedGradients",
    "BestCheckpoints",
    "Evaluation",
    "ImageWriter",
    "ImagesPerSecond",
    "LPLCallback",
    "LossByNoise",
    "Preemption",
    "RunSummary",
    "SampleGrid",
    "SaveAutoencoder",
    "SaveDiffusers",
    "SaveRunConfig",
    "SaveWeights",
    "StepGuard",
    "UnfinishedValidation",
]
