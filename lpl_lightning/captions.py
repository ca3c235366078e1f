"""Captions to what a denoiser takes, by frozen text encoders, with dropout for classifier-free guidance.

The encoders' tokens stand one after the other, the narrower ones padded with zeros; their pooled vectors are joined.
So does SD3 (Esser et al., 2024, section 4); a single encoder's embedding is what it is. In training each sample loses
its text with probability ``dropout`` (Ho & Salimans, 2021), whether it is encoded here or was before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import pad

from lpl_lightning.conditioning import Condition, Conditioner, ConditionShape
from lpl_lightning.text_encoders import TextEmbedding, TextEncoder

__all__ = ["Captions"]


class Captions(Conditioner):
    """Conditions by captions.

    Args:
        encoders: Text encoders, in the order of their tokens.
        dropout: Probability with which a training sample loses its text.
        token_dim: Width D of the tokens; by default that of the widest encoder.
        null_is_zero: Whether tokens and vectors without text are zeros, as SDXL's are
            (``force_zeros_for_empty_prompt``), or what the encoders make of an empty caption.
        size_conditions: Whether to give sizes too, as SDXL takes them.
        cache_dir: Folder to keep embeddings in, a file for each caption, so that none is encoded twice; several
            processes and runs may share it.
    """

    def __init__(
        self,
        encoders: list[TextEncoder],
        dropout: float = 0.1,
        token_dim: int | None = None,
        null_is_zero: bool = False,
        size_conditions: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(dropout)
        if not encoders:
            raise ValueError("`encoders` must hold one text encoder or more, got none.")
        widest = max((encoder.token_dim or 0 for encoder in encoders), default=0)
        if token_dim is not None and (widest == 0 or token_dim < widest):
            found = f"the widest of the encoders' tokens has {widest}" if widest else "no encoder gives tokens"
            raise ValueError(f"`token_dim`={token_dim} must be {max(widest, 1)} or more, but {found}. Leave it out.")
        self.encoders = nn.ModuleList(encoders)
        self.token_dim = (token_dim or widest) or None
        self.pooled_dim = sum(encoder.pooled_dim or 0 for encoder in encoders) or None
        self.null_is_zero, self.size_conditions = null_is_zero, size_conditions
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._data_size: int | None = None
        self._key: str | None = None
        # No buffer: weight averaging would average it, and checkpoints would hold it.
        self._null: TextEmbedding | None = None

    @property
    def gives(self) -> ConditionShape:
        """Tokens and pooled vectors, of whichever there are, and sizes."""
        return ConditionShape(token_dim=self.token_dim, pooled_dim=self.pooled_dim, time_ids=self.size_conditions)

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return next(self.encoders.parameters()).device

    def fingerprint(self) -> str:
        """A hash of all that conditions depend on besides the captions."""
        settings = [*self._fingerprints(), self.token_dim, self.null_is_zero, self.size_conditions]
        return blake2b(repr(settings).encode(), digest_size=16).hexdigest()

    def embedding_key(self) -> str:
        """What ``encode`` depends on besides the captions."""
        return " ".join([*self._fingerprints(), str(self.token_dim)])

    def _fingerprints(self) -> list[str]:
        return [cast(TextEncoder, encoder).fingerprint() for encoder in self.encoders]

    def check(self, data: object) -> None:
        """Refuse data without captions, and learn the size of its images for batches that hold none."""
        if getattr(data, "has_captions", None) is False:
            raise ValueError(
                f"Captions needs data with captions, but {type(data).__name__} has none: use a data module that gives "
                "them, such as ImageFolderDataModule with `captions`, or condition by ClassLabels or ClassTokens."
            )
        size = getattr(data, "image_size", None)
        self._data_size = size if isinstance(size, int) else None

    def encode(self, captions: Sequence[str]) -> TextEmbedding:
        """Encode captions, equal ones once, or read them from the cache.

        Args:
            captions: B strings.

        Returns:
            Tokens (B, L, D), their mask (B, L) and pooled vectors (B, P), on the encoders' device; None for what the
            encoders do not give. It may be kept, and given back as ``batch["text"]``.
        """
        if isinstance(captions, str) or not captions or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"`captions` must be a list of one string or more, got {captions!r}.")
        unique = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        found = self._joined(list(unique)) if self.cache_dir is None else self._cached(list(unique), self.cache_dir)
        rows = torch.tensor([unique[text] for text in captions]).to(self.device, non_blocking=True)
        return _each(found, lambda tensor: tensor[rows])

    def forward(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None = None) -> Condition:
        """The condition of a batch.

        Args:
            batch: ``caption``, a list of B strings, or of B lists of several, of which one is drawn each time in
                training and the first is taken otherwise; or ``text``, embeddings that ``encode`` gave, a mapping with
                ``tokens`` (B, L, D), ``mask`` (B, L) and ``pooled`` (B, P). With ``size_conditions`` the sizes (B, 2)
                ``original_size``, ``crop_top_left`` and ``target_size``, in pixels; by default the target is the size
                of ``image``, and the original is the target, from its top left. ``caption_draw`` (B,), uniform in
                (0, 1), says which of several captions is taken; without it PyTorch's own numbers do.
            batch_size: Number of samples B.
            drop: (B,) bool, the samples that get the null condition.
        """
        embedding = self._embedding(batch, batch_size, drop)
        sizes = self._sizes(batch, batch_size) if self.size_conditions else None
        return Condition(tokens=embedding.tokens, mask=embedding.mask, pooled=embedding.pooled, time_ids=sizes)

    def _embedding(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None) -> TextEmbedding:
        if drop is not None and bool(drop.all()):
            return _each(self._null_embedding(), lambda null: null.expand(batch_size, *null.shape[1:]))
        if "text" in batch:
            embedding = self._given(batch["text"], batch_size)
        else:
            captions = self._chosen(batch, batch_size)
            if drop is not None:  # in the place of a caption that is lost, one that is encoded anyway
                kept = next(text for text, lost in zip(captions, drop.tolist(), strict=True) if not lost)
                captions = [kept if lost else text for text, lost in zip(captions, drop.tolist(), strict=True)]
            embedding = self.encode(captions)
        return embedding if drop is None else _without(embedding, self._null_embedding(), drop)

    def _chosen(self, batch: Mapping[str, Any], batch_size: int) -> list[str]:
        """One caption a sample."""
        if "caption" not in batch:
            raise ValueError(
                f"The batch holds neither 'caption' nor 'text' (it has {sorted(batch)}), which Captions needs. Use a "
                "data module with captions, such as ImageFolderDataModule with `captions`; give `generate` its "
                "`captions`."
            )
        captions = batch["caption"]
        if isinstance(captions, str) or len(captions) != batch_size:
            got = "a string" if isinstance(captions, str) else f"{len(captions)}"
            raise ValueError(f"`caption` of the batch must be a list of its {batch_size} samples' captions, got {got}.")
        chosen, draw = [], batch.get("caption_draw")
        u = torch.rand(batch_size, dtype=torch.float64) if draw is None and self.training else draw
        for i, texts in enumerate(captions):
            choice = [texts] if isinstance(texts, str) else list(texts)
            if not choice:
                raise ValueError(
                    "`caption` of the batch must hold a caption or more a sample, got none ([]); '' is one."
                )
            chosen.append(choice[int(u[i] * len(choice)) if self.training and u is not None else 0])
        return chosen

    def _given(self, text: Any, batch_size: int) -> TextEmbedding:
        """Embeddings from the batch."""
        parts = vars(text) if isinstance(text, TextEmbedding) else text
        found: dict[str, Any] = {name: parts.get(name) for name in ("tokens", "mask", "pooled")}
        for name, width in (("tokens", self.token_dim), ("pooled", self.pooled_dim)):
            got = None if found[name] is None else tuple(found[name].shape)
            if (width is None) != (got is None) or (got is not None and (got[0], got[-1]) != (batch_size, width)):
                wanted = f"be {batch_size} embeddings of width {width}" if width else "be left out"
                raise ValueError(
                    f"`{name}` in `text` of the batch must {wanted}, as the encoders give them, got shape {got}. "
                    "Encode the data with the encoders that the model is conditioned by."
                )
        found["mask"] = None if found["mask"] is None else found["mask"].bool()
        return _each(TextEmbedding(**found), lambda tensor: tensor.to(self.device, non_blocking=True))

    def _joined(self, captions: list[str]) -> TextEmbedding:
        """What the encoders make of captions, in one."""
        parts = [cast(TextEmbedding, encoder(captions)) for encoder in self.encoders]
        tokens = [pad(p.tokens, (0, (self.token_dim or 0) - p.tokens.shape[-1])) for p in parts if p.tokens is not None]
        masks = [p.mask for p in parts if p.tokens is not None]
        filled = [_mask(mask, part) for mask, part in zip(masks, tokens, strict=True)]
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return TextEmbedding(
            tokens=torch.cat(tokens, dim=1) if tokens else None,
            mask=torch.cat(filled, dim=1) if any(mask is not None for mask in masks) else None,
            pooled=torch.cat(pooled, dim=-1) if pooled else None,
        )

    def _null_embedding(self) -> TextEmbedding:
        """The null condition, of one sample, made once."""
        # It outlives a validation in inference mode, whose tensors no later training step could use.
        with torch.inference_mode(False), torch.no_grad():
            if self._null is None:
                null = self.encode([""])
                if self.null_is_zero:
                    null = replace(_each(null, torch.zeros_like), mask=null.mask)
                self._null = null
            self._null = _each(self._null, lambda tensor: tensor.to(self.device))
        return self._null

    def _sizes(self, batch: Mapping[str, Any], batch_size: int) -> Tensor:
        """Sizes (B, 6) float32: height and width of the original, top and left of the crop, height and width."""
        target = batch.get("target_size")
        if target is None and "image" in batch:
            target = batch["image"].shape[-2:]
        if target is None and self._data_size is not None:
            target = (self._data_size, self._data_size)
        if target is None:
            raise ValueError(
                f"The batch holds neither 'target_size' nor 'image' (it has {sorted(batch)}), of which "
                "`size_conditions` needs one."
            )
        crop = batch.get("crop_top_left")
        parts = (batch.get("original_size", target), (0, 0) if crop is None else crop, target)
        # Made on the CPU, where it is not there already: to make a tensor elsewhere is to wait for that device.
        columns = [torch.as_tensor(part, dtype=torch.float32).expand(batch_size, 2) for part in parts]
        return torch.cat([column.to(self.device, non_blocking=True) for column in columns], dim=1)

    def _cached(self, captions: list[str], folder: Path) -> TextEmbedding:
        """Embeddings from files; what has none, or one that cannot be read, is encoded and written."""
        if self._key is None:
            self._key = self.embedding_key()
        names = [blake2b(f"{self._key} {text}".encode(), digest_size=20).hexdigest() for text in captions]
        paths = [folder / f"{name}.safetensors" for name in names]
        found = [_read(path) for path in paths]
        if missing := [row for row, parts in enumerate(found) if parts is None]:
            made = self._joined([captions[row] for row in missing])
            parts = {name: tensor.cpu() for name, tensor in vars(made).items() if tensor is not None}
            folder.mkdir(parents=True, exist_ok=True)
            for index, row in enumerate(missing):
                found[row] = {name: tensor[index].clone() for name, tensor in parts.items()}
                _write(paths[row], cast(dict[str, Tensor], found[row]))
        rows = cast(list[dict[str, Tensor]], found)
        return TextEmbedding(**{name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]})


def _each(embedding: TextEmbedding, function: Callable[[Tensor], Tensor]) -> TextEmbedding:
    return TextEmbedding(**{n: None if t is None else function(t) for n, t in vars(embedding).items()})


def _mask(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The mask, or one that attends to all."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask


def _without(embedding: TextEmbedding, null: TextEmbedding, drop: Tensor) -> TextEmbedding:
    """The null condition in the place of samples that lose theirs."""
    some = next((tensor for tensor in vars(embedding).values() if tensor is not None), drop)
    drop = drop.to(some.device, non_blocking=True)

    def swap(own: Tensor | None, other: Tensor | None) -> Tensor | None:
        if own is None or other is None:
            return None
        return torch.where(drop.view(-1, *[1] * (own.dim() - 1)), other.to(own.dtype), own)

    mask, null_mask = embedding.mask, null.mask
    if embedding.tokens is not None and null.tokens is not None:
        if embedding.tokens.shape[1] != null.tokens.shape[1]:
            raise ValueError(
                f"`tokens` in `text` of the batch must be {null.tokens.shape[1]} a sample, as many as the encoders "
                f"give, got {embedding.tokens.shape[1]}. Encode the data with the encoders of this model."
            )
        if mask is not None or null_mask is not None:
            mask, null_mask = _mask(mask, embedding.tokens), _mask(null_mask, null.tokens)
    return TextEmbedding(
        swap(embedding.tokens, null.tokens), swap(mask, null_mask), swap(embedding.pooled, null.pooled)
    )


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # none yet, or one that a full disk or another program cut short
        return None


def _write(path: Path, parts: dict[str, Tensor]) -> None:
    """Put a file in its place whole, whoever else writes it at the same time."""
    draft = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        draft.write_bytes(save(parts))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
