"""Metrics of sets of images, as ``torchmetrics.Metric``."""

from lpl_lightning.metrics.classifier_features import InceptionFeatures, TorchvisionFeatures
from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.metrics.features import FeatureExtractor, ModuleFeatures, TorchScriptFeatures
from lpl_lightning.metrics.frechet import FrechetDistance, frechet_distance
from lpl_lightning.metrics.gaussian import Gaussian, GaussianStatistics
from lpl_lightning.metrics.memorization import memorization_distance
from lpl_lightning.metrics.prdc import PRDC, Overlap, nearest_distances
from lpl_lightning.metrics.preparation import Preparation
from lpl_lightning.metrics.reconstruction import LPIPS, Reconstruction
from lpl_lightning.metrics.reference import ReferenceStatistics
from lpl_lightning.metrics.spectrum import PowerSpectrum, Spectra, radial_power
from lpl_lightning.metrics.spectrum_plot import plot_spectra, spectra_figure, write_spectra
from lpl_lightning.metrics.tower_features import OpenCLIPFeatures, TransformersFeatures
from lpl_lightning.metrics.wavelet import FrechetWaveletDistance, WaveletFeatures

__all__ = [
    "LPIPS",
    "PRDC",
    "CLIPScore",
    "FeatureExtractor",
    "FrechetDistance",
    "FrechetWaveletDistance",
    "Gaussian",
    "GaussianStatistics",
    "InceptionFeatures",
    "ModuleFeatures",
    "OpenCLIPFeatures",
    "Overlap",
    "PowerSpectrum",
    "Preparation",
    "Reconstruction",
    "ReferenceStatistics",
    "Spectra",
    "TorchScriptFeatures",
    "TorchvisionFeatures",
    "TransformersFeatures",
    "WaveletFeatures",
    "frechet_distance",
    "memorization_distance",
    "nearest_distances",
    "plot_spectra",
    "radial_power",
    "spectra_figure",
    "write_spectra",
]
