"""Lightning callbacks: the loss, images, rates and what a run leaves behind."""

from lpl_lightning.callbacks.images import ImageWriter, SampleGrid
from lpl_lightning.callbacks.lpl import LPLCallback
from lpl_lightning.callbacks.saving import SaveAutoencoder, SaveWeights
from lpl_lightning.callbacks.throughput import ImagesPerSecond

__all__ = ["ImageWriter", "ImagesPerSecond", "LPLCallback", "SampleGrid", "SaveAutoencoder", "SaveWeights"]
