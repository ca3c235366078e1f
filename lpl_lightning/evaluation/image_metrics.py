"""Measures that need no network, or one of their own: spectra, wavelets and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lpl_lightning.arguments import at_least
from lpl_lightning.evaluation.gathering import Rows
from lpl_lightning.evaluation.measure import Measure, Role, Sets
from lpl_lightning.evaluation.report import Resampling, Value
from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.metrics.spectrum import FLOOR, PowerSpectrum, Spectra, radial_power
from lpl_lightning.metrics.spectrum_plot import plot_spectra, write_spectra
from lpl_lightning.metrics.wavelet import FrechetWaveletDistance

__all__ = ["CaptionMetrics", "SpectrumMetrics", "WaveletMetrics"]

PACKET_SIDE = 4
"""Least side of a wavelet packet, in coefficients, down to which images are split by default."""


def _real_states(metric: Metric) -> dict[str, Tensor]:
    """The states of a metric that are of real images, of all processes."""
    with metric.sync_context():
        states = metric.metric_state.items()
        return {name: state.clone() for name, state in states if name.startswith("real") and isinstance(state, Tensor)}


def _put_states(metric: Metric, states: Mapping[str, Tensor]) -> None:
    """Put states, all sums, back: on the first process, since a sync will add them up."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, state in states.items():
        own = getattr(metric, name)
        setattr(metric, name, state.to(own) if first else torch.zeros_like(own))


class SpectrumMetrics(Measure):
    """How the radially averaged power spectrum differs: ``spectrum_log_difference`` and ``spectrum_error_BAND``.

    The former is the mean over frequencies of the absolute difference of mean log power, the latter the relative error
    of the mean power at low, middle and high frequencies, as ``metrics.Spectra`` says. No network is needed.

    Args:
        window: Whether images are windowed, see ``metrics.radial_power``.
    """

    def __init__(self, window: bool = False) -> None:
        super().__init__()
        self.window = window

    @property
    def label(self) -> str:
        """``spectrum``."""
        return "spectrum"

    def provenance(self) -> dict[str, Any]:
        """Luminance and window."""
        return {"class": "PowerSpectrum", "luminance": "Rec. 601", "window": "Hann" if self.window else "none"}

    def begin_real(self) -> None:
        """Forget the real images."""
        self._real: dict[str, Tensor] = {}
        self._metric = PowerSpectrum(self.sets.image_size, self.window).to(self.device)

    def begin_generated(self) -> None:
        """Forget the generated images."""
        self._metric.reset()
        _put_states(self._metric, self._real)
        self._rows = Rows(self.sets.image_size // 2 + 1, self.device)

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch."""
        if role == "reconstructed":
            return
        self._metric.update(images, real=role == "real")
        if role == "generated":
            self._rows.add(index, radial_power(images, self.window).clamp(min=FLOOR).log())

    def real_state(self) -> dict[str, Tensor]:
        """Sums of the power."""
        return _real_states(self._metric)

    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``real_state`` gave."""
        self._real = dict(state)
        self.begin_generated()

    def compute(self) -> dict[str, Value]:
        """The mean difference, and the errors by band."""
        self.spectra: Spectra = self._metric.compute()
        _, self._log_power = self._rows.all()
        made = self.provenance() | {"generated": self.sets.generated, "real": self.sets.real}
        difference, resampling = float(self.spectra.mean_absolute_log_difference), Resampling("spectrum", "log_power")
        # Means of fewer images have more noise, and absolute values of it do not cancel.
        biased_by = ("generated", "real")
        values = {"spectrum_log_difference": Value(difference, "lower", made, None, resampling, biased_by)}
        for band, error in zip(("low", "middle", "high"), self.spectra.band_errors().tolist(), strict=True):
            values[f"spectrum_error_{band}"] = Value(error, "lower", made, biased_by=biased_by)
        return values

    def samples(self) -> dict[str, Tensor]:
        """Log power of each generated image, and the real images' mean."""
        return {"log_power": self._log_power, "log_power_real": self.spectra.real_log_power}

    def write(self, folder: Path) -> list[str]:
        """Write ``spectra.csv`` and, with matplotlib, ``spectra.png``."""
        write_spectra(self.spectra, folder / "spectra.csv")
        try:
            plot_spectra({"generated": self.spectra}, folder / "spectra.png")
        except ModuleNotFoundError as error:
            return [f"spectra.png is not there. {error}"]
        return []


class WaveletMetrics(Measure):
    """The Frechet Wavelet Distance of generated images, ``frechet_wavelet``, and of reconstructed ones; no network.

    Args:
        level: How often images are split, see ``metrics.FrechetWaveletDistance``. By default as often as leaves packets
            4 coefficients wide or more, which is level 4 of 64 px, 6 of 256 px.
        allow_few: Allow fewer images than a packet has coefficients.
    """

    def __init__(self, level: int | None = None, allow_few: bool = False) -> None:
        super().__init__()
        if level is not None:
            at_least(1, level=level)
        self.level, self.allow_few = level, allow_few

    @property
    def label(self) -> str:
        """``wavelet``."""
        return "wavelet"

    def provenance(self) -> dict[str, Any]:
        """Wavelet and level."""
        return {"class": "FrechetWaveletDistance", "wavelet": "haar", "level": self._level(self.sets.image_size)}

    def check(self, sets: Sets) -> None:
        """Refuse fewer images than coefficients, and odd sides."""
        level = self._level(sets.image_size)
        if level < 1 or sets.image_size % 2**level:
            raise ValueError(
                f"`level`: images of {sets.image_size} px cannot be split {max(level, 1)} times into halves. Take "
                "another level or size, or leave WaveletMetrics out."
            )
        dim = 3 * (sets.image_size // 2**level) ** 2
        least = 2 if self.allow_few else max(2, dim)
        for kind, count in (("real", sets.real), ("generated", sets.generated)):
            if count < least:
                allow = f" or `level` (now {level}), or set `allow_few`" if count > 1 else ""
                raise ValueError(
                    f"frechet_wavelet: packets of {dim} coefficients need {least} images or more, got {count} {kind} "
                    f"ones. Raise their number{allow}. Sides that 2 divides more often give smaller packets."
                )

    def _level(self, image_size: int) -> int:
        if self.level is not None:
            return self.level
        level = 0
        while image_size % 2 ** (level + 1) == 0 and image_size // 2 ** (level + 1) >= PACKET_SIDE:
            level += 1
        return level

    def begin_real(self) -> None:
        """Forget the real images and their reconstructions."""
        self._real: dict[str, Tensor] = {}
        self._reconstruction: Tensor | None = None
        level = self._level(self.sets.image_size)
        # Reconstructions take the generated images' place until those come.
        self._metric = FrechetWaveletDistance(self.sets.image_size, level, self.allow_few).to(self.device)

    def begin_generated(self) -> None:
        """Forget the generated images."""
        self._metric.reset()
        _put_states(self._metric, self._real)

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch."""
        self._metric.update(images, real=role == "real")

    def real_state(self) -> dict[str, Tensor]:
        """Sums of the packets, and the reconstructions' distance."""
        state = _real_states(self._metric)
        if self.sets.autoencoder is not None:
            state["reconstruction"] = self._metric.compute()
        return state

    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``real_state`` gave."""
        self._reconstruction = state.get("reconstruction")
        self._real = {name: tensor for name, tensor in state.items() if name != "reconstruction"}
        self.begin_generated()

    def compute(self) -> dict[str, Value]:
        """The distances."""
        made = self.provenance()
        counts = {"generated": self.sets.generated, "real": self.sets.real}
        # As all Frechet distances are.
        found = Value(float(self._metric.compute()), "lower", made | counts, biased_by=tuple(counts))
        values = {"frechet_wavelet": found}
        if self._reconstruction is not None:
            counts = {"reconstructed": self.sets.real, "real": self.sets.real}
            found = Value(float(self._reconstruction), "lower", made | counts, biased_by=tuple(counts))
            values["reconstruction_frechet_wavelet"] = found
        return values


class CaptionMetrics(Measure):
    """How well generated images fit their captions: ``clip_score``.

    Args:
        score: The model, and how it is used.
    """

    def __init__(self, score: CLIPScore) -> None:
        super().__init__()
        self.score = score
        self._made_with = score.provenance()

    @property
    def label(self) -> str:
        """``clip_score``."""
        return "clip_score"

    def provenance(self) -> dict[str, Any]:
        """That of the score."""
        return self._made_with

    def check(self, sets: Sets) -> None:
        """Refuse images without captions."""
        if not sets.captions:
            raise ValueError(
                "clip_score needs a caption beside each generated image, in a .txt file of the same name: leave "
                "CaptionMetrics out where there are none."
            )

    def begin_real(self) -> None:
        """Nothing is kept of real images."""

    def begin_generated(self) -> None:
        """Forget the generated images."""
        self._rows = Rows(1, self.device)

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch."""
        if role == "generated":
            self._rows.add(index, self.score.pairs(images, captions or []))

    def real_state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def compute(self) -> dict[str, Value]:
        """The mean."""
        _, self._scores = self._rows.all()
        made = self._made_with | {"generated": len(self._scores)}
        mean = float(self._scores.double().mean())
        return {"clip_score": Value(mean, "higher", made, resampling=Resampling("mean", "clip_score"))}

    def samples(self) -> dict[str, Tensor]:
        """Score of each image."""
        return {"clip_score": self._scores[:, 0]}
