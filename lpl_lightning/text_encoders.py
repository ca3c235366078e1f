"""Frozen text encoders: captions to tokens, and to one pooled vector each.

Which hidden states a diffusion model takes is part of it: Stable Diffusion 1.5 the last of a CLIP tower; SDXL (Podell
et al., 2023, section 2.1) those before the last layer of two towers, side by side, and the vector of the second; SD3
(Esser et al., 2024, section 4) the same with both vectors, and after them T5's; PixArt and Sana one encoder's, masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lpl_lightning.frozen import FrozenModule
from lpl_lightning.text_loading import create_open_clip, find_tokenizer, load_text_encoder, optional

__all__ = ["OpenCLIPText", "SideBySide", "TextEmbedding", "TextEncoder", "TransformersText"]

Precision = Literal["float32", "bfloat16", "float16"]
_ENDLESS = 100_000  # tokenizers without a length of their own say 10^30


@dataclass(frozen=True)
class TextEmbedding:
    """What is made of B captions.

    Attributes:
        tokens: (B, L, D), or None.
        mask: (B, L) bool, true for tokens to be attended to; None for all.
        pooled: (B, P) one vector a caption, or None.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None


class TextEncoder(FrozenModule, ABC):
    """A frozen text encoder; subclasses say in ``embed`` what it makes of captions."""

    token_dim: int | None = None
    """Width D of the tokens; None without tokens."""
    pooled_dim: int | None = None
    """Width P of the pooled vectors; None without them."""
    settings: Mapping[str, object]
    """What the embedding depends on besides the class and the weights."""

    def __init__(self) -> None:
        super().__init__()
        self._cut_reported = False

    @abstractmethod
    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode B captions; called without gradient and autocast."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode captions.

        Args:
            captions: B strings.

        Returns:
            Tokens (B, L, ``token_dim``) and vectors (B, ``pooled_dim``), without gradient, in the encoder's precision
            whatever autocast is around it.
        """
        if isinstance(captions, str) or not captions or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"`captions` must be a list of one string or more, got {captions!r}.")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.embed(captions)

    def fingerprint(self) -> str:
        """A hash of class, settings and weights (of each, the first 256 elements and the sum of all bytes).

        It tells caches apart.
        """
        digest = blake2b(f"{type(self).__qualname__} {sorted(self.settings.items())}".encode(), digest_size=16)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            elements = tensor.detach().flatten()
            digest.update(elements[:256].cpu().view(torch.uint8).numpy().tobytes())
            digest.update(str(int(elements.view(torch.uint8).sum(dtype=torch.int64))).encode())
        return digest.hexdigest()

    def _report_cut(self, longest: int, length: int) -> None:
        if longest > length and not self._cut_reported:
            self._cut_reported = True
            rank_zero_warn(f"{type(self).__name__} takes {length} tokens: {longest - length} of a caption are dropped.")


class TransformersText(TextEncoder):
    """A text encoder of transformers: CLIP, T5, or another that returns hidden states, such as Gemma 2.

    Captions are padded, on the right, to ``max_length``, and cut there.

    Args:
        model: A module, or where to load one: a folder that ``save_pretrained`` wrote, a Hugging Face hub id,
            ``embedded:NAME``, or ``random:SOURCE`` for the config of any of these with weights drawn anew. Only
            safetensors are read.
        subfolder: Subfolder of the folder or hub repository, such as ``text_encoder_2`` in that of a pipeline.
        tokenizer: Where the tokenizer is: a folder or hub id. By default with the model.
        tokenizer_subfolder: Its subfolder. By default ``tokenizer_2`` for ``text_encoder_2`` and so on, where there is
            one, or else the model's.
        layer: Hidden states that are the tokens: -1 the last, after the final norm; -2 what the last layer is given.
        max_length: Number L of tokens. By default what the tokenizer says.
        use_mask: Hide padding from the encoder, and hand the mask on.
        tokens: Whether to give tokens.
        pooled: Whether to give a vector: projected where the class has a projection, or else the pooler's.
        dtype: Precision of the encoder.
    """

    def __init__(
        self,
        model: str | nn.Module,
        subfolder: str | None = None,
        tokenizer: str | None = None,
        tokenizer_subfolder: str | None = None,
        layer: int = -1,
        max_length: int | None = None,
        use_mask: bool = False,
        tokens: bool = True,
        pooled: bool = False,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        precision = _checked(layer, tokens, pooled, dtype)
        if isinstance(model, nn.Module) and tokenizer is None:
            raise ValueError("`tokenizer` must say where the tokenizer is, since `model` is a module. Give its folder.")
        self.model = load_text_encoder(model, subfolder, precision)
        self.requires_grad_(False).train(False)
        places = [(tokenizer or str(model), tokenizer_subfolder or "")]
        if tokenizer is None and tokenizer_subfolder is None:
            convention = (subfolder or "").replace("text_encoder", "tokenizer")
            places = [(str(model), place) for place in dict.fromkeys((convention, subfolder or ""))]
        self.tokenizer = find_tokenizer(places)
        name, known = type(self.model).__name__, self.tokenizer.get_vocab()
        config = _text_config(self.model)
        if not len(self.tokenizer.all_special_ids) < len(self.tokenizer) <= config.vocab_size:
            numbers = f"knows {len(self.tokenizer)} tokens, {name} {config.vocab_size}"
            raise ValueError(f"The tokenizer in {places[0]} is of another model: it {numbers}. Give `tokenizer`.")
        self.max_length = int(self.tokenizer.model_max_length if max_length is None else max_length)
        most = getattr(config, "max_position_embeddings", _ENDLESS)
        least = max(1, self.tokenizer.num_special_tokens_to_add())  # below it a tokenizer does not cut
        if not least <= self.max_length <= most:
            got = f"{self.max_length}{' by default' if max_length is None else ''}"
            raise ValueError(f"`max_length` must be set to {least} .. {most} for {name}, got {got}.")
        self.layer, self.use_mask, self.tokens, self.pooled = layer, use_mask, tokens, pooled
        self._see_what_it_gives()
        self.settings = {"layer": layer, "length": self.max_length, "mask": use_mask, "tokens": tokens, "model": name}
        padded = self.tokenizer("", padding="max_length", max_length=self.max_length, truncation=True)["input_ids"]
        vocabulary = blake2b(repr([*sorted(known.items()), padded]).encode()).hexdigest()
        self.settings |= {"pooled": pooled, "vocabulary": vocabulary}

    def _see_what_it_gives(self) -> None:
        name, one = type(self.model).__name__, torch.zeros(1, 1, dtype=torch.long, device=self.device)
        if self.device.type == "meta":  # a model without data can be counted, not run
            width = _text_config(self.model).hidden_size
            projection = getattr(self.model, "text_projection", None)
            self.token_dim = width if self.tokens else None
            self.pooled_dim = (width if projection is None else projection.out_features) if self.pooled else None
            return
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                output = self.model(input_ids=one, attention_mask=one + 1, output_hidden_states=True)
            layers, width, vector = len(output.hidden_states), output.last_hidden_state.shape[-1], _vector(output)
        except Exception as error:  # whatever another kind of model says to text alone
            raise ValueError(f"`model`: {name} gives no hidden states of text alone, as it must ({error}).") from error
        if self.layer < -layers:
            raise ValueError(f"`layer`={self.layer} must be {-layers} to -1: {name} has {layers - 1} layers.")
        if self.pooled and vector is None:
            raise ValueError(f"`pooled` must be false for {name}, which has no projection or pooler; CLIP towers have.")
        self.token_dim = width if self.tokens else None
        self.pooled_dim = vector.shape[-1] if self.pooled and vector is not None else None

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode B captions; called without gradient and autocast."""
        options = {"padding": "max_length", "max_length": self.max_length, "return_tensors": "pt"}
        batch = self.tokenizer(list(captions), truncation=True, **options)
        if not self._cut_reported and bool(batch["attention_mask"][:, -1].any()):
            self._report_cut(max(map(len, self.tokenizer(list(captions), verbose=False)["input_ids"])), self.max_length)
        ids, mask = (batch[name].to(self.device, non_blocking=True) for name in ("input_ids", "attention_mask"))
        masked = {"attention_mask": mask} if self.use_mask else {}
        output = self.model(input_ids=ids, output_hidden_states=self.layer != -1, **masked)
        hidden = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        tokens, mask = (hidden, mask.bool() if self.use_mask else None) if self.tokens else (None, None)
        return TextEmbedding(tokens, mask, _vector(output) if self.pooled else None)


class OpenCLIPText(TextEncoder):
    """The text tower of an open_clip model.

    Args:
        model_name: Name of one, such as ``ViT-bigG-14``, or ``local-dir:FOLDER`` or ``hf-hub:ID`` with its weights.
        pretrained: A tag of open_clip's, or a file of weights; None draws them at random.
        layer: Tokens: -1 the last, after the final norm; -2 what the last block is given.
        tokens: Whether to give tokens.
        pooled: Whether to give the projected vector at the end of the text, not normalized.
        dtype: Precision of the tower.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: str | None = None,
        layer: int = -1,
        tokens: bool = True,
        pooled: bool = True,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        precision = _checked(layer, tokens, pooled, dtype)
        open_clip = optional("open_clip")
        weights = {"pretrained_text": False, "require_pretrained": pretrained is not None or ":" in model_name}
        try:
            self.model = create_open_clip(model_name, pretrained, **weights)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"`model_name`={model_name!r}, `pretrained`={pretrained!r}: {error}") from error
        tower = getattr(self.model, "text", self.model)
        if not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
            raise ValueError(f"`model_name`={model_name!r} must have a CLIP's text tower, got {type(tower).__name__}.")
        del self.model.visual
        self.model.to(precision)
        self.requires_grad_(False).train(False)
        self.blocks, self.length = len(tower.transformer.resblocks), tower.context_length
        if layer < -self.blocks:
            raise ValueError(f"`layer`={layer} must be {-self.blocks} to -1: {model_name} has {self.blocks} layers.")
        self.tokenizer = open_clip.get_tokenizer(model_name)
        self.layer, self.tokens, self.pooled = layer, tokens, pooled
        # Where a folder lies says nothing of what it holds.
        name = "local-dir:" if model_name.startswith("local-dir:") else model_name
        self.settings = {"layer": layer, "tokens": tokens, "pooled": pooled, "model": name}
        empty: TextEmbedding = self([""])
        self.token_dim = None if empty.tokens is None else empty.tokens.shape[-1]
        self.pooled_dim = None if empty.pooled is None else empty.pooled.shape[-1]

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode B captions; called without gradient and autocast."""
        ids = self.tokenizer(list(captions))
        if not self._cut_reported and bool(ids[:, -1].any()) and hasattr(self.tokenizer, "encode"):
            # Marks of start and end are added to what ``encode`` gives.
            self._report_cut(max(len(self.tokenizer.encode(caption)) + 2 for caption in captions), self.length)
        output = self.model.forward_intermediates(
            text=ids.to(self.device, non_blocking=True),
            text_indices=[self.blocks + self.layer],  # the block whose output the one that ``layer`` names is given
            normalize=False,
            normalize_intermediates=self.layer == -1,
        )
        tokens = output["text_intermediates"][0] if self.tokens else None
        return TextEmbedding(tokens, pooled=output["text_features"] if self.pooled else None)


class SideBySide(TextEncoder):
    """Several encoders as one: each token has the channels of all, and so does the pooled vector.

    Args:
        encoders: Those that give tokens must give equally many.
    """

    def __init__(self, encoders: list[TextEncoder]) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("`encoders` must hold one text encoder or more, got none.")
        self.encoders = nn.ModuleList(encoders)
        self.token_dim = sum(encoder.token_dim or 0 for encoder in encoders) or None
        self.pooled_dim = sum(encoder.pooled_dim or 0 for encoder in encoders) or None

    @property
    def settings(self) -> Mapping[str, object]:  # type: ignore[override]
        """Those of the encoders, and their weights."""
        return {"encoders": [cast(TextEncoder, encoder).fingerprint() for encoder in self.encoders]}

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode B captions; called without gradient and autocast."""
        parts = [cast(TextEmbedding, encoder(captions)) for encoder in self.encoders]
        lengths = [part.tokens.shape[1] for part in parts if part.tokens is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"`encoders` must give equally many tokens, got {lengths}. Set their `max_length` alike.")
        # There is something to attend to wherever one encoder attends.
        masks = [part.mask for part in parts if part.mask is not None]
        mask = torch.stack(masks).any(dim=0) if masks and len(masks) == len(lengths) else None
        return TextEmbedding(_side_by_side([p.tokens for p in parts]), mask, _side_by_side([p.pooled for p in parts]))


def _side_by_side(tensors: Sequence[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given, dim=-1) if given else None


def _checked(layer: int, tokens: bool, pooled: bool, dtype: str) -> torch.dtype:
    if not tokens and not pooled:
        raise ValueError("`tokens` and `pooled` are both false, so that the encoder would give nothing. Set one.")
    if layer > -1:
        raise ValueError(f"`layer` must be -1 (the last) or below, counted from the end, got {layer}.")
    if dtype not in get_args(Precision):
        raise ValueError(f"`dtype` must be one of {', '.join(get_args(Precision))}, got {dtype!r}.")
    return cast(torch.dtype, getattr(torch, dtype))


def _vector(output: Any) -> Tensor | None:
    """The projected vector, or else the pooler's, or else None."""
    return cast(Tensor | None, getattr(output, "text_embeds", getattr(output, "pooler_output", None)))


def _text_config(model: nn.Module) -> Any:
    """A model's config, or that of its text, where it is one of images too."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
