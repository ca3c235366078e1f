"""How a vision-language model is asked for a caption, and how its tokens become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpl_lightning.text_loading import optional

__all__ = ["CHAT_PROMPT", "FLORENCE_TASK", "Prompt"]

FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"
"""What Florence-2 is asked by default, as in the paper."""

CHAT_PROMPT = "Describe this image in detail."
"""What models with a chat template are asked by default."""


class Prompt:
    """Images and a prompt to what a model is called with, and its tokens to text.

    All images have the same prompt. Where their inputs differ in length, the shorter are padded and masked: on the left
    for models that go on with the prompt, so that no caption has pads in it.

    Args:
        processor: The model's, of transformers.
        prompt: A task of Florence-2; a text to go into the chat template of a model that has one; otherwise the prompt
            as it is. None takes ``FLORENCE_TASK`` or ``CHAT_PROMPT``, and for other models none.

    Raises:
        ValueError: The task of Florence-2 does not give text.
    """

    def __init__(self, processor: Any, prompt: str | None = None) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.is_florence = isinstance(processor, optional("transformers").Florence2Processor)
        template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        self.is_chat = not self.is_florence and template is not None
        self.asked = prompt
        if prompt is None and (self.is_florence or self.is_chat):
            self.asked = FLORENCE_TASK if self.is_florence else CHAT_PROMPT
        self._text, self._options = self.asked, dict[str, Any]()
        if self.is_florence:
            kinds: dict[str, str] = processor.tasks_answer_post_processing_type
            if kinds.get(str(self.asked), "pure_text") != "pure_text":
                texts = [task for task, kind in kinds.items() if kind == "pure_text" and "REGION" not in task]
                raise ValueError(
                    f"`prompt`={prompt!r} does not give text; these tasks of Florence-2 do: {', '.join(texts)}."
                )
        if self.is_chat:
            self.tokenizer.padding_side = "left"
            content = [{"type": "image"}, {"type": "text", "text": self.asked}]
            message = [{"role": "user", "content": content}]
            options = {"tokenize": False, "add_generation_prompt": True}
            self._text = processor.apply_chat_template(message, chat_template=template, **options)
            begin = self.tokenizer.bos_token
            if begin is not None and str(self._text).startswith(begin):  # which the tokenizer would give once more
                self._options["add_special_tokens"] = False
        elif not self.is_florence:
            self.tokenizer.padding_side = "left"

    def __call__(self, images: list[Image.Image]) -> Mapping[str, Any]:
        """Prepare images.

        Args:
            images: RGB.

        Returns:
            Arguments of the model's ``generate``, a row for each image.
        """
        given: Any = [[image] for image in images] if self.is_chat else images
        options: dict[str, Any] = {"return_tensors": "pt", **self._options}
        if self._text is not None:
            options |= {"text": [self._text] * len(images), "padding": True}
        return dict(self.processor(images=given, **options))

    def without_prompt(self, model: Any, generated: Tensor, input_ids: Tensor | None) -> Tensor:
        """Tokens that a model has added to the prompt.

        Args:
            model: The model.
            generated: (B, L) int64, as its ``generate`` gives them.
            input_ids: (B, P) int64, the prompt; None where there was none.

        Returns:
            (B, N) int64.
        """
        if model.config.is_encoder_decoder:
            return generated[:, 1:]  # behind the one that its decoder starts with
        if isinstance(model, optional("transformers").BlipForConditionalGeneration):
            # It puts a token of its own in the place of the prompt's first, and takes off the last.
            return generated[:, 1 if input_ids is None else input_ids.shape[1] - 1 :]
        if input_ids is not None and torch.equal(generated[:, : input_ids.shape[1]], input_ids):
            return generated[:, input_ids.shape[1] :]
        return generated

    def ends(self, model: Any) -> list[int]:
        """Tokens at which a caption ends."""
        if isinstance(model, optional("transformers").BlipForConditionalGeneration):
            return [int(model.config.text_config.sep_token_id)]
        found = model.generation_config.eos_token_id
        return list(found) if isinstance(found, list | tuple) else [] if found is None else [int(found)]

    def text(self, tokens: Tensor, size: tuple[int, int]) -> str:
        """A caption in one line.

        Args:
            tokens: (N,) int64, without the prompt.
            size: Width and height of the image, in pixels.
        """
        if self.is_florence:
            # Its special tokens are for its own parser to take off, which leaves pads.
            kept = tokens[tokens != self.tokenizer.pad_token_id]
            raw = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            raw = self.processor.post_process_generation(text=raw, task=self.asked, image_size=size)[self.asked]
        else:
            raw = self.tokenizer.decode(tokens, skip_special_tokens=True)
        # Text files beside images hold a caption a line.
        return " ".join(str(raw).split())
