from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lpl_lightning.metrics.spectrum import PowerSpectrum, Spectra, radial_counts, radial_power


def naive(image: Tensor, window: bool = False, corners: bool = False) -> list[float]:
    """Rings of one image (3, N, N) in a loop over NumPy's frequencies."""
    red, green, blue = image.double().numpy()
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    side = len(luminance)
    if window:
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side)
        taper = np.outer(hann, hann)
        taper /= np.sqrt((taper**2).mean())
        luminance = luminance.mean() + (luminance - luminance.mean()) * taper
    coefficients = np.fft.fft2(luminance) / side**2
    rings: dict[int, list[float]] = {}
    for row in range(side):
        for column in range(side):
            y = row if row <= side / 2 else row - side
            x = column if column <= side / 2 else column - side
            ring = math.floor(math.sqrt(x * x + y * y) + 0.5)
            rings.setdefault(ring, []).append(abs(coefficients[row, column]) ** 2)
    last = max(rings) if corners else side // 2
    return [sum(rings[ring]) / len(rings[ring]) for ring in range(last + 1)]


def grating(side: int, x: int, y: int, amplitude: float = 0.5) -> Tensor:
    """(1, 3, N, N) with x and y cycles."""
    at = torch.arange(side, dtype=torch.float64) / side
    wave = amplitude * torch.cos(2 * torch.pi * (x * at + y * at[:, None]) + 0.3)
    return wave.expand(1, 3, side, side)


def noise(count: int = 6, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side) * 2 - 1


@pytest.mark.parametrize("side", [2, 8, 9, 16])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("window", [False, True])
def test_equals_a_loop_over_frequencies(side: int, window: bool, corners: bool) -> None:
    images = noise(3, side)
    expected = torch.tensor([naive(image, window, corners) for image in images], dtype=torch.float64)
    torch.testing.assert_close(radial_power(images, window, corners), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("side", [98, 196])
def test_sides_whose_frequencies_are_no_integers_in_floating_point(side: int) -> None:
    """1 / side, of which torch makes frequencies, is rounded: Nyquist must be told from its neighbours all the same."""
    assert torch.fft.rfftfreq(side, 1 / side, dtype=torch.float64)[-1] != side // 2
    image = noise(1, side)
    expected = torch.tensor(naive(image[0], corners=True), dtype=torch.float64)
    found = radial_power(image, corners=True)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-18)
    counts = radial_counts(side, corners=True)
    assert counts.sum() == side**2
    grey = image[:, :1]
    whole = (radial_power(grey, corners=True) * counts).sum()
    torch.testing.assert_close(whole, grey.double().square().mean(), rtol=1e-12, atol=0)
    # One column of coefficients or one row holds all of these, a column that no other mirrors.
    for x, y in ((side // 2, 0), (0, side // 2)):
        power = radial_power(grating(side, x, y))[0, -1] * radial_counts(side)[-1]
        assert power == pytest.approx((0.5 * math.cos(0.3)) ** 2, rel=1e-6)


@pytest.mark.parametrize(("x", "y", "ring"), [(5, 0, 5), (3, 4, 5), (-4, 3, 5), (0, 1, 1), (2, 2, 3), (0, 16, 16)])
def test_a_grating_is_in_one_ring(x: int, y: int, ring: int) -> None:
    power = radial_power(grating(32, x, y))[0]
    at_nyquist = 2 * math.cos(0.3) ** 2 if ring == 16 else 1.0  # samples at Nyquist see one phase alone
    assert power[ring] * radial_counts(32)[ring] == pytest.approx(0.5**2 / 2 * at_nyquist, rel=1e-6)
    power[ring] = 0
    assert power.max() < 1e-20


@pytest.mark.parametrize("side", [8, 15])
def test_parseval(side: int) -> None:
    images = noise(4, side)[:, :1]
    whole = (radial_power(images, corners=True) * radial_counts(side, corners=True)).sum(1)
    torch.testing.assert_close(whole, images.double().square().mean((1, 2, 3)))
    assert radial_counts(side, corners=True).sum() == side**2
    rings = side // 2 + 1
    torch.testing.assert_close(radial_power(images), radial_power(images, corners=True)[:, :rings])


def test_white_noise_is_flat() -> None:
    images = 0.3 * torch.randn(400, 1, 32, 32)
    power = radial_power(images).mean(0) * 32**2
    # A mean over n exponentially distributed values, half of the frequencies being mirrored.
    spread = (radial_counts(32) / 2 * len(images)).rsqrt()
    assert ((power / 0.09 - 1).abs() < 5 * spread).all()


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_slope_of_noise_that_falls_with_frequency(exponent: float) -> None:
    side = 64
    k = torch.hypot(torch.fft.fftfreq(side, 1 / side)[:, None], torch.fft.fftfreq(side, 1 / side))
    spectrum = torch.fft.fft2(torch.randn(50, 1, side, side)) / k.clamp(min=1) ** exponent
    power = radial_power(torch.fft.ifft2(spectrum).real).mean(0)
    octaves = torch.arange(4, side // 2, dtype=torch.float64).log()
    slope = torch.cov(torch.stack([octaves, power[4 : side // 2].log()]))
    assert slope[0, 1] / slope[0, 0] == pytest.approx(-2 * exponent, abs=0.05)


def test_rotation_and_resolution_do_not_matter() -> None:
    images = noise()
    expected = radial_power(images)
    for turned in (images.rot90(1, (2, 3)), images.flip(3), images.mT, images.roll((3, 5), (2, 3))):
        torch.testing.assert_close(radial_power(turned), expected)
    torch.testing.assert_close(radial_power(grating(32, 3, 4))[:, :17], radial_power(grating(64, 3, 4))[:, :17])


def test_window_keeps_the_border_out_of_high_frequencies() -> None:
    ramp = torch.linspace(-1, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    plain, windowed = radial_power(ramp)[0], radial_power(ramp, window=True)[0]
    assert (windowed[8:] < 1e-3 * plain[8:]).all()
    flat = radial_power(torch.full((1, 3, 16, 16), 0.5), window=True)[0]
    assert flat[0] == pytest.approx(0.25)
    assert flat[1:].max() < 1e-20


def test_luminance_weights() -> None:
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        images = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        images[:, channel] = grating(16, 2, 0)[:, 0]
        torch.testing.assert_close(radial_power(images), radial_power(grating(16, 2, 0)) * weight**2)


def spectra_of(real: Tensor, generated: Tensor, batch: int = 100, **settings: Any) -> Spectra:
    metric = PowerSpectrum(real.shape[-1], **settings)
    for images, is_real in ((real, True), (generated, False)):
        for chunk in images.split(batch):
            metric.update(chunk, real=is_real)
    spectra: Spectra = metric.compute()
    return spectra


@pytest.mark.parametrize("window", [False, True])
def test_metric_equals_loops_over_images(window: bool) -> None:
    real, generated = noise(5), noise(7) * 0.5
    found = spectra_of(real, generated, window=window)
    p, q = (np.array([naive(image, window) for image in images]) for images in (real, generated))
    difference = np.log(q).mean(0) - np.log(p).mean(0)
    expected = {
        "frequency": np.arange(9.0),
        "real_power": p.mean(0),
        "generated_power": q.mean(0),
        "real_log_power": np.log(p).mean(0),
        "generated_log_power": np.log(q).mean(0),
        "log_difference": difference,
        "error": np.abs(q.mean(0) - p.mean(0)) / p.mean(0),
        "mean_absolute_log_difference": np.abs(difference[1:]).mean(),
    }
    assert expected.keys() == found._asdict().keys()
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), value, rtol=1e-9, err_msg=name)


def test_the_difference_says_which_set_has_more() -> None:
    real = noise(8, 32)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    assert (spectra_of(real, blurred).log_difference[8:] < 0).all()
    assert (spectra_of(blurred, real).log_difference[8:] > 0).all()
    same = spectra_of(real, real)
    assert same.error.max() == 0
    assert same.mean_absolute_log_difference == 0


def test_batches_do_not_matter() -> None:
    real, generated = noise(9), noise(8)
    expected = spectra_of(real, generated)
    for batch in (1, 4):
        torch.testing.assert_close(spectra_of(real, generated, batch), expected, rtol=1e-12, atol=0)


def test_sums_stay_in_double_precision_in_a_module_of_lower_precision() -> None:
    metric = PowerSpectrum(16).to(torch.bfloat16)
    real, generated = noise(9), noise(8)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    torch.testing.assert_close(metric.compute(), spectra_of(real, generated), rtol=1e-12, atol=0)
    metric.reset()
    assert metric.real_count == 0
    assert not metric.state_dict()


def test_flat_images_have_finite_logarithms() -> None:
    found = spectra_of(torch.zeros(2, 3, 16, 16), noise(2))
    assert all(value.isfinite().all() for value in found)


def test_errors_by_band() -> None:
    frequency = torch.arange(257, dtype=torch.float64)
    error = torch.where(frequency <= 75, 1.0, torch.where(frequency <= 150, 2.0, 4.0)).double()
    error[0] = 100.0
    unused = torch.zeros(257)
    spectra = Spectra(frequency, unused, unused, unused, unused, unused, error, torch.tensor(0.0))
    assert spectra.band_errors().tolist() == [1.0, 2.0, 4.0]
    assert spectra.band_errors([0.5]).tolist() == [(75 + 2 * 53) / 128, (2 * 22 + 4 * 106) / 128]
    for edges in ([0.5, 0.5], [0.0], [1.0], [0.6, 0.4]):
        with pytest.raises(ValueError, match="`edges` must rise"):
            spectra.band_errors(edges)


BAD = {
    "not square": (torch.zeros(1, 3, 16, 12), "16 x 16 pixels"),
    "another size": (torch.zeros(1, 3, 8, 8), "16 x 16 pixels"),
    "NaN": (torch.full((2, 3, 16, 16), torch.nan), "not finite"),
    "bytes": (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating point"),
    "0 to 255": (torch.full((1, 3, 16, 16), 255.0), r"\[-1, 1\]"),
    "RGBA": (torch.zeros(1, 4, 16, 16), "RGB"),
    "no batch": (torch.zeros(3, 16, 16), "batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_do_not_fit_are_refused(name: str) -> None:
    images, message = BAD[name]
    metric = PowerSpectrum(16)
    with pytest.raises(ValueError, match=message):
        metric.update(images, real=True)
    assert metric.real_count == 0


def test_what_has_no_rings_is_refused() -> None:
    for shape in ((1, 3, 16, 12), (1, 2, 8, 8), (3, 8, 8), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="square"):
            radial_power(torch.zeros(shape))
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="infinite values in 1 of 3"):
        radial_power(images)
    with pytest.raises(ValueError, match="`image_size` must be 2 or more"):
        PowerSpectrum(1)


def test_a_call_is_refused_and_loses_nothing() -> None:
    real, generated = noise(5), noise(4)
    metric = PowerSpectrum(16)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with pytest.raises(ValueError, match=r"`PowerSpectrum` must be given batches by `update`, got a call"):
        metric(generated, real=False)
    torch.testing.assert_close(metric.compute(), spectra_of(real, generated), rtol=1e-12, atol=0)


def test_a_set_without_images_is_refused() -> None:
    metric = PowerSpectrum(16)
    metric.update(noise(), real=True)
    with pytest.raises(ValueError, match="no generated ones"):
        metric.compute()
