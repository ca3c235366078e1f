"""A measure: one or more metrics of generated images that share what is costly, such as one network's features.

The real images come first, once; what is kept of them can be put away and put back. The generated ones may come again
and again, as they do during training.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpl_lightning.evaluation.report import Value
from lpl_lightning.evaluation.settings import as_json, attributes

__all__ = ["Measure", "Role", "Sets"]

Role = Literal["real", "generated", "reconstructed"]


@dataclass(frozen=True)
class Sets:
    """What is going to be measured.

    Attributes:
        image_size: Side of all images, in pixels.
        real: Number of real images.
        generated: Number of generated images.
        captions: Whether the generated images come with captions.
        autoencoder: What the autoencoder is that the reconstructions of the real images are of; None without any.
    """

    image_size: int
    real: int
    generated: int
    captions: bool = False
    autoencoder: str | None = None


class Measure(nn.Module, ABC):
    """Takes real, reconstructed and generated images in batches, and gives values.

    All processes of a run call its methods alike, each with images of its own; values are those of all.
    """

    sets: Sets
    device: torch.device

    @property
    @abstractmethod
    def label(self) -> str:
        """A name that is its own among the measures of a suite, of letters, digits and underscores."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What its values depend on besides the images."""

    def settings(self, sets: Sets) -> dict[str, Any]:
        """All that says what it computes of such sets, as JSON holds it: label, ``provenance`` and its arguments."""
        self.sets = sets
        # Of its attributes those alone that were given to it: others come and go with the images.
        arguments = {"class", *inspect.signature(type(self)).parameters}
        own = {name: said for name, said in attributes(self).items() if name in arguments}
        found: dict[str, Any] = as_json({"label": self.label, **own, **self.provenance()})
        return found

    def check(self, sets: Sets) -> None:
        """Refuse sets that it cannot be computed of.

        Raises:
            ValueError: It says what is missing.
        """

    def begin(self, sets: Sets, device: torch.device) -> None:
        """Forget all images, and expect these sets on a device."""
        self.check(sets)
        self.sets, self.device = sets, device
        self.to(device)
        self.begin_real()
        self.begin_generated()

    @abstractmethod
    def begin_real(self) -> None:
        """Forget the real images and their reconstructions."""

    @abstractmethod
    def begin_generated(self) -> None:
        """Forget the generated images."""

    @abstractmethod
    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            role: What they are. Reconstructions come right after their images, in the same batch.
            index: (B,) positions of the images in their set.
            captions: Those of generated images.
        """

    @abstractmethod
    def real_state(self) -> dict[str, Tensor]:
        """What is kept of the real images and their reconstructions, of all processes."""

    @abstractmethod
    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``real_state`` gave, in place of the images."""

    @abstractmethod
    def compute(self) -> dict[str, Value]:
        """The values by name; generated images must have come."""

    def samples(self) -> dict[str, Tensor]:
        """What was found of each image, what ``Resampling`` names by its keys among it; after ``compute``."""
        return {}

    def write(self, folder: Path) -> list[str]:
        """Write further files; after ``compute``.

        Args:
            folder: An existing folder.

        Returns:
            What a reader of the report must know of it.
        """
        return []
