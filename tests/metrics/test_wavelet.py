from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lpl_lightning.metrics.wavelet import FrechetWaveletDistance, WaveletFeatures


def noise(count: int, height: int = 8, width: int | None = None) -> Tensor:
    return torch.rand(count, 3, height, width or height) * 2 - 1


def halves(values: list[float]) -> tuple[list[float], list[float]]:
    """Sums and differences of neighbours, over the root of 2."""
    pairs = list(zip(values[::2], values[1::2], strict=True))
    return [(a + b) / 2**0.5 for a, b in pairs], [(a - b) / 2**0.5 for a, b in pairs]


def naive(image: list[list[float]], level: int) -> dict[tuple[int, int], list[list[float]]]:
    """Packets of one channel by the numbers of their passes (down, along), a level after the other."""
    packets = {(0, 0): image}
    for step in range(level):
        split = {}
        for (y, x), packet in packets.items():
            for along in (0, 1):
                rows = [halves(row)[along] for row in packet]
                for down in (0, 1):
                    columns = [halves(list(column))[down] for column in zip(*rows, strict=True)]
                    split[y + (down << step), x + (along << step)] = [list(row) for row in zip(*columns, strict=True)]
        packets = split
    return packets


@pytest.mark.parametrize(("level", "height", "width"), [(1, 2, 2), (2, 8, 8), (3, 16, 8)])
def test_equals_pairwise_sums_and_differences(level: int, height: int, width: int) -> None:
    images = noise(2, height, width)
    found = WaveletFeatures(level)(images)
    assert found.shape == (2, 4**level, 3 * (height >> level) * (width >> level))
    for packets, image in zip(found, images.double(), strict=True):
        expected = [naive(channel.tolist(), level) for channel in image]
        for (y, x), first in expected[0].items():
            packet = [value for channel in expected for row in channel[y, x] for value in row]
            assert len(packet) == 3 * len(first) * len(first[0])
            np.testing.assert_allclose(packets[y * 2**level + x].numpy(), packet, rtol=1e-9, atol=1e-12)


def test_energy_is_conserved_and_so_are_angles() -> None:
    one, other = noise(4, 32), noise(4, 32)
    for level in (1, 3, 5):
        features = WaveletFeatures(level)
        products = (features(one) * features(other)).sum((1, 2))
        torch.testing.assert_close(products, (one.double() * other.double()).sum((1, 2, 3)), rtol=1e-12, atol=1e-12)


def test_what_is_in_which_packet() -> None:
    features = WaveletFeatures(2)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    cases = {
        0: torch.ones(8, 8),  # flat
        1: stripes.expand(8, 8),  # along the rows, at the finest level
        4: stripes[:, None].expand(8, 8),  # down the columns
        5: stripes * stripes[:, None],  # a checkerboard
        3: torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(2).expand(8, 8),
        2: torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(2).expand(8, 8),
    }
    for packet, image in cases.items():
        energy = features(image.expand(1, 3, 8, 8)).square().sum(2)[0]
        assert energy.nonzero().flatten().tolist() == [packet]


def distance(real: Tensor, generated: Tensor, level: int = 2, batch: int = 100) -> float:
    metric = FrechetWaveletDistance(real.shape[-1], level)
    for images, is_real in ((real, True), (generated, False)):
        for chunk in images.split(batch):
            metric.update(chunk, real=is_real)
    return float(metric.compute())


def test_equals_the_closed_form_of_gaussians_packet_by_packet() -> None:
    real, generated = noise(40, 4), noise(50, 4) * 0.7 + 0.1
    expected = []
    for packet in range(16):
        means, covariances = [], []
        for images in (real, generated):
            coefficients = [
                [
                    np.array(naive(((channel.double() + 1) / 2).tolist(), 2)[packet // 4, packet % 4]).item()
                    for channel in image
                ]
                for image in images
            ]
            means.append(np.mean(coefficients, 0))
            covariances.append(np.cov(np.array(coefficients).T))
        roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real)
        traces = np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()
        expected.append(((means[0] - means[1]) ** 2).sum() + traces)
    assert distance(real, generated) == pytest.approx(np.mean(expected), rel=1e-8)


def test_a_shift_and_a_scale_in_closed_form() -> None:
    real = noise(60, 8) * 0.5
    # The mean of packet 0 moves by 2^2 * 0.1 / 2 in each of its 12 coefficients, of images in [0, 1].
    assert distance(real, real + 0.1) == pytest.approx(12 * 0.2**2 / 16, rel=1e-5)
    # mu and the roots of Sigma are all multiplied by 1.5.
    packets = WaveletFeatures(2)(real)
    size = (packets.var(0) + packets.mean(0).square()).sum(1)
    assert distance(real, real * 1.5) == pytest.approx(float(0.25 * size.mean() / 4), rel=1e-5)
    assert distance(real, real) == pytest.approx(0, abs=1e-9)


def test_noise_and_blur_are_further_away_the_stronger_they_are() -> None:
    low = torch.nn.functional.interpolate(noise(60, 4), 16, mode="bicubic").clamp(-1, 1)
    for spoil in (
        lambda x, much: (x + 0.2 * much * torch.randn_like(x)).clamp(-1, 1),
        lambda x, much: torch.nn.functional.avg_pool2d(x, 2 * much + 1, 1, much),
    ):
        distances = [distance(low, spoil(low, much), level=3) for much in (1, 2, 3)]
        assert distances == sorted(distances)
        assert distances[0] > 0


def test_batches_do_not_matter() -> None:
    real, generated = noise(33), noise(31)
    expected = distance(real, generated)
    for batch in (1, 7):
        assert distance(real, generated, batch=batch) == pytest.approx(expected, rel=1e-10)


def test_sums_stay_in_double_precision_in_a_module_of_lower_precision() -> None:
    metric = FrechetWaveletDistance(8, 2).to(torch.bfloat16)
    real, generated = noise(33), noise(31)
    for _ in range(2):  # once more after a reset
        metric.reset()
        metric.update(real, real=True)
        metric.update(generated, real=False)
        assert float(metric.compute()) == pytest.approx(distance(real, generated), rel=1e-10)
    assert not metric.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_exact_in_a_module_of_lower_precision(dtype: torch.dtype) -> None:
    images = noise(3)
    torch.testing.assert_close(WaveletFeatures(2).to(dtype)(images), WaveletFeatures(2)(images), rtol=0, atol=0)


def test_a_call_is_refused_and_loses_nothing() -> None:
    real, generated = noise(33), noise(31)
    metric = FrechetWaveletDistance(8, 2)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with pytest.raises(ValueError, match=r"`FrechetWaveletDistance` must be given batches by `update`, got a call"):
        metric(generated, real=False)
    assert float(metric.compute()) == pytest.approx(distance(real, generated), rel=1e-12)


def test_too_few_images_are_refused_unless_allowed() -> None:
    metric = FrechetWaveletDistance(8, 2)
    metric.update(noise(12), real=True)
    metric.update(noise(11), real=False)
    with pytest.raises(ValueError, match="12 generated images or more for packets of 12 coefficients, got 11"):
        metric.compute()
    few = FrechetWaveletDistance(8, 2, allow_few=True)
    few.update(noise(12), real=True)
    few.update(noise(1), real=False)
    with pytest.raises(ValueError, match="2 generated images or more"):
        few.compute()
    few.update(noise(4), real=False)
    assert float(few.compute()) > 0


def test_images_that_do_not_fit_are_refused() -> None:
    metric = FrechetWaveletDistance(8, 2)
    for images, message in (
        (torch.full((1, 3, 8, 8), torch.nan), "not finite"),
        (torch.zeros(1, 3, 8, 16), "8 x 8 pixels"),
        (torch.zeros(1, 1, 8, 8), "RGB"),
        (torch.full((1, 3, 8, 8), 2.0), r"\[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(images, real=True)
    with pytest.raises(ValueError, match="sides divisible by 8"):
        WaveletFeatures(3)(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match="`level` may be 3 at most"):
        FrechetWaveletDistance(24)
    with pytest.raises(ValueError, match="crop to an even side"):
        FrechetWaveletDistance(25)
    with pytest.raises(ValueError, match="`level` must be 1 or more"):
        WaveletFeatures(0)
