"""Images in [-1, 1], shaped (C, H, W), with a class label and, where there is one, a caption.

Every data set here yields dictionaries; batches hold

- ``image``: (B, 3, H, W) float32 in [-1, 1], of one size in a batch, square unless there are buckets;
- ``latent`` (B, C, h, w) in place of it, where images were encoded before: the mean of the autoencoder's scaled
  latents, and ``latent_std`` of the same shape, where the posterior has a width; both in the type that they are stored
  in, float16 by default: ``LatentDiffusionModule`` makes them float32, a module of one's own calls ``.float()``;
- ``label``: (B,) int64 class index, absent where there are no classes;
- ``caption``: list of B strings, absent where there are none;
- ``original_size``: (B, 2) int64, height and width of the image files in pixels, as they are seen upright;
- ``crop_top_left``: (B, 2) int64, top and left of the image in what its file was resized to, in pixels. Both are absent
  where images are made at their size.
"""

from lpl_lightning.data.base import ImageDataModule, SampleRequests
from lpl_lightning.data.buckets import AspectBuckets
from lpl_lightning.data.folder import ImageFolderDataModule, ImageFolderDataset
from lpl_lightning.data.huggingface import HuggingFaceDataModule
from lpl_lightning.data.imagenet import ImageNetDataModule
from lpl_lightning.data.latent_cache import CachedLatents, LatentCacheDataModule
from lpl_lightning.data.shapes import ShapesDataModule, ShapesDataset
from lpl_lightning.data.webdataset import WebDatasetDataModule

__all__ = [
    "AspectBuckets",
    "CachedLatents",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageFolderDataset",
    "ImageNetDataModule",
    "LatentCacheDataModule",
    "SampleRequests",
    "ShapesDataModule",
    "ShapesDataset",
    "WebDatasetDataModule",
]
