"""Images of a trained model, by its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lpl_lightning.arguments import check_divides
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.drawing import DrawingModule
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.sampling import Sampler, initial_noise
from lpl_lightning.sharding import unsharded

__all__ = ["GeneratingModule", "evaluating"]


class GeneratingModule(DrawingModule):
    """What a latent diffusion module generates by; it has the parts that are named here."""

    autoencoder: Autoencoder
    noise: NoiseProcess
    denoiser: Denoiser
    conditioner: Conditioner
    sampler: Sampler

    @cached_property
    def _whole(self) -> ExitStack:
        return ExitStack()

    def on_predict_start(self) -> None:
        """Let each process have the whole weights, since not all make as many images."""
        self._whole.enter_context(unsharded(self))

    def on_predict_end(self) -> None:
        """Share the weights out again."""
        self._whole.close()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Generate the images that a batch of ``SampleRequests`` asks for: (B, 3, H, W) in [-1, 1]."""
        return self.generate(batch["seed"].tolist(), batch["label"], batch.get("caption"))

    @property
    def _image_size(self) -> int | None:
        """Side of the data's images, where there are data that say it."""
        image_size = getattr(getattr(self._trainer, "datamodule", None), "image_size", None)
        return image_size if isinstance(image_size, int) else None

    @property
    def latent_size(self) -> int:
        """Side of the latents: the data's, and without data the one that the backbone was built for.

        Raises:
            ValueError: There are no data, and the backbone does not say.
        """
        if self._image_size is not None:
            return self._image_size // self.autoencoder.downscale
        sample_size = self.denoiser.config_value("sample_size")
        if not isinstance(sample_size, int):
            raise ValueError(
                f"The size of images is not known: there are no data, and a {type(self.denoiser.backbone).__name__} is "
                "built for no size. Give `image_size`."
            )
        return sample_size

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        labels: Tensor | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        image_size: int | None = None,
    ) -> Tensor:
        """Generate images.

        Args:
            seeds: One seed an image; the same seed, condition and weights give the same image in any batch, also while
                the module is in training mode.
            labels: (B,) classes, for a model that goes by them; none for an unconditional one.
            captions: B captions, for a model that goes by them.
            image_size: Side of the images, in pixels; by default the data's, and without data that which the backbone
                was built for.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], on the module's device.
        """
        if image_size is None:
            size = self.latent_size
        else:
            check_divides(image_size, self.autoencoder.downscale)
            size = image_size // self.autoencoder.downscale
            self.denoiser.check(self.autoencoder.latent_channels, size, self.conditioner)
        side = size * self.autoencoder.downscale
        if self.autoencoder.image_size not in (None, side):
            raise ValueError(
                f"`image_size` must be {self.autoencoder.image_size}, the only size that the autoencoder decodes to, "
                f"got {side}."
            )
        if not seeds:
            return torch.empty(0, 3, side, side, device=self.device)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        shape = (self.autoencoder.latent_channels, size, size)
        asked: dict[str, Any] = {"target_size": torch.tensor([side, side])}
        if labels is not None:
            asked["label"] = torch.as_tensor(labels)
        if captions is not None:
            asked["caption"] = list(captions)
        z0 = self.sample_latents(initial_noise(generators, shape).to(self.device), asked, generators)
        return self.autoencoder.decode(z0).float().clamp(-1, 1)

    @torch.no_grad()
    def sample_latents(
        self, z_start: Tensor, batch: Mapping[str, Any], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Sample latents, in eval mode: without dropout, whatever mode the module is in.

        Args:
            z_start: Standard normal noise (B, C, h, w).
            batch: What the conditioner asks for, such as ``label`` or ``caption``, of B samples.
            generators: B generators on the CPU, for samplers that add noise on the way.

        Returns:
            z0: (B, C, h, w) float32.
        """
        size = len(z_start)
        # Without classes the condition is the null condition, and there is nothing to guide by.
        unconditional = self.conditioner.num_classes == 0
        null_of_all = torch.ones(size, dtype=torch.bool)
        with evaluating(self):
            return self.sampler(
                self.denoiser,
                self.noise,
                z_start,
                self.conditioner(batch, size),
                None if unconditional else self.conditioner(batch, size, drop=null_of_all),
                generators,
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module in eval mode for a while; each of its parts is then in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
