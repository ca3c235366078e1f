from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio

from lpl_lightning.metrics.reconstruction import LPIPS, Reconstruction


def pairs(count: int = 5, side: int = 16) -> tuple[Tensor, Tensor]:
    """Reconstructions of images, some much worse than others, some beyond [-1, 1]."""
    images = torch.rand(count, 3, side, side) * 2 - 1
    error = torch.randn_like(images) * torch.logspace(-2, 0, count).view(-1, 1, 1, 1)
    return images + error, images


def naive_psnr(reconstructed: Tensor, images: Tensor) -> list[float]:
    values = []
    for one, other in zip(reconstructed.clamp(-1, 1).double(), images.double(), strict=True):
        squares = [(a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
        values.append(10 * math.log10(4 / (sum(squares) / len(squares))))
    return values


def naive_ssim(one: Any, other: Any) -> float:
    """Of one image (3, N, N) in [-1, 1], window by window (Wang et al., 2004, eq. 13), reflected beyond its borders.

    Its values are moved to [0, 1], where black is 0 as in their 0 to 255.
    """
    c1, c2 = 0.01**2, 0.03**2
    ramp = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(ramp, ramp) / ramp.sum() ** 2
    values = []
    for a, b in zip((np.asarray(one, float) + 1) / 2, (np.asarray(other, float) + 1) / 2, strict=True):
        x, y = np.pad(a, 5, "reflect"), np.pad(b, 5, "reflect")
        for row in range(len(a)):
            for column in range(len(a)):
                p, q = (image[row : row + 11, column : column + 11] for image in (x, y))
                mu, nu = (weights * p).sum(), (weights * q).sum()
                variances = (weights * (p - mu) ** 2).sum() + (weights * (q - nu) ** 2).sum()
                covariance = (weights * (p - mu) * (q - nu)).sum()
                value = (2 * mu * nu + c1) * (2 * covariance + c2)
                values.append(value / ((mu**2 + nu**2 + c1) * (variances + c2)))
    return float(np.mean(values))


def measured(reconstructed: Tensor, images: Tensor, batch: int = 100, **settings: Any) -> dict[str, float]:
    metric = Reconstruction(**settings)
    for one, other in zip(reconstructed.split(batch), images.split(batch), strict=True):
        metric.update(one, other)
    return {name: float(value) for name, value in metric.compute().items()}


def test_psnr_is_the_mean_over_images() -> None:
    reconstructed, images = pairs()
    found = measured(reconstructed, images)["psnr"]
    assert found == pytest.approx(np.mean(naive_psnr(reconstructed, images)), rel=1e-6)
    of_the_set = PeakSignalNoiseRatio(data_range=(-1.0, 1.0))(reconstructed, images)
    assert of_the_set < found - 5


def test_ssim_equals_a_loop_over_windows() -> None:
    reconstructed, images = pairs(3, 12)
    expected = [naive_ssim(a.clamp(-1, 1), b) for a, b in zip(reconstructed, images, strict=True)]
    assert measured(reconstructed, images)["ssim"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0.1 < np.mean(expected) < 0.9


def test_a_known_error_in_closed_form() -> None:
    images = torch.zeros(2, 3, 16, 16)
    reconstructed = torch.full_like(images, 0.2)
    reconstructed[1] = -0.02
    # Errors of a tenth and a hundredth of the range.
    assert measured(reconstructed, images)["psnr"] == pytest.approx(30.0, abs=1e-4)
    assert measured(images, images) == {"psnr": math.inf, "ssim": 1.0}


@pytest.mark.parametrize(("one", "other"), [(0.02, -0.02), (-0.9, -0.8), (0.7, 1.0)])
def test_the_ssim_of_flat_images_in_closed_form(one: float, other: float) -> None:
    """Nothing but luminance differs: (2 a b + C1) / (a^2 + b^2 + C1) of the images in [0, 1]."""
    a, b = (one + 1) / 2, (other + 1) / 2
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    shape = (1, 3, 16, 16)
    found = measured(torch.full(shape, one), torch.full(shape, other))["ssim"]
    assert found == pytest.approx(expected, abs=1e-6)  # images are float32


class Difference(nn.Module):
    """A distance with weights, to stand where LPIPS's network is not."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        difference: Tensor = self.convolution(reconstructed) - self.convolution(images)
        return difference.square().mean((1, 2, 3), keepdim=True)


def test_batches_do_not_matter() -> None:
    reconstructed, images = pairs(7)
    lpips = LPIPS(Difference())
    expected = measured(reconstructed, images, lpips=lpips)
    assert expected.keys() == {"psnr", "ssim", "lpips"}
    for batch in (1, 3):
        assert measured(reconstructed, images, batch, lpips=lpips) == pytest.approx(expected, rel=1e-6)


def test_neither_autocast_nor_a_lower_precision_changes_the_values() -> None:
    reconstructed, images = pairs()
    lpips = LPIPS(Difference())
    expected = measured(reconstructed, images, lpips=lpips)
    metric = Reconstruction(lpips).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(reconstructed, images)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_precision(dtype: torch.dtype) -> None:
    reconstructed, images = pairs()
    network = Difference().to(dtype)
    exact = copy.deepcopy(network).double()  # the same weights
    with torch.no_grad():
        expected = exact(reconstructed.clamp(-1, 1).double(), images.double()).mean()
    found = measured(reconstructed, images, lpips=LPIPS(network))["lpips"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_network_that_a_trainer_puts_in_double_precision() -> None:
    reconstructed, images = pairs()
    lpips = LPIPS(Difference())
    expected = measured(reconstructed, images, lpips=lpips)
    metric = Reconstruction(lpips).to(torch.float64)
    metric.update(reconstructed.double(), images.double())
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-5)


def test_the_network_is_frozen_and_not_saved() -> None:
    lpips = LPIPS(Difference())
    metric = Reconstruction(lpips)
    assert not metric.state_dict()
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    metric.train()
    assert not any(module.training for module in lpips.modules())


def test_a_network_that_averages_the_batch_is_refused() -> None:
    class Mean(nn.Module):
        def forward(self, reconstructed: Tensor, images: Tensor) -> Tensor:
            return (reconstructed - images).abs().mean()

    with pytest.raises(ValueError, match="one value per image, got .. for 5 images"):
        Reconstruction(LPIPS(Mean())).update(*pairs())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty folder in place of torch's; the folder."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "file"),
    [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth")],
)
def test_without_a_network_connection_the_error_names_the_file(offline: Path, name: Any, file: str) -> None:
    with pytest.raises(FileNotFoundError, match="no route to host") as caught:
        LPIPS(name)
    assert f"https://download.pytorch.org/models/{file}" in str(caught.value)
    assert f"{offline}/{file}" in str(caught.value)


def test_weights_put_where_the_error_says_are_used(offline: Path) -> None:
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    offline.mkdir(parents=True)
    torch.save(network.state_dict(), offline / "squeezenet1_1-b8a52dc0.pth")
    reconstructed, images = pairs(3, 64)
    found = measured(reconstructed, images, lpips=LPIPS("squeeze"))["lpips"]

    heads = torch.load(Path(torchmetrics.__file__).parent / "functional/image/lpips_models/squeeze.pth", "cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    one, other = ((x.clamp(-1, 1) - shift) / scale for x in (reconstructed, images))
    total = torch.zeros(3)
    taps = [1, 4, 7, 9, 10, 11, 12]
    with torch.no_grad():
        for index, layer in enumerate(network.features):
            one, other = layer(one), layer(other)
            if index in taps:
                unit = [x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (one, other)]
                head = heads[f"lin{taps.index(index)}.model.1.weight"]  # (1, C, 1, 1)
                total += ((unit[0] - unit[1]).square() * head[0]).sum(1).mean((1, 2))
    assert found > 0
    assert found == pytest.approx(float(total.mean()), rel=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    reconstructed, images = pairs()
    metric = Reconstruction()
    bad = reconstructed.clone()
    bad[2, 0, 0, 0] = torch.nan
    for arguments, message in (
        ((reconstructed[..., :12], images), "`reconstructed` must have the shape"),
        ((reconstructed[:1], images), "`reconstructed` must have the shape"),
        ((bad, images), "`reconstructed` must be finite, got NaN or infinite values in 1 of 5"),
        ((images, bad), "`images` must be"),
        ((reconstructed, images * 255), "Clamp"),
        ((reconstructed[..., :10], images[..., :10]), "11 pixels or more"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*arguments)
    with pytest.raises(ValueError, match="got none"):
        metric.compute()
    unknown: Any = "resnet"
    with pytest.raises(ValueError, match="`network` must be one of"):
        LPIPS(unknown)
