"""Text encoders and tokenizers of a trained module, where a diffusers pipeline encodes by them as the module does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lpl_lightning.captions import Captions
from lpl_lightning.export.parts import Target, copied
from lpl_lightning.text_encoders import SideBySide, TransformersText

__all__ = ["text_parts"]


def text_parts(conditioner: Captions, target: Target, dtype: torch.dtype | None, said: list[str]) -> dict[str, Any]:
    """Text encoders and tokenizers, each where the pipeline has one of its class, in order; all or none."""
    pipeline, arguments = target.pipeline, inspect.signature(target.pipeline.__init__).parameters
    slots = [name for name in arguments if name.startswith("text_encoder")]
    found: dict[str, TransformersText] = {}
    rows: dict[str, int] = {}
    # Where one that gives no tokens stands among the others makes no difference.
    for row, encoder in sorted(_flat(conditioner), key=lambda pair: bool(getattr(pair[1], "tokens", True))):
        free = slots[slots.index(max(found)) + 1 :] if found else slots
        kind = type(getattr(encoder, "model", encoder))
        slot = next((slot for slot in free if issubclass(kind, arguments[slot].annotation)), None)
        if slot is None or not isinstance(encoder, TransformersText) or not _read_alike(encoder, slot, pipeline):
            return _none(pipeline, f"by {kind.__name__}", said)
        found[slot], rows[slot] = encoder, row
    side_by_side = {row for slot, row in rows.items() if slot != "text_encoder_3"}
    missing = set(slots) - set(found) - {_SPARE.get(pipeline.__name__)}
    if missing or (pipeline.__name__ in _BEFORE_LAST and len(side_by_side) > 1):
        return _none(pipeline, f"by {', '.join(found) or 'nothing'} in these rows", said)
    _say_what_to_give(found.get(slots[-1]), pipeline, conditioner, said)
    parts: dict[str, Any] = {}
    for slot, encoder in found.items():
        tokenizer = copy.deepcopy(encoder.tokenizer)
        tokenizer.model_max_length = encoder.max_length
        parts |= {slot: copied(encoder.model, dtype), slot.replace("text_encoder", "tokenizer"): tokenizer}
    return parts


# By name: to look at the classes is to import transformers.
_BEFORE_LAST = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
"""Pipelines that take what the last layer of CLIP towers is given, side by side."""
_MASKING = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline")
_SPARE = {"StableDiffusionXLPipeline": "text_encoder", "StableDiffusion3Pipeline": "text_encoder_3"}
"""What a pipeline encodes without where it is null."""


def _none(pipeline: Any, what: str, said: list[str]) -> dict[str, Any]:
    said.append(f"{pipeline.__name__} does not encode {what} as this module does: give it prompt_embeds instead")
    return {}


def _flat(conditioner: Captions) -> Iterator[tuple[int, nn.Module]]:
    """Encoders, with the place in the row that those side by side share."""

    def towers(encoder: nn.Module) -> Iterator[nn.Module]:
        if isinstance(encoder, SideBySide):
            for part in encoder.encoders:
                yield from towers(part)
        else:
            yield encoder

    for row, encoder in enumerate(conditioner.encoders):
        for tower in towers(encoder):
            yield row, tower


def _read_alike(encoder: TransformersText, slot: str, pipeline: Any) -> bool:
    """Whether a pipeline takes the same hidden states of an encoder as the module, and masks its padding likewise."""
    layer = -2 if pipeline.__name__ in _BEFORE_LAST and slot != "text_encoder_3" else -1
    return not encoder.tokens or (encoder.layer, encoder.use_mask) == (layer, pipeline.__name__ in _MASKING)


def _say_what_to_give(last: TransformersText | None, pipeline: Any, conditioner: Captions, said: list[str]) -> None:
    """Say which of a pipeline's defaults are not what the module was trained with."""
    give: dict[str, object] = {}
    length = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    wanted = 0 if last is None else last.max_length
    if length is not None and wanted != length.default:
        give["max_sequence_length"] = wanted
    if pipeline.__name__ in _MASKING:
        give["clean_caption"] = False
    if pipeline.__name__ == "SanaPipeline":
        give["complex_human_instruction"] = None
    if give:
        said.append(f"give {', '.join(f'{name}={value}' for name, value in give.items())}, as in training")
    if conditioner.null_is_zero and pipeline.__name__ != "StableDiffusionXLPipeline":
        said.append(f"{pipeline.__name__} encodes the empty caption, where this module has zeros: give them to it")
