"""``lpl caption``: captions for a folder of images or for tar shards, by a vision-language model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lpl_lightning.arguments import above, at_least
from lpl_lightning.captioning.batches import Share
from lpl_lightning.captioning.folders import CaptionedFolder, CaptionFormat
from lpl_lightning.captioning.loop import CaptionLoop, OnError
from lpl_lightning.captioning.models import Captioner, Decoding, find_model, load_processor, probe
from lpl_lightning.captioning.prompts import Prompt
from lpl_lightning.captioning.record import check_record, hashes, versions
from lpl_lightning.captioning.shards import MEMBER, CaptionedShards
from lpl_lightning.data.listing import images_below, some
from lpl_lightning.data.tar_members import scheme_of
from lpl_lightning.data.webdataset import SUFFIXES

__all__ = ["caption_images"]

CaptionPrecision = Literal["float32", "float16", "bfloat16"]


def caption_images(
    images: str,
    model: str,
    out: str | None = None,
    format: CaptionFormat | None = None,
    member: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    num_beams: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: CaptionPrecision = "float32",
    device: str | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    shard: str | None = None,
    on_error: OnError = "skip",
    overwrite: bool = False,
    limit: int | None = None,
) -> Path:
    """Caption the images of a folder or of tar shards, and go on where a run was stopped.

    Called again with the same arguments it captions what has no caption yet: after a kill, or when images were added.
    Beside the captions are ``captions-record.json``, by what they were made; ``captions-report.json``, which images
    could not be captioned, have an empty caption, or one that was cut off; and ``captions-parts``, what a run goes on
    from.

    Args:
        images: Folder of the images, with sub-folders or without; or shards of ``WebDatasetDataModule``, which are left
            as they are: a folder of tar files, or their paths with braces, in quotes.
        model: Vision-language model of transformers, such as ``florence-community/Florence-2-large``: a Hugging Face
            hub id or a folder that ``save_pretrained`` wrote. Only safetensors are read.
        out: Folder that captions are written to; by default that of the images. Of shards the folder of new ones, each
            written once all of its images are done: all members of the old one, and the captions.
        format: For a folder: ``metadata``, the default, writes ``metadata.jsonl``, a row an image, once all are done;
            ``sidecar`` a text file beside each image, as it is captioned.
        member: For shards: what captions are named, behind the key of their sample; by default ``caption.txt``.
        prompt: What the model is asked: a task of Florence-2, by default <MORE_DETAILED_CAPTION>; for a model with a
            chat template a text, by default "Describe this image in detail."; for others, such as BLIP, what captions
            begin with, which is not part of them, by default nothing.
        max_new_tokens: The most tokens of a caption.
        num_beams: Beams of the search for the likeliest caption; by default as the model's own settings say.
        temperature: Draw captions at random, at this temperature; by default the likeliest is taken.
        seed: Seed of what is drawn.
        revision: Branch, tag or commit of the model on the hub.
        dtype: Precision of the model.
        device: Where it runs, such as ``cuda``; by default there if there is one, or else on the CPU.
        batch_size: Images captioned at once.
        num_workers: Processes that read images.
        shard: I/N, as in 0/4, for the share I of N processes; by default what torchrun sets, or all. Tar shards are
            shared out whole.
        on_error: What becomes of images that cannot be read: ``skip`` names them in the report, and in a folder or an
            unfinished shard a later run tries again; ``raise`` stops.
        overwrite: Replace captions, and shards in ``out``, that are there already from elsewhere.
        limit: Stop after this many images, rounded up to whole batches. 0 writes the table of what there is.

    Returns:
        The folder that captions are in.

    Raises:
        BlockingIOError: Another process has this share.
        FileNotFoundError: The images or the model are not there.
        ValueError: An argument is wrong, there are captions by another model, by other settings or from elsewhere, or
            with ``on_error`` raise an image cannot be read, or the disk is full.
    """
    at_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    at_least(0, num_workers=num_workers, **({} if limit is None else {"limit": limit}))
    at_least(1, **({} if num_beams is None else {"num_beams": num_beams}))
    above(0, **({} if temperature is None else {"temperature": temperature}))
    for name, value, choices in (
        ("format", format, (None, *get_args(CaptionFormat))),
        ("dtype", dtype, get_args(CaptionPrecision)),
        ("on_error", on_error, get_args(OnError)),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(filter(None, choices))}, got {value!r}.")
    share, place = Share.find(shard), _place(device)
    job: CaptionedFolder | CaptionedShards
    if holds_shards(images):
        if format is not None:
            raise ValueError(f"`format`={format!r} is of folders; captions of shards go into new shards. Leave it out.")
        job = CaptionedShards(images, out, MEMBER if member is None else member, overwrite, share)
    else:
        if member is not None:
            raise ValueError(f"`member`={member!r} is of shards, but `images`={images!r} names none. Leave it out.")
        job = CaptionedFolder(images, out, format or "metadata", overwrite, share)
    files = find_model(model, revision)
    asked = Prompt(load_processor(files, model), prompt)
    probe(asked, model)
    settings: dict[str, Any] = {
        "prompt": asked.asked,
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "temperature": temperature,
        "seed": None if temperature is None else seed,
        "dtype": dtype,
    }
    binding = {"model": hashes(files), "settings": settings, **job.binding}
    noted = {"name": model, "revision": revision, "batch_size": batch_size, "versions": versions()}
    try:
        job.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`out`: {job.out} cannot be written ({error}). Give another folder.") from error
    check_record(job.out, binding, noted, share.name)
    decoding = Decoding(max_new_tokens, num_beams, temperature, seed)
    load = partial(Captioner, files, model, asked, decoding, getattr(torch, dtype), place)
    job.caption(CaptionLoop(load, asked, batch_size, num_workers, on_error, limit))
    return job.out


def holds_shards(images: str) -> bool:
    """Whether tar shards are meant, and not a folder of images.

    Args:
        images: A folder, or paths of shards.

    Raises:
        ValueError: A folder holds both.
    """
    folder = Path(images).expanduser()
    if not folder.is_dir():
        return images.endswith(SUFFIXES) or bool(scheme_of(images)) or "{" in images or "::" in images
    shards = sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not shards:
        return False
    try:
        found = images_below(folder, "images")
    except ValueError:  # there are none
        return True
    raise ValueError(
        f"`images`: {folder} holds tar shards ({some(shards)}) and images ({some(found)}). Name the shards, as in "
        f"'{folder / shards[0]}' or with braces in quotes, or move either elsewhere."
    )


def _place(device: str | None) -> torch.device:
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # each process of a launcher has its own
    if device is None:
        return torch.device(local if torch.cuda.is_available() else "cpu")
    device = local if device == "cuda" else device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch says the latter where it was built without
        raise ValueError(f"`device`={device!r} cannot be used: {error}. Give 'cpu', or leave it out.") from error
