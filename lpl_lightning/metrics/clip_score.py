"""CLIPScore: how well an image fits its caption.

By Hessel et al. (2021), "CLIPScore: A reference-free evaluation metric for image captioning", section 3:

    score = w max(cos(E_image, E_caption), 0),   averaged over pairs.

The paper has w = 2.5, and puts "A photo depicts " before each caption; in text-to-image generation, and torchmetrics, w
is 100, and captions are as they are. torchmetrics clamps the average in place of each pair, which differs where a pair
has a negative cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lpl_lightning.arguments import above
from lpl_lightning.frozen import FrozenModule, weights_hash
from lpl_lightning.metrics.gaussian import DoubleMetric
from lpl_lightning.metrics.preparation import Filter, check_images
from lpl_lightning.metrics.tower_features import clip_preparation, load_open_clip, plain_name
from lpl_lightning.pretrained import is_untrained
from lpl_lightning.text_loading import optional

__all__ = ["CLIPScore"]


class CLIPScore(DoubleMetric):
    """Mean CLIPScore over pairs of an image and a caption.

    Captions of more tokens than the tower takes (77) are cut, with the end-of-text token kept: the embedding is read
    there.

    Args:
        model_name: An open_clip model, such as ``ViT-B-32-quickgelu`` (the paper's) or ``ViT-L-14-quickgelu``;
            ``local-dir:FOLDER`` or ``hf-hub:ID`` with its weights; or ``random:NAME`` to draw them anew, for trials.
        pretrained: A tag of open_clip's, such as ``openai``, or a file of weights.
        weight: w.
        prefix: What is put before each caption, such as the paper's ``"A photo depicts "``.
        resize: Filter of images. By default the model's, which is bicubic for CLIP.
        antialias: Widen the filter in shrinking, as PIL does and CLIP was trained with.
        kwargs: Those of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    score: Tensor
    count: Tensor

    def __init__(
        self,
        model_name: str,
        pretrained: str | None = None,
        weight: float = 100.0,
        resize: Filter | None = None,
        antialias: bool = True,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        above(0, weight=weight)
        model = load_open_clip(model_name, pretrained)
        self.towers = _Towers(model)
        self.preparation = clip_preparation(model, resize, antialias)
        self.tokenizer: Any = optional("open_clip").get_tokenizer(is_untrained(model_name)[1])
        self.name, self.weight, self.prefix = plain_name(model_name), weight, prefix
        self._cut_reported = False
        self.add_state("score", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Take a batch of pairs; arguments and errors are those of ``pairs``."""
        scores = self.pairs(images, captions)
        self.score += scores.sum()
        self.count += len(scores)

    def pairs(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score pairs one by one.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            captions: B strings.

        Returns:
            (B,) float64, from 0 to w.

        Raises:
            ValueError: The images are not such, or the captions are not as many.
        """
        check_images(images)
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"`captions` must be a list of strings, got {captions!r}.")
        if len(captions) != len(images):
            raise ValueError(f"`captions` must be one an image, {len(images)}, got {len(captions)}.")
        cosine = self.towers(self.preparation(images.to(self.device)), self.tokens(captions))
        scores: Tensor = self.weight * cosine.double().clamp(min=0)
        return scores

    def compute(self) -> Tensor:
        """The mean, float64.

        Raises:
            ValueError: No pair was seen.
        """
        if not self.count:
            raise ValueError("CLIPScore: there is no pair of image and caption to average over. Call `update` first.")
        return self.score / self.count

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Tokens of B captions, (B, L), the last of a caption that is cut being the end of the text."""
        captions = [self.prefix + caption for caption in captions]
        ids: Tensor = self.tokenizer(captions)
        encode = getattr(self.tokenizer, "encode", None)
        if not self._cut_reported and encode is not None and bool(ids[:, -1].any()):
            lost = max(len(encode(caption)) + 2 for caption in captions) - ids.shape[1]
            if lost > 0:
                self._cut_reported = True
                rank_zero_warn(f"CLIPScore takes {ids.shape[1]} tokens: {lost} of a caption are dropped.")
        return ids

    def provenance(self) -> dict[str, str | int | bool]:
        """What the score depends on besides images and captions."""
        return {
            "class": type(self).__name__,
            "model": self.name,
            "weights": weights_hash(self.towers),
            "w": f"{self.weight:g}",
            "tokens": int(self.tokens([""]).shape[1]),
            **({"prefix": self.prefix} if self.prefix else {}),
            **self.preparation.provenance(),
            "library": f"open_clip {optional('open_clip').__version__}",
        }


class _Towers(FrozenModule):
    """Both towers of a model, frozen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.float().requires_grad_(False).train(False)

    def forward(self, prepared: Tensor, ids: Tensor) -> Tensor:
        """Cosines (B,) of B images, (B, 3, h, w), and B captions, (B, L)."""
        precision = next(self.parameters()).dtype
        with torch.no_grad(), torch.autocast(prepared.device.type, enabled=False):
            image = self.model.encode_image(prepared.to(precision))
            text = self.model.encode_text(ids.to(prepared.device))
            return nn.functional.cosine_similarity(image, text)
