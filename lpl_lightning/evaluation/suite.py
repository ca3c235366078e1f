"""What is measured of generated images: a list of measures, fed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpl_lightning.evaluation.image_metrics import SpectrumMetrics, WaveletMetrics
from lpl_lightning.evaluation.measure import Measure, Role, Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.report import SAMPLES, Value
from lpl_lightning.metrics.tensor_files import write_tensors

__all__ = ["Suite", "versions"]

_LIBRARIES = ("lpl-lightning", "torch", "torchvision", "torchmetrics", "diffusers", "lightning", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of the libraries that values may depend on."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Suite(nn.Module):
    """Measures of generated images, each of which takes all images once.

    Args:
        measures: They; by default those that need no downloaded weights: spectra, wavelets and, where images are
            reconstructed, PSNR and SSIM.

    Raises:
        ValueError: Two of them have one label, or there is none.
    """

    def __init__(self, measures: list[Measure] | None = None) -> None:
        super().__init__()
        if measures is None:
            measures = [SpectrumMetrics(), WaveletMetrics(), ReconstructionMetrics()]
        labels = [measure.label for measure in measures]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(
                f"`measures` must be one or more that differ in label, got {labels}: give FeatureMetrics of two "
                "networks names that differ, as `name`."
            )
        self.measures = nn.ModuleList(measures)

    def __iter__(self) -> Iterator[Measure]:
        for measure in self.measures:
            assert isinstance(measure, Measure)
            yield measure

    def check(self, sets: Sets) -> None:
        """Refuse sets that a measure cannot be computed of, before any image is made or read.

        Raises:
            ValueError: It says which and why.
        """
        for measure in self:
            measure.check(sets)

    def settings(self, sets: Sets) -> list[dict[str, Any]]:
        """What says what is computed of such sets, measure by measure."""
        return [measure.settings(sets) for measure in self]

    def begin(self, sets: Sets, device: torch.device) -> None:
        """Forget all images, and expect these sets on a device."""
        self.check(sets)
        for measure in self:
            measure.begin(sets, device)

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch; see ``Measure.update``."""
        for measure in self:
            measure.update(images, role, index, captions)

    def real_states(self) -> dict[str, dict[str, Tensor]]:
        """What each measure keeps of the real images, by label."""
        return {measure.label: measure.real_state() for measure in self}

    def put_real_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what ``real_states`` gave, and expect generated images."""
        for measure in self:
            measure.put_real_state(states[measure.label])
            measure.begin_generated()

    def compute(self) -> dict[str, Value]:
        """All values by name.

        Raises:
            ValueError: Two measures give values of one name.
        """
        found: dict[str, Value] = {}
        for measure in self:
            values = measure.compute()
            if both := sorted(set(values) & set(found)):
                raise ValueError(f"`measures`: {measure.label} gives {both}, as another does. Give one another `name`.")
            found |= values
        return found

    def write(self, folder: Path, sets: Sets) -> list[str]:
        """Write what was found of each image, and further files of the measures; after ``compute``.

        Args:
            folder: An existing folder.
            sets: What was measured.

        Returns:
            What a reader of the report must know of it.
        """
        tensors = {"index_generated": torch.arange(sets.generated), "index_real": torch.arange(sets.real)}
        for measure in self:
            tensors |= measure.samples()
        write_tensors(folder / SAMPLES, tensors)
        return [note for measure in self for note in measure.write(folder)]
