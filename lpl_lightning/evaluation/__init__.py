"""Evaluation of generated images: all metrics of two sets, with provenance, reports, comparisons and sweeps."""

from lpl_lightning.evaluation.comparison import compare
from lpl_lightning.evaluation.evaluator import Evaluator
from lpl_lightning.evaluation.feature_metrics import FeatureMetrics
from lpl_lightning.evaluation.folders import evaluate_folder
from lpl_lightning.evaluation.image_metrics import CaptionMetrics, SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Measure, Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.report import Report, Resampling, Value
from lpl_lightning.evaluation.suite import Suite

__all__ = [
    "CaptionMetrics",
    "Evaluator",
    "FeatureMetrics",
    "Measure",
    "ReconstructionMetrics",
    "Report",
    "Resampling",
    "Sets",
    "SpectrumMetrics",
    "Suite",
    "Value",
    "WaveletMetrics",
    "compare",
    "evaluate_folder",
]
