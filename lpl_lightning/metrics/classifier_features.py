"""Features of convolutional classifiers: FID's Inception, and those of torchvision.

Images are prepared as the library does, except that they are resized to the network's input itself: no margin is cut
away, as is done before classification (torchvision resizes to 256 pixels, and takes the middle 224).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torchvision
from torch import Tensor, nn

from lpl_lightning.metrics.features import FeatureExtractor
from lpl_lightning.metrics.preparation import IMAGENET_MEAN, IMAGENET_STD, Filter, Preparation
from lpl_lightning.metrics.weight_files import cached_at, download_weights, read_weights
from lpl_lightning.pretrained import RANDOM, check_fit, is_untrained, plain_values_alone

__all__ = ["InceptionFeatures", "TorchvisionFeatures"]

InceptionLayer = Literal["64", "192", "768", "2048", "logits_unbiased"]


class InceptionFeatures(FeatureExtractor):
    """The Inception network of FID (Heusel et al., 2017), with the weights and code of torch-fidelity.

    Args:
        weights: The weights' file; None downloads it once into torch's cache; ``random:`` draws them anew, for trials.
        antialias: False resizes to 299 as FID always did, by TensorFlow 1's bilinear filter: what published values
            are computed with. True is the default of torchmetrics' ``FrechetInceptionDistance``; values differ.
        layer: Features by their number, ``2048`` for FID and KID; ``logits_unbiased`` for the Inception Score.
    """

    def __init__(self, weights: str | None = None, antialias: bool = False, layer: InceptionLayer = "2048") -> None:
        if layer not in get_args(InceptionLayer):
            raise ValueError(f"`layer` must be one of {', '.join(get_args(InceptionLayer))}, got {layer!r}.")
        inception: Any = _needed("torch_fidelity.feature_extractor_inceptionv3", "eval")
        from torchmetrics.image import fid

        version = f"torch-fidelity {import_module('torch_fidelity').__version__}"
        super().__init__(Preparation(pixels="uint8"), f"inception-v3-compat {layer}", version)
        self.antialias = antialias
        # Its constructor reads weights, with a pickle that may run code: it is given none, and they are read below.
        empty = type("Inception", (fid.NoTrainInceptionV3,), {"load_state_dict": lambda self, *args, **kwargs: None})
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        self.model: nn.Module = empty(self.name, [layer], nothing, antialias=antialias)
        if weights != RANDOM:
            url = inception.URL_INCEPTION_V3
            state = read_weights(weights) if weights else _download(url)
            check_fit(self.model.state_dict(), state, weights or url)
            nn.Module.load_state_dict(self.model, state)
        self._freeze("weights")

    def extract(self, prepared: Tensor) -> Tensor:
        """Resize, normalize and call the network, all by its own code."""
        return cast(Tensor, self.model(prepared))

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the Inception Score from the 2,048 features of FID, in one run of the network.

        Args:
            features: (B, 2048), of ``layer="2048"``.

        Returns:
            (B, 1008): the last layer without its bias, as the score is defined on (Salimans et al., 2016).
        """
        last: Any = self.model.get_submodule("fc")
        return cast(Tensor, features.to(last.weight) @ last.weight.T)

    def provenance(self) -> dict[str, str | int | bool]:
        """What the features depend on, with the resizing that the network does."""
        how = "bilinear, stretch" if self.antialias else "bilinear of TensorFlow 1, stretch"
        own: dict[str, str | int | bool] = {"input_size": 299, "resize": how, "antialias": self.antialias}
        return super().provenance() | own | {"normalization": "(x - 128) / 128"}


class TorchvisionFeatures(FeatureExtractor):
    """Features of one of torchvision's classifiers.

    Args:
        model_name: Its name, such as ``resnet50``; ``random:NAME`` draws its weights anew.
        weights: The name of some of torchvision's, such as ``IMAGENET1K_V2``, to download, which bring the settings of
            the model that they were trained with; or a file (.pth, .safetensors) for torchvision's model as it is.
        layer: Name of a module, of which the output is taken; by default what the last linear layer, or convolution,
            is given: the penultimate features. Maps (B, C, h, w) are averaged over space.
        size: Side of the network's input. By default what named weights were trained with, or else 224.
        resize: Filter. By default that of the weights, or else bilinear.
        antialias: Widen the filter in shrinking, as PIL does and these were trained with.
        mean: Subtracted from pixels in [0, 1]. By default that of the weights, or else ImageNet's.
        std: What they are divided by.
    """

    def __init__(
        self,
        model_name: str,
        weights: str | None = None,
        layer: str | None = None,
        size: int | None = None,
        resize: Filter | None = None,
        antialias: bool = True,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        untrained, known = is_untrained(model_name)
        try:
            published: Mapping[str, Any] = getattr(torchvision.models.get_model_weights(known), "__members__", {})
        except ValueError as error:
            raise ValueError(f"`model_name`={model_name!r} is no model of torchvision: {error}") from error
        if untrained == (weights is not None):
            asked = f"`model_name`={model_name!r}, `weights`={weights!r}"
            raise ValueError(
                f"{asked}: give a file or the name of weights, or else '{RANDOM}{known}' for random weights."
            )
        preparation = Preparation(224, antialias=antialias, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        entry = published.get(weights or "")
        if entry is not None:
            _download(entry.url)
            try:
                with plain_values_alone():  # torchvision's own reading of it would run code
                    model: nn.Module = torchvision.models.get_model(known, weights=entry, progress=False)
            except RuntimeError as error:
                place = cached_at(entry.url)
                raise ValueError(
                    f"{place} holds weights of another model than {known}'s {weights}: delete it."
                ) from error
            preset = entry.transforms()
            preparation = preparation.given(
                size=preset.crop_size[0], resize=preset.interpolation.value, mean=preset.mean, std=preset.std
            )
        else:
            model = torchvision.models.get_model(known, weights=None)
            if weights is not None:
                _load_file(model, weights, {cached_at(one.url): one.name for one in published.values()})
        preparation = preparation.given(size=size, resize=resize, mean=mean, std=std)
        super().__init__(preparation, f"{known} {layer or 'penultimate'}", f"torchvision {torchvision.__version__}")
        self.model, self.layer = model, layer
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None:
            first.register_forward_pre_hook(_with_channels_last)
        self._module_of_features()
        self._freeze("layer" if layer else "size")

    def extract(self, prepared: Tensor) -> Tensor:
        """Run the network, and take what a hook sees."""
        seen: list[Tensor] = []
        module = self._module_of_features()
        if self.layer is None:
            hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            hook = module.register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            self.model(prepared)
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"`layer`={self.layer!r} is not run by {self.name} in evaluation.")
        return seen[-1].mean(dim=(2, 3)) if seen[-1].ndim == 4 else seen[-1]

    def provenance(self) -> dict[str, str | int | bool]:
        """What the features depend on, with whether the network brings its input to another range itself."""
        own = {"transform_input": self.model.transform_input} if hasattr(self.model, "transform_input") else {}
        return super().provenance() | cast(dict[str, bool], own)

    def _module_of_features(self) -> nn.Module:
        named: dict[str, nn.Module] = dict(self.model.named_modules())
        if self.layer is None:
            return [module for module in named.values() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
        if self.layer not in named:
            ends = ", ".join(name for name, _ in self.model.named_children())
            raise ValueError(f"`layer`={self.layer!r} is no module of {self.name}, which has {ends} and parts of them.")
        return named[self.layer]


def _load_file(model: nn.Module, weights: str, published: Mapping[Path, str]) -> None:
    """Load a file into one of torchvision's models as it is.

    Args:
        model: The model.
        weights: The file.
        published: Names of torchvision's own files for it, by where torch keeps them.
    """
    own = model.state_dict()
    # Which files of before 2018 lack, and nothing but training looks at.
    counts = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}
    state = counts | dict(read_weights(weights))
    place = next((place for place in published if place.name == Path(weights).name), None)
    shapes, given = ({name: tensor.shape for name, tensor in one.items()} for one in (own, state))
    if place is not None and (shapes != given or hasattr(model, "transform_input")):
        raise ValueError(
            f"`weights`={weights!r} are torchvision's {published[place]}, for other settings of the model or another "
            f"input than its name says: put the file at {place}, and give `weights` that name."
        )
    check_fit(own, state, weights)
    model.load_state_dict(state)


def _with_channels_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a convolution, and all after it, takes less time for on a CPU."""
    images, *others = args
    if images.device.type == "cpu" and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, *others


def _needed(library: str, extra: str) -> Any:
    """Import a library that not everyone has."""
    try:
        return import_module(library)
    except ImportError as error:
        raise ModuleNotFoundError(f'Run pip install "lpl-lightning[{extra}]": {error}', name=library) from error


def _download(url: str) -> Mapping[str, Tensor]:
    try:
        return download_weights(url)
    except OSError as error:
        raise FileNotFoundError(
            f"{url} cannot be downloaded ({error}). Without network: download it elsewhere, and put it at "
            f"{cached_at(url)} or give its path as `weights`."
        ) from error
