"""Report folders as evaluations write them, of images and features that are drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from lpl_lightning.evaluation.report import SAMPLES, Report, Resampling, Value
from lpl_lightning.metrics.frechet import frechet_distance
from lpl_lightning.metrics.reference import ReferenceStatistics
from lpl_lightning.metrics.spectrum import FLOOR, PowerSpectrum, radial_power
from lpl_lightning.metrics.spectrum_plot import write_spectra

COUNT = 60
DIM = 6
SIDE = 16
EXTRACTOR = {"class": "Given", "weights": "abc", "library": "given 1"}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference() -> ReferenceStatistics:
    """The same for all runs."""
    real = drawn(200, DIM, seed=1).double() @ drawn(DIM, DIM, seed=2).double()
    return ReferenceStatistics(real.mean(0), real.T.cov(), 200, EXTRACTOR)


def features(quality: float, count: int = COUNT, seed: int = 3) -> Tensor:
    """Those of images that are the better the nearer ``quality`` is to 0; equal seeds give images that are alike."""
    return drawn(count, DIM, seed=seed) @ drawn(DIM, DIM, seed=2) * (1 - quality / 2) + quality


def write_run(
    folder: Path,
    name: str,
    quality: float = 0.0,
    count: int = COUNT,
    seed: int | None = 0,
    extractor: dict[str, Any] | None = None,
    reference_hash: str = "r0",
    pictures: list[Image.Image] | None = None,
    captions: list[str] | None = None,
    **changes: Any,
) -> Path:
    """Write ``report.json`` and all beside it; images lie in ``folder/images``. Returns ``folder``."""
    made = EXTRACTOR | (extractor or {})
    counts = {"generated": count, "real": 200}
    of_images, real = features(quality, count), reference()
    x = of_images.double()
    distance = frechet_distance(real.mean, real.covariance, x.mean(0), x.T.cov())
    scores = 0.3 - 0.05 * quality + 0.02 * drawn(count, seed=4)
    similarity = 0.8 - 0.1 * quality + 0.05 * drawn(200, seed=5)
    images = (0.4 * drawn(count, 3, SIDE, SIDE, seed=6) * (1 - quality / 2)).clamp(-1, 1)
    spectrum = PowerSpectrum(SIDE)
    spectrum.update((0.4 * drawn(50, 3, SIDE, SIDE, seed=7)).clamp(-1, 1), real=True)
    spectrum.update(images, real=False)
    spectra = spectrum.compute()
    values = {
        "fid": Value(
            distance.item(),
            "lower",
            made | counts,
            resampling=Resampling("frechet", "features_given"),
            biased_by=("generated", "real"),
        ),
        "kid": Value(0.01 + quality, "lower", made | counts, std=0.002),
        "clip_score": Value(100 * scores.mean().item(), "higher", {}, resampling=Resampling("mean", "clip", scale=100)),
        "reconstruction_ssim": Value(
            similarity.mean().item(), "higher", made, resampling=Resampling("mean", "ssim", "real")
        ),
        "brightness": Value(
            images.mean((1, 2, 3)).mean().item(), None, {}, resampling=Resampling("mean", "brightness")
        ),
        "spectrum_log_difference": Value(
            spectra.mean_absolute_log_difference.item(), "lower", {}, resampling=Resampling("spectrum", "log_power")
        ),
    }
    report = Report(
        name,
        values,
        images={"folder": "images", "count": count, "image_size": SIDE, "hash": f"{quality}"},
        reference={"name": "photos", "count": 200, "hash": reference_hash},
        generation={"weights": f"w{quality}", "steps": 50} | ({} if seed is None else {"seed": seed}),
        versions={"torch": "2"},
    )
    for key, changed in changes.items():
        setattr(report, key, changed)
    report.write(folder)
    save_file(
        {
            "index_generated": torch.arange(count),
            "index_real": torch.arange(200),
            "features_given": of_images,
            "clip": scores,
            "ssim": similarity,
            "brightness": images.mean((1, 2, 3)),
            "log_power": radial_power(images).clamp(min=FLOOR).log().float(),
            "log_power_real": spectra.real_log_power,
        },
        folder / SAMPLES,
    )
    real.save(folder / "reference_given.safetensors")
    write_spectra(spectra, folder / "spectra.csv")
    shown = [to_pil_image((image + 1) / 2) for image in images[:5]] if pictures is None else pictures
    for index, picture in enumerate(shown):
        path = folder / "images" / f"{index % 2:04d}" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        if captions is not None:
            path.with_suffix(".txt").write_text(captions[index], encoding="utf-8")
    return folder
