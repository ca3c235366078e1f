"""Features of image towers: those of open_clip's models, and vision transformers of transformers, such as DINOv2.

Distances in these spaces agree better with people's judgement than in Inception's (Stein et al., 2023, "Exposing flaws
of generative model evaluation metrics and their unfair treatment of diffusion models").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lpl_lightning.file_names import check_indices
from lpl_lightning.metrics.features import FeatureExtractor
from lpl_lightning.metrics.preparation import IMAGENET_MEAN, IMAGENET_STD, Filter, Fit, Preparation
from lpl_lightning.pretrained import RANDOM, is_untrained, locate
from lpl_lightning.text_loading import create_open_clip, optional, said_of

__all__ = ["OpenCLIPFeatures", "Output", "TransformersFeatures", "clip_preparation", "load_open_clip", "plain_name"]

Output = Literal["pooled", "cls", "mean"]
_FILTERS: Mapping[int, Filter] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_FITS: Mapping[str, Fit] = {"shortest": "crop", "squash": "stretch"}


def load_open_clip(model_name: str, pretrained: str | None) -> nn.Module:
    """Load both towers of an open_clip model.

    Args:
        model_name: Name of one, such as ``ViT-L-14``; ``local-dir:FOLDER`` or ``hf-hub:ID`` with its weights; or
            ``random:NAME`` to draw them anew.
        pretrained: A tag of open_clip's, or a file of weights.

    Raises:
        ValueError: There is no such model, or its weights cannot be had or do not fit.
    """
    untrained, name = is_untrained(model_name)
    asked = f"`model_name`={model_name!r}, `pretrained`={pretrained!r}"
    if (untrained or ":" in name) == (pretrained is not None):
        raise ValueError(
            f"{asked}: give a tag or file of weights as `pretrained` beside a plain name, and none beside random:, "
            "local-dir: or hf-hub:."
        )
    try:
        weights = {"load_weights": not untrained, "require_pretrained": not untrained, "pretrained_text": False}
        return cast(nn.Module, create_open_clip(name, pretrained, **weights))
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "Without network: give the weights' file as `pretrained`, or local-dir:FOLDER as `model_name`."
        raise ValueError(f"{asked}: {error} {remedy}") from error


def clip_preparation(model: nn.Module, resize: Filter | None, antialias: bool) -> Preparation:
    """How images reach an open_clip model: by its own settings, where an argument does not say otherwise."""
    settings = optional("open_clip").get_model_preprocess_cfg(model)
    sides = settings["size"]
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
    mode = settings.get("resize_mode", "shortest")
    if sides[0] != sides[1] or mode not in _FITS:
        raise ValueError(
            f"`model_name` must be of a model of square images, cropped or stretched, got {sides}, {mode!r}."
        )
    known = cast(Filter, settings.get("interpolation", "bicubic"))
    return Preparation(sides[0], resize or known, antialias, _FITS[mode], settings["mean"], settings["std"])


class OpenCLIPFeatures(FeatureExtractor):
    """Embeddings of the image tower of an open_clip model, projected, not normalized to length 1.

    Args:
        model_name: Name of one, such as ``ViT-L-14``; ``local-dir:FOLDER`` or ``hf-hub:ID`` with its weights; or
            ``random:NAME`` to draw them anew.
        pretrained: A tag of open_clip's, or a file of weights.
        resize: Filter. By default the model's, which is bicubic for CLIP.
        antialias: Widen the filter in shrinking, as PIL does and these were trained with.
    """

    def __init__(
        self, model_name: str, pretrained: str | None = None, resize: Filter | None = None, antialias: bool = True
    ) -> None:
        model: Any = load_open_clip(model_name, pretrained)
        version = f"open_clip {optional('open_clip').__version__}"
        super().__init__(clip_preparation(model, resize, antialias), plain_name(model_name), version)
        self.model: nn.Module = model.visual
        self._freeze("model_name")

    def extract(self, prepared: Tensor) -> Tensor:
        """Call the tower."""
        found = self.model(prepared)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)  # CoCa's gives tokens too


class TransformersFeatures(FeatureExtractor):
    """Features of an image model of transformers, such as ``facebook/dinov2-large``.

    Args:
        model: A module, or where to load one: a folder that ``save_pretrained`` wrote or a Hugging Face hub id, or
            ``random:SOURCE`` for the config of either with weights drawn anew. Only safetensors are read.
        output: ``pooled``, what the pooler gives (DINOv2's: the class token); ``cls``, the first token; ``mean``, all.
        size: Side of the network's input. DINOv2 takes any multiple of 14.
        resize: Filter. By default that of the model's ``preprocessor_config.json``, or else bicubic.
        antialias: Widen the filter in shrinking, as PIL does and these were trained with.
        mean: Subtracted from pixels in [0, 1]. By default that of ``preprocessor_config.json``, or else ImageNet's.
        std: What they are divided by.
    """

    def __init__(
        self,
        model: str | nn.Module,
        output: Output = "pooled",
        size: int = 224,
        resize: Filter | None = None,
        antialias: bool = True,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        if output not in get_args(Output):
            raise ValueError(f"`output` must be one of {', '.join(get_args(Output))}, got {output!r}.")
        transformers = optional("transformers")
        preparation = Preparation(size, "bicubic", antialias, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        loaded, said = (model, {}) if isinstance(model, nn.Module) else _load(model)
        preparation = preparation.given(**said).given(resize=resize, mean=mean, std=std)
        name = f"{type(loaded).__name__} {output}"
        super().__init__(preparation, name, f"transformers {transformers.__version__}")
        self.model, self.output = loaded, output
        self._freeze("model")

    def extract(self, prepared: Tensor) -> Tensor:
        """Call the model."""
        found = self.model(pixel_values=prepared)
        if self.output == "pooled":
            pooled = getattr(found, "pooler_output", None)
            if pooled is None:
                raise ValueError("it has no pooler: set `output` to 'cls' or 'mean'.")
            return cast(Tensor, pooled).flatten(1)  # some pool to (B, D, 1, 1)
        tokens = cast(Tensor, found.last_hidden_state)
        if tokens.ndim == 4:  # a convolutional network's map
            tokens = tokens.flatten(2).mT
        return tokens[:, 0] if self.output == "cls" else tokens.mean(dim=1)


def plain_name(model_name: str) -> str:
    """The name without the path that it may hold, which says nothing on another machine."""
    untrained, name = is_untrained(model_name)
    schema, _, rest = name.partition(":")
    plain = f"{schema}:{Path(rest).name}" if schema == "local-dir" else name
    return f"{RANDOM}{plain}" if untrained else plain


def _load(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what its preprocessor's config says of filter and normalization."""
    transformers, (untrained, name) = optional("transformers"), is_untrained(source)
    found = locate(name, "model")
    where: dict[str, Any] = {"local_files_only": isinstance(found, Path)}
    coded = {"trust_remote_code": False}  # unless that is said, transformers asks on the terminal
    try:
        if isinstance(found, Path):
            if not (found / "config.json").is_file():
                raise FileNotFoundError("there is no config.json")
            check_indices(found)
        if untrained:
            config = transformers.AutoConfig.from_pretrained(str(found), **coded, **where)
            model = transformers.AutoModel.from_config(config, **coded)
        else:
            options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True} | coded
            model, info = transformers.AutoModel.from_pretrained(str(found), **options, **where)
            if lacking := sorted(info["missing_keys"]):
                raise ValueError(f"{len(lacking)} weights are missing, such as {lacking[0]!r}")
    except OSError as error:
        raise FileNotFoundError(
            f"`model`={source!r} cannot be had: expected config.json and safetensors weights as save_pretrained writes "
            f"them. Without network: download it elsewhere and give its folder ({error})"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`model`={source!r} cannot be loaded: {said_of(error)}") from error
    try:
        said, _ = transformers.ImageProcessingMixin.get_image_processor_dict(str(found), **where)
    except OSError:  # there is no preprocessor_config.json
        said = {}
    normalized = said.get("do_normalize", True)
    wanted = {
        "mean": said.get("image_mean") if normalized else [0.0] * 3,
        "std": said.get("image_std") if normalized else [1.0] * 3,
        "resize": _FILTERS.get(said.get("resample")),
    }
    return cast(nn.Module, model), {key: value for key, value in wanted.items() if value is not None}
