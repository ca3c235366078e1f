"""What a denoiser is conditioned on, and the dropout that classifier-free guidance needs.

A *conditioner* turns a batch's labels (or, with a text encoder, its captions) into a ``Condition``. In training it
replaces each sample's condition by the null condition with probability ``dropout``, drawn anew at each step
(Ho & Salimans, 2021).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ClassLabels", "ClassTokens", "Condition", "ConditionShape", "Conditioner"]


@dataclass(frozen=True)
class Condition:
    """What diffusers backbones take; each holds what it needs.

    Attributes:
        class_labels: (B,) int64 for backbones with a label embedding of their own.
        tokens: (B, L, D) for backbones that attend to tokens.
        mask: (B, L) bool, true for tokens to be attended to; None for all.
        pooled: (B, P) one vector a sample.
        time_ids: (B, 6) float32, sizes as SDXL has them: height and width of the original image, top and left of the
            crop, height and width of the target, in pixels.
    """

    class_labels: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def joined(self, other: Condition) -> Condition:
        """Both conditions in one batch, this one first."""

        def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Condition(**{f.name: cat(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class ConditionShape:
    """What a conditioner gives, or what a backbone takes; None is nothing of the kind.

    Attributes:
        num_classes: Number of classes, without the null label, where there are labels.
        token_dim: Width D of the tokens.
        pooled_dim: Width P of the pooled vector.
        time_ids: Whether there are sizes.
    """

    num_classes: int | None = None
    token_dim: int | None = None
    pooled_dim: int | None = None
    time_ids: bool = False


class Conditioner(nn.Module, ABC):
    """Base of conditioners.

    Args:
        dropout: Probability with which a training sample loses its condition.
    """

    num_classes: int | None = None
    """Number of classes that it tells apart, 0 for none (unconditional); None where it goes by something else."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"`dropout` must lie in 0 .. 1, got {dropout}.")
        self.dropout = dropout

    @property
    @abstractmethod
    def gives(self) -> ConditionShape:
        """What the conditions hold."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None = None) -> Condition:
        """The condition of a batch.

        Args:
            batch: A batch of data.
            batch_size: Number of samples B; a batch without a condition cannot tell.
            drop: (B,) bool, the samples that get the null condition.
        """

    def dropped(self, u: Tensor) -> Tensor | None:
        """Which samples lose their condition, (B,) bool, by u (B,) uniform in (0, 1); None where ``dropout`` is 0."""
        return u < self.dropout if self.dropout else None

    def check(self, data: object) -> None:
        """Refuse a data module whose conditions do not fit, before the first step.

        Raises:
            ValueError: They do not fit.
        """


class _Classes(Conditioner):
    """Labels 0 .. num_classes - 1, with ``num_classes`` as the null label."""

    num_classes: int

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__(dropout)
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be 0 (unconditional) or more, got {num_classes}.")
        self.num_classes = num_classes
        # Says where the module is. The null label itself is no buffer: weight averaging would average it.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    anchor: Tensor

    def labels(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None) -> Tensor:
        """Class labels (B,) with the null label where dropped, or for all where there are no classes.

        Raises:
            ValueError: The batch has no classes, another number of them, or one that is not known.
        """
        null = torch.full((batch_size,), self.num_classes, device=self.anchor.device)
        if self.num_classes == 0 or (drop is not None and bool(drop.all())):
            return null
        if "label" not in batch:
            raise ValueError(
                f"The batch holds no 'label' (it has {sorted(batch)}), but the conditioner was built for "
                f"`num_classes`={self.num_classes}. Use data with classes, or `num_classes`: 0."
            )
        labels = torch.as_tensor(batch["label"])
        if labels.shape != (batch_size,):
            raise ValueError(
                f"`label` of the batch must hold a class for each of its {batch_size} samples, ({batch_size},), got "
                f"{tuple(labels.shape)}: give as many labels as images."
            )
        if labels.is_floating_point():
            raise ValueError(f"`label` of the batch must hold whole numbers, got {labels.dtype}.")
        # Looked at only where that costs no wait for an accelerator; ``check`` compares the counts before training.
        if labels.device.type == "cpu" and len(labels):
            ends = (int(labels.min()), int(labels.max()))
            unknown = [label for label in ends if not 0 <= label < self.num_classes]
            if unknown:
                raise ValueError(
                    f"The batch holds class {unknown[0]}, but the conditioner knows `num_classes`="
                    f"{self.num_classes}, numbered from 0."
                )
        labels = labels.to(null.device)
        return labels if drop is None else torch.where(drop.to(null.device, non_blocking=True), null, labels)

    def check(self, data: object) -> None:
        """Refuse data with another number of classes."""
        found = getattr(data, "num_classes", None)
        if found == 0 and self.num_classes and getattr(data, "has_captions", False):
            raise ValueError(
                f"The data have captions and no classes, but {type(self).__name__} goes by class labels. Condition by "
                "lpl_lightning.Captions (and a backbone that attends to text), or use data with classes."
            )
        if isinstance(found, int) and self.num_classes not in (0, found):
            raise ValueError(
                f"`num_classes`={self.num_classes} of the conditioner does not fit the data, which has {found} "
                f"classes. Set `model.init_args.conditioner.init_args.num_classes` to {found}."
            )


class ClassLabels(_Classes):
    """Class labels for a backbone that embeds them itself, such as DiT.

    Args:
        num_classes: Number of classes; the null label of guidance is ``num_classes``.
        dropout: Probability with which a training sample loses its label.
    """

    def __init__(self, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(num_classes, dropout)

    @property
    def gives(self) -> ConditionShape:
        """Labels."""
        return ConditionShape(num_classes=self.num_classes)

    def forward(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None = None) -> Condition:
        """Labels (B,), from ``batch["label"]``."""
        return Condition(class_labels=self.labels(batch, batch_size, drop))


class ClassTokens(_Classes):
    """Trained embeddings of class labels, for a backbone made for text, such as SD3's MMDiT.

    Args:
        num_classes: Number of classes; 0 trains unconditionally. One more embedding is the null condition.
        token_dim: Width D of the tokens: ``joint_attention_dim`` of an MMDiT, ``cross_attention_dim`` of a UNet.
        pooled_dim: Width P of the pooled vector: ``pooled_projection_dim`` of an MMDiT. None where the backbone takes
            none.
        tokens_per_class: Number L of tokens a class has.
        dropout: Probability with which a training sample loses its label.
    """

    def __init__(
        self,
        num_classes: int,
        token_dim: int,
        pooled_dim: int | None = None,
        tokens_per_class: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, dropout)
        self.token_dim, self.pooled_dim = token_dim, pooled_dim
        self.tokens = nn.Embedding(num_classes + 1, tokens_per_class * token_dim)
        self.pooled = None if pooled_dim is None else nn.Embedding(num_classes + 1, pooled_dim)
        for embedding in (self.tokens, self.pooled):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    @property
    def gives(self) -> ConditionShape:
        """Tokens and, with ``pooled_dim``, a pooled vector."""
        return ConditionShape(token_dim=self.token_dim, pooled_dim=self.pooled_dim)

    def forward(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None = None) -> Condition:
        """Tokens (B, L, D) and pooled vectors (B, P), from ``batch["label"]``."""
        labels = self.labels(batch, batch_size, drop)
        return Condition(
            tokens=self.tokens(labels).unflatten(-1, (-1, self.token_dim)),
            pooled=None if self.pooled is None else self.pooled(labels),
        )
