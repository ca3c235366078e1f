r"""How well an autoencoder gives images back: PSNR, SSIM and LPIPS, the ceiling of any latent model on it.

.. math:: PSNR(\hat x, x) = 10 \log_{10} \frac{2^2}{\frac{1}{3 H W} \|\hat x - x\|^2}

in dB for images in [-1, 1], whose range is 2. SSIM is that of (x + 1) / 2, whose range is 1, as the field has it: its
term of luminance, (2 m n + C_1) / (m^2 + n^2 + C_1) of the means m and n of a window, depends on where black is, unlike
PSNR.

Each value is the mean over images of that of an image, as autoencoders are reported. PSNR of the error of all pixels of
a set, which ``AutoencoderModule`` logs while it trains, is no larger (Jensen's inequality), and equal where all images
are equally hard; do not compare the two.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from lpl_lightning.frozen import FrozenModule
from lpl_lightning.metrics.gaussian import DoubleMetric
from lpl_lightning.metrics.preparation import check_images
from lpl_lightning.metrics.weight_files import cached_at, download_weights

__all__ = ["LPIPS", "Reconstruction"]

_WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}

_SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window (Wang et al., 2004), in pixels."""


class LPIPS(FrozenModule):
    """Learned Perceptual Image Patch Similarity (Zhang et al., 2018), version 0.1: a distance, lower is closer.

    Frozen, and kept out of checkpoints. The linear heads come with torchmetrics; the network under them is
    torchvision's, trained on ImageNet, and is downloaded unless torch's hub folder has it.

    Args:
        network: Which one: "alex" (the usual choice for evaluation), "vgg" or "squeeze". Or a module called with the
            reconstruction and the image, (B, 3, H, W) in [-1, 1], that gives a value per image, such as ``lpips.LPIPS``
            with weights from elsewhere. It is put in float32, if it came in less.

    Raises:
        FileNotFoundError: The weights are not there and cannot be downloaded; it says where to put which file.
        ValueError: Another name, or what is in the place of the weights is something else.
    """

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] | nn.Module = "alex") -> None:
        super().__init__()
        self.network = network if isinstance(network, nn.Module) else _pretrained(network)
        self.float().requires_grad_(False).train(False)

    def forward(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: The network gives another number of values.
        """
        # It may have come in double precision, or a trainer in that may have widened it.
        weights = (tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point())
        precision = next((tensor.dtype for tensor in weights), torch.float32)
        values: Tensor = self.network(reconstructed.to(precision), images.to(precision))
        if values.numel() != len(images):
            raise ValueError(
                f"`network` must give one value per image, got {tuple(values.shape)} for {len(images)} images. "
                "Let it reduce over positions, but not over the batch."
            )
        return values.flatten()


def _pretrained(name: str) -> nn.Module:
    """The network of torchmetrics' metric, or an error that says how to go on without a network connection."""
    if name not in _WEIGHTS:
        raise ValueError(f"`network` must be one of {tuple(_WEIGHTS)} or a module, got {name!r}.")
    known: Any = name
    url: str = getattr(torchvision.models, _WEIGHTS[name]).DEFAULT.url
    try:
        # torchmetrics would read what is there already with a pickle that may run code: it is read so beforehand.
        download_weights(url)
        return LearnedPerceptualImagePatchSimilarity(net_type=known).net
    except (OSError, RuntimeError) as error:
        place = cached_at(url)
        raise FileNotFoundError(
            f"`network`={name!r}: LPIPS needs torchvision's ImageNet weights, which {place.parent} does not hold and "
            f"which could not be downloaded ({error}). Without a connection: download {url} elsewhere and put it at "
            f"{place}, or leave LPIPS out."
        ) from error


class Reconstruction(DoubleMetric):
    """PSNR (dB), SSIM and, if asked for, LPIPS of reconstructed images: means over images, whatever the batches.

    Reconstructions are clamped to [-1, 1], as an image file would hold them, and not rounded to 8 bits (which takes
    under 0.01 dB off a PSNR of 30 dB). An image given back exactly has an infinite PSNR, and so then has the set.
    SSIM is torchmetrics', of images moved to [0, 1] with a range of 1: a Gaussian window of 11 px, and images reflected
    beyond their borders. States are sums.

    Args:
        lpips: The perceptual distance; None leaves it out, since its weights are not everywhere.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    sums: Tensor
    count: Tensor

    def __init__(self, lpips: LPIPS | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lpips = lpips
        self.names = ("psnr", "ssim") if lpips is None else ("psnr", "ssim", "lpips")
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, reconstructed: Tensor, images: Tensor) -> None:
        """Add images; arguments and errors are those of ``each``."""
        values = self.each(reconstructed, images)
        self.sums += values.sum(dim=1)
        self.count += values.shape[1]

    @torch.no_grad()
    def each(self, reconstructed: Tensor, images: Tensor) -> Tensor:
        """Compare images one by one.

        Args:
            reconstructed: (B, 3, H, W), about [-1, 1].
            images: What they are of, (B, 3, H, W) in [-1, 1].

        Returns:
            (2 or 3, B) float64: PSNR in dB, SSIM (of the images in [0, 1]) and, if asked for, LPIPS, as ``names`` says.

        Raises:
            ValueError: Shapes that differ, images smaller than SSIM's window, values that are not finite, or images
                outside [-1, 1].
        """
        check_images(images)
        if reconstructed.shape != images.shape:
            raise ValueError(
                f"`reconstructed` must have the shape of `images`, {tuple(images.shape)}, got "
                f"{tuple(reconstructed.shape)}. Crop the images to sides that the autoencoder's downscaling divides."
            )
        if not reconstructed.isfinite().all():
            bad = (~reconstructed.isfinite()).flatten(1).any(1)
            raise ValueError(
                f"`reconstructed` must be finite, got NaN or infinite values in {int(bad.sum())} of {len(images)} "
                "images. Run the autoencoder in a higher precision, or see where its weights diverged."
            )
        if min(images.shape[2:]) < _SSIM_WINDOW:
            raise ValueError(
                f"`images` must have sides of {_SSIM_WINDOW} pixels or more, SSIM's window, got "
                f"{tuple(images.shape[2:])}."
            )
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            reconstructed = reconstructed.float().clamp(-1, 1)
            # In float64, since variances of windows are differences of squares, and C_2 is 9e-4.
            one, other = (reconstructed.double() + 1) / 2, (images.double() + 1) / 2
            values: list[Any] = [  # torchmetrics types what comes without `return_full_image` as a pair too
                peak_signal_noise_ratio(one, other, data_range=1.0, reduction="none", dim=(1, 2, 3)),
                structural_similarity_index_measure(one, other, data_range=1.0, reduction="none"),
            ]
            if self.lpips is not None:
                values.append(self.lpips(reconstructed, images))
        return torch.stack([value.double() for value in values])

    def compute(self) -> dict[str, Tensor]:
        """Means over all images so far: ``psnr``, ``ssim`` and, if asked for, ``lpips``.

        Raises:
            ValueError: There are none.
        """
        if self.count == 0:
            raise ValueError("`Reconstruction` must have images, got none: call `update`.")
        return dict(zip(self.names, self.sums / self.count, strict=True))
