"""What an autoencoder gives back of a folder of images, for ``lpl evaluate``: the ceiling of any latent model on it.

python notebooks/reconstruct.py PHOTOS OUT --model madebyollin/taesd3
python notebooks/reconstruct.py PHOTOS OUT --shrink 2     # for comparison: made smaller and larger again, bicubic

PSNR in dB and SSIM, means over images, go to a file of ``--values`` too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from lpl_lightning import Autoencoder
from lpl_lightning.evaluation.generated import to_uint8, write_png
from lpl_lightning.evaluation.image_files import ImageFiles, loader
from lpl_lightning.metrics import Reconstruction

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="folder of square images of one size, a multiple of the downscaling")
    parser.add_argument("out", help="folder to write PNG files of the same names to")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--model", help="folder, hub id or embedded:NAME of an autoencoder")
    how.add_argument("--shrink", type=int, help="factor to shrink by")
    parser.add_argument("--values", type=Path, help="JSON file to write to")
    given = parser.parse_args()
    photos = ImageFiles(given.photos, "photos")
    autoencoder = None if given.model is None else Autoencoder(given.model)
    reconstruction = Reconstruction()
    for batch in tqdm(loader(photos, batch_size=64, num_workers=0)):
        images = batch["image"]
        with torch.no_grad():
            if autoencoder is not None:
                again = autoencoder.decode(autoencoder.encode(images))
            else:
                small = interpolate(images, scale_factor=1 / given.shrink, mode="bicubic", antialias=True)
                again = interpolate(small, images.shape[2:], mode="bicubic", antialias=True)
        reconstruction.update(again, images)
        for image, index in zip(to_uint8(again), batch["index"].tolist(), strict=True):
            path = (Path(given.out) / Path(photos.paths[index]).relative_to(photos.folder)).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, path)
    values = {name: float(value) for name, value in reconstruction.compute().items()}
    print(values)
    if given.values is not None:
        given.values.write_text(json.dumps(values))
