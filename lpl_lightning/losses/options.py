"""The options of the Latent Perceptual Loss: what the presets set, and what may be set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.losses.distance import DepthWeights, Distance, Normalization, Statistics
from lpl_lightning.losses.gate import Threshold

__all__ = ["PRESETS", "LossOptions", "NonFinite", "Preset", "Reduction"]

Preset = Literal["paper", "diffusers", "rgb"]
Reduction = Literal["none", "mean", "sum", "mean_passed"]
NonFinite = Literal["raise", "skip", "zero"]

_PAPER: dict[str, Any] = {
    "depth": 5,
    "threshold": Threshold(nsr=3.0),
    "reference_side": 32,
    "gate_softness": 1.0,
    "normalization": "standardize",
    "statistics": "predicted",
    "eps": None,
    "relative_eps": None,
    "distance": "mse",
    "huber_delta": 1.0,
    "depth_weights": "inverse_upscale",
    "mask_outliers": True,
    "mask_source": "predicted",
    "mask_upscale": 2.0,
    "quantile": 0.02,
    "widening": 2.0,
    "dilation": 3,
    "erosion": 5,
    "mask_before_normalization": False,
    "position_reduction": "mean",
    "depth_reduction": "sum",
    "reduction": "none",
    "post_quant_conv": True,
    "nonfinite": "raise",
}

PRESETS: dict[Preset, dict[str, Any]] = {
    "paper": _PAPER,
    "diffusers": _PAPER
    | {
        "threshold": Threshold(ddpm_timestep=199),
        "reference_side": 0,
        "normalization": "channel_norm",
        "statistics": "separate",
        "depth_weights": "uniform",
        "mask_outliers": False,
        "mask_source": "target",
        "mask_before_normalization": True,
        "depth_reduction": "mean",
        "post_quant_conv": False,
    },
    "rgb": _PAPER | {"depth": ("image",), "statistics": "none", "depth_weights": "uniform", "mask_outliers": False},
}
"""Values of every option: of the paper, of the public example's command line, of the paper's RGB baseline."""


@dataclass(frozen=True)
class LossOptions:
    """Every option with a value. See ``LatentPerceptualLoss`` for what each means."""

    depth: int | tuple[str, ...]
    threshold: Threshold
    reference_side: int
    gate_softness: float
    normalization: Normalization
    statistics: Statistics
    eps: float
    relative_eps: float
    distance: Distance
    huber_delta: float
    depth_weights: DepthWeights | tuple[float, ...]
    mask_outliers: bool
    mask_source: Literal["predicted", "target"]
    mask_upscale: float
    quantile: float
    widening: float
    dilation: int | tuple[int, ...]
    erosion: int | tuple[int, ...]
    mask_before_normalization: bool
    position_reduction: Literal["mean", "sum"]
    depth_reduction: Literal["sum", "mean"]
    reduction: Reduction
    post_quant_conv: bool
    nonfinite: NonFinite

    @classmethod
    def of(cls, preset: Preset, normalizes: bool = True, **given: Any) -> LossOptions:
        """Lay what is given over a preset.

        Args:
            preset: Its name.
            normalizes: Whether the decoder has normalization layers: without, variances have a relative floor.
            given: Options by name; those that are None stay as the preset has them.

        Raises:
            ValueError: An unknown preset, or a value out of its range.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        values = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                values[name] = tuple(value)
        values["threshold"] = Threshold.of(values["threshold"])
        if isinstance(values["depth"], str):
            values["depth"] = (values["depth"],)
        if values["eps"] is None:
            # The public example adds one number to a map's own lengths and another to shared ones.
            lengths = 1e-10 if values["statistics"] == "separate" else 1e-6
            values["eps"] = lengths if values["normalization"] == "channel_norm" else 1e-5
        if values["relative_eps"] is None:
            divided = values["normalization"] == "standardize" and values["statistics"] != "none"
            values["relative_eps"] = 0.1 if divided and not normalizes else 0.0
        return cls(**values)

    def __post_init__(self) -> None:
        """Check each value."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "depth_weights" and isinstance(value, tuple)):
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        for name in ("mask_outliers", "mask_before_normalization", "post_quant_conv"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        for name in (
            "reference_side",
            "gate_softness",
            "eps",
            "relative_eps",
            "huber_delta",
            "mask_upscale",
            "widening",
        ):
            value = getattr(self, name)
            if isinstance(value, bool | str) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if isinstance(self.depth_weights, tuple) and not all(
            isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in self.depth_weights
        ):
            raise ValueError(
                f"`depth_weights` as a list must hold numbers of 0 or more, got {list(self.depth_weights)}."
            )
        if isinstance(self.depth, int) and not isinstance(self.depth, bool):
            at_least(0, depth=self.depth)
        elif not isinstance(self.depth, tuple):
            raise ValueError(f"`depth` must be a whole number or names of stages, got {self.depth!r}.")
        elif not self.depth or len(set(self.depth)) < len(self.depth):
            raise ValueError(f"`depth` as a list must name each stage once, got {list(self.depth)}.")
        at_least(0, reference_side=self.reference_side, eps=self.eps, relative_eps=self.relative_eps)
        at_least(0, widening=self.widening, mask_upscale=self.mask_upscale)
        at_least(1, gate_softness=self.gate_softness)
        if self.huber_delta <= 0:
            raise ValueError(f"`huber_delta` must be above 0, got {self.huber_delta}.")
        if not 0 <= self.quantile < 0.5:
            raise ValueError(f"`quantile` must lie from 0 to below 0.5, got {self.quantile}.")
        for name in ("dilation", "erosion"):
            sizes = getattr(self, name)
            for size in sizes if isinstance(sizes, tuple) else (sizes,):
                if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
                    raise ValueError(f"`{name}` must be an odd number of positions, or a list of them, got {sizes}.")

    @property
    def floor(self) -> float:
        """``relative_eps`` where maps are divided by variances, else 0."""
        return self.relative_eps if self.normalization == "standardize" and self.statistics != "none" else 0.0

    def reduce(self, losses: Tensor, passed: int | Tensor, reduction: Reduction | None = None) -> Tensor:
        """Losses (B,) as ``reduction``, by default the option, says, given how many passed: (B,) or a scalar."""
        match reduction or self.reduction:
            case "none":
                return losses
            case "mean":
                return losses.sum() / max(1, len(losses))  # none are left of a batch that fills up a process's share
            case "sum":
                return losses.sum()
            case "mean_passed":
                return losses.sum() / (passed if isinstance(passed, Tensor) else max(1, passed))

    def of_map(self, name: str, index: int, count: int) -> Any:
        """The entry of an option that may be a list for the compared map ``index`` of ``count``.

        Raises:
            ValueError: A list that is too short.
        """
        value = getattr(self, name)
        if isinstance(value, tuple):
            if len(value) < count:
                raise ValueError(
                    f"`{name}` as a list must have an entry for each compared feature map: "
                    f"expected {count}, got {len(value)}. Add the missing ones, or compare fewer maps (`depth`)."
                )
            return value[index]
        return value


_CHOICES: dict[str, tuple[str, ...]] = {
    "normalization": get_args(Normalization),
    "statistics": get_args(Statistics),
    "distance": get_args(Distance),
    "depth_weights": get_args(DepthWeights),
    "mask_source": ("predicted", "target"),
    "position_reduction": ("mean", "sum"),
    "depth_reduction": ("sum", "mean"),
    "reduction": get_args(Reduction),
    "nonfinite": get_args(NonFinite),
}
