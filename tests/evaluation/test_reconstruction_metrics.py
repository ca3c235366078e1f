from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_ranks import photos
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.reconstruction_metrics import ReconstructionMetrics
from lpl_lightning.evaluation.report import Value
from lpl_lightning.metrics.reconstruction import LPIPS

REAL, AGAIN = photos(61, 1), photos(61, 1, 0.9)


def values(
    measure: ReconstructionMetrics, reconstructed: Tensor | None = AGAIN, batch_size: int = 16
) -> dict[str, Value]:
    measure.begin(Sets(16, 61, 5, autoencoder=None if reconstructed is None else "small"), torch.device("cpu"))
    for index in torch.arange(61).split(batch_size):
        measure.update(REAL[index], "real", index)
        if reconstructed is not None:
            measure.update(reconstructed[index], "reconstructed", index)
    measure.put_real_state(measure.real_state())
    measure.begin_generated()
    measure.update(REAL[:5] * 0.5, "generated", torch.arange(5))
    return measure.compute()


class Gap(nn.Module):
    """A perceptual distance of its own kind, which tells a reconstruction from what it is of."""

    def forward(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        return (reconstructed - 0.5 * images).abs().amax((1, 2, 3))


def test_reconstructions() -> None:
    measure = ReconstructionMetrics(LPIPS(Gap()))
    found = values(measure)
    psnr = [
        10 * math.log10(4 / float((a.double() - b.double()).square().mean())) for a, b in zip(AGAIN, REAL, strict=True)
    ]
    assert list(found) == [f"reconstruction_{name}" for name in ("psnr", "ssim", "lpips")]
    assert found["reconstruction_psnr"].value == pytest.approx(np.mean(psnr), rel=1e-6)
    of: Any = structural_similarity_index_measure((AGAIN.double() + 1) / 2, (REAL.double() + 1) / 2, data_range=1.0)
    assert found["reconstruction_ssim"].value == pytest.approx(float(of), rel=1e-6)
    gap, turned = (float((a - 0.5 * b).abs().amax((1, 2, 3)).mean()) for a, b in ((AGAIN, REAL), (REAL, AGAIN)))
    assert found["reconstruction_lpips"].value == pytest.approx(gap, rel=1e-6) != pytest.approx(turned, rel=1e-2)
    assert [value.better for value in found.values()] == ["higher", "higher", "lower"]
    said = found["reconstruction_psnr"].provenance
    assert (said["autoencoder"], said["reconstructed"]) == ("small", 61)
    assert "lpips_weights" in said
    assert "lpips_weights" not in ReconstructionMetrics().provenance()
    samples = measure.samples()
    np.testing.assert_allclose(samples["reconstruction_psnr"].numpy(), psnr, rtol=1e-6)
    for name, value in found.items():
        assert value.resampling is not None
        assert (value.resampling.kind, value.resampling.of, value.resampling.key) == ("mean", "real", name)
        assert float(samples[name].double().mean()) == pytest.approx(value.value, rel=1e-9)
    one: Any = peak_signal_noise_ratio(AGAIN[3:4], REAL[3:4], data_range=2.0)
    assert float(samples["reconstruction_psnr"][3]) == pytest.approx(float(one), rel=1e-5)


def test_without_reconstructions_there_is_nothing(tmp_path: Path) -> None:
    measure = ReconstructionMetrics()
    assert values(measure, None) == {}
    assert measure.samples() == {}
    assert measure.write(tmp_path) == []


def test_a_perfect_reconstruction_leaves_the_psnr_without_an_interval(tmp_path: Path) -> None:
    measure = ReconstructionMetrics()
    values(measure)
    assert measure.write(tmp_path) == []
    again = AGAIN.clone()
    again[7] = REAL[7]
    found = values(measure, again)
    assert found["reconstruction_psnr"].value == math.inf
    assert found["reconstruction_psnr"].resampling is None
    assert found["reconstruction_ssim"].resampling is not None
    (note,) = measure.write(tmp_path)
    assert note.startswith("reconstruction_psnr: 1 of 61 images are given back exactly")
    assert not list(tmp_path.iterdir())
