"""Feature extractors: an image to one vector, by a frozen network.

Distances between sets of images are distances between sets of such vectors, and mean something only beside the name of
the network and of what was done to the images before it: ``provenance`` says both.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lpl_lightning.frozen import FrozenModule, weights_hash
from lpl_lightning.metrics.preparation import Filter, Fit, Pixels, Preparation, check_images

__all__ = ["FeatureExtractor", "ModuleFeatures", "TorchScriptFeatures"]

_PROBE = 64  # side of the image that finds the width of a network that takes images of any size


class FeatureExtractor(FrozenModule, ABC):
    """Images to feature vectors; subclasses say in ``extract`` how, and call ``_freeze`` when they are built.

    Args:
        preparation: What is done to images first.
        name: What the network is called in the provenance.
        library: The library it is of, and its version.
    """

    dim: int
    """Number D of features."""

    def __init__(self, preparation: Preparation, name: str, library: str) -> None:
        super().__init__()
        self.preparation, self.name, self.library = preparation, name, library

    @abstractmethod
    def extract(self, prepared: Tensor) -> Tensor:
        """(B, 3, h, w) as ``preparation`` gives it to (B, D); called without gradient and autocast."""

    def forward(self, images: Tensor) -> Tensor:
        """Extract features.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, ``dim``) float32, without gradient.

        Raises:
            ValueError: The images are not such.
        """
        check_images(images)
        return self._features(images)

    def provenance(self) -> dict[str, str | int | bool]:
        """What the features depend on: the network and its weights, and what is done to images before it."""
        return {
            "class": type(self).__name__,
            "model": self.name,
            "weights": weights_hash(self),
            "features": self.dim,
            **self.preparation.provenance(),
            "library": self.library,
        }

    def _features(self, images: Tensor) -> Tensor:
        place = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), images.device)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            prepared = self.preparation(images.to(place))
            precision = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
            # A trainer in double precision widens the network.
            prepared = prepared.to(precision) if prepared.is_floating_point() else prepared
            found = self.extract(prepared)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} must give one vector an image, ({len(images)}, D), got {got}.")
        return found.float()

    def _freeze(self, argument: str) -> None:
        """Freeze the network in float32 or more, and see how many features it gives."""
        self.float().requires_grad_(False).train(False)
        side = self.preparation.size or _PROBE
        try:
            self.dim = self._features(torch.zeros(1, 3, side, side)).shape[1]
        except Exception as error:  # whatever a network says to images that it cannot take
            raise ValueError(
                f"`{argument}`: {self.name} does not take {side} x {side} images to one vector each: {error}. "
                "Mend `size`, or what it gives."
            ) from error


class ModuleFeatures(FeatureExtractor):
    """A module of one's own, which takes (B, 3, h, w) to (B, D). It is frozen.

    Its name is taken from its class: of code that was changed under the same name and weights the provenance says
    nothing.

    Args:
        module: The module.
        size: Side of its input; None hands over images as they are.
        resize: Filter.
        antialias: Widen the filter in shrinking, as is right for any network that was trained on photos.
        fit: Whether to crop or to stretch images that are not square.
        mean: Subtracted from pixels in [0, 1]; with the default the input is in [-1, 1].
        std: What they are divided by.
        pixels: ``uint8`` for a module that takes 0 .. 255 and normalizes itself.
    """

    def __init__(
        self,
        module: nn.Module,
        size: int | None = None,
        resize: Filter = "bilinear",
        antialias: bool = True,
        fit: Fit = "crop",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        pixels: Pixels = "normalized",
    ) -> None:
        preparation = Preparation(size, resize, antialias, fit, mean, std, pixels)
        super().__init__(preparation, type(module).__name__, f"torch {torch.__version__}")
        self.module = module
        self._freeze("module")

    def extract(self, prepared: Tensor) -> Tensor:
        """Call the module."""
        return cast(Tensor, self.module(prepared))


class TorchScriptFeatures(FeatureExtractor):
    """A network in a TorchScript file, which is a program: loading one can write files, and calling it too.

    NVIDIA's ``inception-2015-12-05.pt`` takes ``pixels="uint8"`` and ``options={"return_features": True}``, resizes by
    itself, and gives the 2,048 features of FID.

    Args:
        path: The file.
        size: Side of its input; None hands over images as they are.
        resize: Filter.
        antialias: Widen the filter in shrinking.
        fit: Whether to crop or to stretch images that are not square.
        mean: Subtracted from pixels in [0, 1]; with the default the input is in [-1, 1].
        std: What they are divided by.
        pixels: ``uint8`` for a network that takes 0 .. 255 and normalizes itself.
        options: Further arguments of its call, by name.
        trusted: That you trust whoever made the file; without it none is loaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not trusted, is none, or gives no vectors.
    """

    def __init__(
        self,
        path: str,
        size: int | None = None,
        resize: Filter = "bilinear",
        antialias: bool = True,
        fit: Fit = "crop",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        pixels: Pixels = "normalized",
        options: Mapping[str, bool | int | float | str] | None = None,
        trusted: bool = False,
    ) -> None:
        file = Path(path).expanduser()
        options = dict(options or {})
        name = f"{file.name} {sorted(options.items())}" if options else file.name
        preparation = Preparation(size, resize, antialias, fit, mean, std, pixels)
        super().__init__(preparation, name, f"torch {torch.__version__}")
        if not file.is_file():
            raise FileNotFoundError(f"`path`={path!r} does not exist. Give a file that torch.jit.save wrote.")
        if not trusted:
            raise ValueError(
                f"`path`={path!r}: a TorchScript file is a program, and loading it can write files. Set `trusted` to "
                "true if you trust whoever made it, or take the same network's weights: InceptionFeatures, "
                "TorchvisionFeatures, TransformersFeatures."
            )
        try:
            self.module: Any = _load_script(file)
        except Exception as error:  # what reads archives and programs does not agree on a type
            raise ValueError(f"`path`={path!r} is no TorchScript file, as torch.jit.save writes it: {error}") from error
        self.options = options
        self._freeze("path")

    def extract(self, prepared: Tensor) -> Tensor:
        """Call the network."""
        return cast(Tensor, self.module(prepared, **self.options))


def _load_script(file: Path) -> Any:
    with warnings.catch_warnings():
        # torch deprecates the format, which published feature networks still come in.
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=DeprecationWarning)
        return torch.jit.load(str(file), map_location="cpu")
