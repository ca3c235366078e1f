r"""Which statistics should normalize the features? Measurements for the default of ``LatentPerceptualLoss``.

Directions, on a trained model's estimates of validation images, by noise level:

    python notebooks/statistics_modes.py directions BASE.ckpt IMAGES

prints the cosine between the gradient of each mode's loss at z0_hat and that of the squared error of the decoded
images, :math:`\| D(\hat z_0) - D(z_0) \|^2`.

Sharpness, of samples of models that were trained on with each mode:

    python notebooks/statistics_modes.py sharpness IMAGES A.ckpt B.ckpt ...

prints gradient energy and power above half the Nyquist frequency, over those of the autoencoder's reconstructions of
validation images. 1 is as sharp as the autoencoder can be; more is texture that is not there.

IMAGES is a folder with one sub-folder a class, or ``shapes``.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch
from torch import Tensor

from lpl_lightning import ImageFolderDataModule, LatentDiffusionModule, LatentPerceptualLoss, ShapesDataModule
from lpl_lightning.losses.distance import Statistics

TIMES = (100.0, 200.0, 300.0, 400.0)


def validation_batch(images: str, image_size: int, count: int) -> dict[str, Any]:
    """The first validation images, and their labels."""
    data = (
        ShapesDataModule(image_size, batch_size=count, num_workers=0)
        if images == "shapes"
        else ImageFolderDataModule(images, val_root=images, image_size=image_size, batch_size=count, num_workers=0)
    )
    data.prepare_data()
    data.setup("validate")
    batch: dict[str, Any] = next(iter(data.val_dataloader()))
    return batch


def losses_of(module: LatentDiffusionModule, relative_eps: float) -> dict[str, LatentPerceptualLoss]:
    """A loss a mode, without gate."""
    return {
        mode: LatentPerceptualLoss(
            module.autoencoder, statistics=mode, threshold=float("inf"), relative_eps=relative_eps
        )
        for mode in get_args(Statistics)
    }


def estimates(module: LatentDiffusionModule, batch: dict[str, Any], t: float) -> tuple[Tensor, Tensor]:
    """z0_hat and z0 at one time of 0 to 1000."""
    generator = torch.Generator().manual_seed(0)
    z0 = module.autoencoder.encode(batch["image"], generator)
    noisy = module.noise.sample(z0, generator, torch.full((len(z0),), t))
    with torch.no_grad():
        prediction = module.denoiser(noisy.z_t, noisy.t, module.conditioner(batch, len(z0)))
    return module.noise.estimate_z0(prediction, noisy).detach(), z0


def cosines(a: Tensor, b: Tensor) -> float:
    """Mean over samples."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


def directions(checkpoint: str, images: str, image_size: int, count: int, relative_eps: float) -> None:
    """Print how each mode's gradient compares with that of the decoded error."""
    module = LatentDiffusionModule.load_from_checkpoint(checkpoint, weights_only=True).eval().requires_grad_(False)
    batch = validation_batch(images, image_size, count)
    modes = losses_of(module, relative_eps)
    print(f"cosine with the gradient of the decoded error, mean over {count} images")
    print("| t | latent error | " + " | ".join(modes) + " |\n|" + "---|" * (len(modes) + 2))
    for t in TIMES:
        z0_hat, z0 = estimates(module, batch, t)
        z0_hat.requires_grad_()
        truth = module.autoencoder.decode(z0)
        (pixel,) = torch.autograd.grad((module.autoencoder.decode(z0_hat) - truth).square().sum(), z0_hat)
        row = [cosines(pixel, (z0_hat - z0).detach())]
        for loss in modes.values():
            (gradient,) = torch.autograd.grad(loss(z0_hat, z0).sum(), z0_hat)
            row.append(cosines(pixel, gradient))
        print(f"| {t:.0f} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


def sharpness_of(images: Tensor) -> tuple[float, float]:
    """Mean squared gradient, and power above half the Nyquist frequency, of grey images (B, 3, H, W)."""
    grey = images.float().mean(dim=1)
    energy = grey.diff(dim=-1).square().mean() + grey.diff(dim=-2).square().mean()
    power = torch.fft.fft2(grey - grey.mean(dim=(-2, -1), keepdim=True), norm="ortho").abs().square()
    frequencies = torch.fft.fftfreq(grey.shape[-1])
    radius = (frequencies[:, None].square() + frequencies[None].square()).sqrt()
    return energy.item(), power[:, radius > 0.25].mean().item()


def sharpness(images: str, checkpoints: list[str], image_size: int, count: int) -> None:
    """Print how sharp each model's samples are."""
    real: tuple[float, float] | None = None
    print("| checkpoint | gradient energy | high-frequency power |\n|---|---|---|")
    for checkpoint in checkpoints:
        module = LatentDiffusionModule.load_from_checkpoint(checkpoint, weights_only=True).eval().requires_grad_(False)
        module.sampler.num_steps = 25
        batch = validation_batch(images, image_size, count)
        if real is None:
            decoded = module.autoencoder.decode(module.autoencoder.encode(batch["image"])).clamp(-1, 1)
            real = sharpness_of(decoded)
            print(
                f"| images | {sharpness_of(batch['image'])[0] / real[0]:.3f} "
                f"| {sharpness_of(batch['image'])[1] / real[1]:.3f} |"
            )
        samples = torch.cat(
            [module.generate(range(i, min(i + 64, count)), batch["label"][i : i + 64]) for i in range(0, count, 64)]
        )
        energy, power = sharpness_of(samples)
        print(f"| {checkpoint} | {energy / real[0]:.3f} | {power / real[1]:.3f} |", flush=True)


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_directions = commands.add_parser("directions")
    of_directions.add_argument("checkpoint")
    of_directions.add_argument("images")
    of_directions.add_argument("--relative_eps", type=float, default=0.0)
    of_sharpness = commands.add_parser("sharpness")
    of_sharpness.add_argument("images")
    of_sharpness.add_argument("checkpoints", nargs="+")
    for command, count in ((of_directions, 64), (of_sharpness, 256)):
        command.add_argument("--image_size", type=int, default=64)
        command.add_argument("--count", type=int, default=count)
    given = parser.parse_args()
    if given.command == "directions":
        directions(given.checkpoint, given.images, given.image_size, given.count, given.relative_eps)
    else:
        sharpness(given.images, given.checkpoints, given.image_size, given.count)


if __name__ == "__main__":
    main()
