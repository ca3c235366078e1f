"""The weights that a LoRA was trained over, which its checkpoints do not hold, and those that a run began from.

A checkpoint says where they were loaded from, and some of their values, by which they are known again wherever their
file lies. About a thousand values, spread over all layers, tell two trainings apart in milliseconds; a hash of billions
would take minutes at each start, and be another in another precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lpl_lightning.denoiser import Denoiser
from lpl_lightning.pretrained import locate

__all__ = ["BASE", "BaseWeights"]

BASE = "lpl_lightning_base"
"""Where a checkpoint says what its weights were trained from."""

_OVER = "lpl_lightning_lora_base"
_BEGUN = "lpl_lightning_begun"
_VALUES = 1024
"""About how many values are kept, one of each parameter at the least."""
_ROUNDING = 2**-7
"""Relative; that of bfloat16 is half of it. One step of training moves many small weights by more."""


@dataclass(frozen=True)
class BaseWeights:
    """What is known of weights that a LoRA is trained over, or that a run began from.

    Attributes:
        source: Where they were loaded from, as ``weights`` has it; None where the backbone came with them or they were
            drawn.
        ema: Decay of the average that was taken of it.
        values: Some of their values, in the order of the denoiser's parameters; None where they are not known.
    """

    source: str | None = None
    ema: float | None = None
    values: list[float] | None = None

    @classmethod
    def of(cls, denoiser: Denoiser, source: str | None = None, ema: float | None = None) -> Self:
        """Those of a denoiser, before it is prepared for fine-tuning.

        Args:
            denoiser: It has its weights.
            source: Where they are from.
            ema: Decay of the average that they are.
        """
        # Embeddings of positions are resized to the resolution at hand.
        named = [(name, p) for name, p in denoiser.named_parameters() if p.is_floating_point() and p.numel()]
        parameters = [p.detach().flatten() for name, p in named if "pos_embed" not in name]
        if not parameters or any(p.is_meta for p in parameters):
            return cls(source, ema)
        count = max(1, _VALUES // len(parameters)) + 2
        found: list[float] = []
        for p in parameters:
            places = torch.linspace(0, len(p) - 1, count, dtype=torch.float64)[1:-1].long()
            found += p[places.to(p.device)].float().tolist()
        return cls(source, ema, found)

    @classmethod
    def said_by(cls, checkpoint: Mapping[str, Any]) -> Self:
        """Those that the LoRA of a checkpoint was trained over; one of an earlier release says their source alone."""
        if (said := checkpoint.get(_OVER)) is not None:
            return cls(said.get("source"), said.get("ema"), said.get("values"))
        given = checkpoint.get("hyper_parameters", {})
        if given.get("weights") is not None:
            return cls(given["weights"], given.get("weights_ema"))
        return cls(checkpoint.get(BASE))

    @classmethod
    def begun_by(cls, checkpoint: Mapping[str, Any]) -> Self | None:
        """Those that the run of a checkpoint began from; None where a LoRA's of an earlier release does not say."""
        if (said := checkpoint.get(_BEGUN)) is not None:
            return cls(said.get("source"), said.get("ema"), said.get("values"))
        return None if _OVER in checkpoint else cls.said_by(checkpoint)

    def note(self, checkpoint: dict[str, Any]) -> None:
        """Write down in a checkpoint what is known."""
        checkpoint[_OVER] = asdict(self)

    def note_begun(self, checkpoint: dict[str, Any]) -> None:
        """Write down in a checkpoint that its run began from these."""
        checkpoint[_BEGUN] = asdict(self)

    def are(self, other: BaseWeights) -> bool:
        """Whether two are the same weights: of the same file, whose values may be others by now, or by their values."""
        apart = self.differs(other)
        is_same_file = self.source == other.source or (
            None not in (self.source, other.source)
            and Path(f"{self.source}").resolve() == Path(f"{other.source}").resolve()
        )
        return apart is False or (is_same_file and (self.ema == other.ema or apart is None))

    def __str__(self) -> str:
        ema = "" if self.ema is None else f" (`weights_ema` {self.ema:g})"
        return "no `model.weights`" if self.source is None else f"{self.source}{ema}"

    def differs(self, other: BaseWeights) -> bool | None:
        """Whether two are different weights, up to their precision; None where it is not known."""
        if self.values is None or other.values is None:
            return None
        if len(self.values) != len(other.values):
            return True
        one, another = torch.tensor(self.values), torch.tensor(other.values)
        return not torch.allclose(one, another, rtol=_ROUNDING, atol=1e-7)

    def agreed(self, found: BaseWeights) -> BaseWeights:
        """These weights of a model, once those that a checkpoint's LoRA was trained over are seen to be the same.

        Args:
            found: What the checkpoint says.

        Returns:
            These, with the source that either knows.

        Raises:
            ValueError: They are others, or the checkpoint names weights where the model was given none.
        """
        apart = self.differs(found)
        if apart is None:
            apart = self.source is None and found.source is not None
        if not apart:
            return self if self.source is not None else replace(self, source=found.source, ema=found.ema)
        if found.source is None:
            raise ValueError(
                "The checkpoint holds a LoRA alone, which was trained over other weights than this model's: give the "
                "denoiser the `backbone` that it was trained over."
            )
        ema = "" if found.ema is None else f" `--model.weights_ema {found.ema:g}`"
        raise ValueError(
            f"The checkpoint holds a LoRA alone, which was trained over the weights of {found.source}"
            + (
                ", in which are others by now: give `weights` the file as it was then."
                if (self.source, self.ema) == (found.source, found.ema)
                else f"; this model has others. Give `--model.weights {found.source}`{ema}, or where that file is now."
            )
        )

    def must_be_loaded(self, denoiser: Denoiser, lora: str) -> bool:
        """Whether these weights are to be loaded into a denoiser, before a LoRA that was trained over them.

        Args:
            denoiser: As it is without them.
            lora: Where the LoRA is from, for the error.

        Raises:
            FileNotFoundError: They are not where they were.
            ValueError: Nothing says where they are, and the denoiser's are none that were trained.
        """
        apart = BaseWeights.of(denoiser).differs(self)
        if apart is False:
            return False
        if self.source is not None:
            try:
                locate(self.source, "weights")
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"`weights`={lora!r} holds a LoRA alone, which was trained over the weights of {self.source!r}, "
                    "and that does not exist. Put it there; or give `weights` its new place, and the LoRA as "
                    "`ckpt_path`."
                ) from error
            return True
        if not denoiser.is_pretrained:
            raise ValueError(
                f"`weights`={lora!r} holds a LoRA alone, and does not say where the weights are that it was trained "
                "over, which this model does not have. Give the denoiser the `backbone` that it was trained over; or "
                "give `weights` that model's, and the LoRA as `ckpt_path` (in Python by `load_weights`)."
            )
        if apart:
            rank_zero_warn(
                f"The LoRA of {lora} was trained over other weights than those of this model's `backbone`. Training "
                "may go on so; to have the images that it made, give the backbone that it was trained over."
            )
        return False
