"""Captions of images by vision-language models of transformers: ``lpl caption``."""

from lpl_lightning.captioning.command import caption_images

__all__ = ["caption_images"]
