"""Captions of images by vision-language models of transformers: ``lpl caption``."""

from lpl_lightning.captioning.folders import caption_folder

__all__ = ["caption_folder"]
