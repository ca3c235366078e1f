"""What an autoencoder gives back of the real images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lpl_lightning.evaluation.gathering import Rows
from lpl_lightning.evaluation.measure import Measure, Role
from lpl_lightning.evaluation.report import Resampling, Value
from lpl_lightning.frozen import weights_hash
from lpl_lightning.metrics.reconstruction import LPIPS, Reconstruction

__all__ = ["ReconstructionMetrics"]


class ReconstructionMetrics(Measure):
    """What the autoencoder gives back of real images, the ceiling of any model on it.

    ``reconstruction_psnr`` in dB, ``reconstruction_ssim`` and, if asked for, ``reconstruction_lpips``: means over
    images. Where nothing is reconstructed, as of images from elsewhere, there are none.

    Args:
        lpips: The perceptual distance; None leaves it out, since its weights are not everywhere.
    """

    def __init__(self, lpips: LPIPS | None = None) -> None:
        super().__init__()
        self.reconstruction = Reconstruction(lpips)
        self._lpips_weights = None if lpips is None else weights_hash(lpips)

    @property
    def label(self) -> str:
        """``reconstruction``."""
        return "reconstruction"

    def provenance(self) -> dict[str, Any]:
        """Of what, and by which network."""
        made: dict[str, Any] = {"class": "Reconstruction", "ssim": "window 11, of [0, 1]"}
        return made if self._lpips_weights is None else made | {"lpips_weights": self._lpips_weights}

    def begin_real(self) -> None:
        """Forget the real images and their reconstructions."""
        self._rows = Rows(len(self.reconstruction.names), self.device)
        self._state: dict[str, Tensor] = {}
        self._images: Tensor | None = None

    def begin_generated(self) -> None:
        """Nothing is kept of generated images."""

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch."""
        if role == "real":
            self._images = images
        elif role == "reconstructed" and self._images is not None:
            self._rows.add(index, self.reconstruction.each(images, self._images).T)
            self._images = None

    def real_state(self) -> dict[str, Tensor]:
        """Values of each image."""
        return {"rows": self._rows.all()[1]}

    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``real_state`` gave."""
        self._state = dict(state)

    def compute(self) -> dict[str, Value]:
        """The means, if anything was reconstructed."""
        if self.sets.autoencoder is None:
            return {}
        rows = self._state["rows"].double()
        made = self.provenance() | {"autoencoder": self.sets.autoencoder, "reconstructed": len(rows)}
        values = {}
        for name, mean in zip(self.reconstruction.names, rows.mean(dim=0).tolist(), strict=True):
            key = f"reconstruction_{name}"
            better: Literal["lower", "higher"] = "lower" if name == "lpips" else "higher"
            # Other images would not make a mean finite that one of these makes infinite.
            resampling = Resampling("mean", key, "real") if math.isfinite(mean) else None
            values[key] = Value(mean, better, made, resampling=resampling)
        return values

    def samples(self) -> dict[str, Tensor]:
        """Values of each image."""
        if self.sets.autoencoder is None:
            return {}
        names = [f"reconstruction_{name}" for name in self.reconstruction.names]
        return dict(zip(names, self._state["rows"].T, strict=True))

    def write(self, folder: Path) -> list[str]:
        """Say whether the PSNR is of any use; there are no files."""
        if self.sets.autoencoder is None:
            return []
        psnr = self._state["rows"][:, self.reconstruction.names.index("psnr")]
        if not (exact := int(psnr.isinf().sum())):
            return []
        return [
            f"reconstruction_psnr: {exact} of {len(psnr)} images are given back exactly, so that it is infinite and "
            "has no interval."
        ]
