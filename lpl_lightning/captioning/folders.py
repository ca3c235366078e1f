"""``lpl caption``: captions for a folder of images, by a vision-language model."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lpl_lightning.arguments import above, at_least
from lpl_lightning.captioning.batches import Batch, Batches, Share, planned
from lpl_lightning.captioning.journal import Journal, Row
from lpl_lightning.captioning.models import Captioner, Decoding, find_model, load_processor, probe
from lpl_lightning.captioning.outputs import REPORT, Sidecars, Table, write_report
from lpl_lightning.captioning.prompts import Prompt
from lpl_lightning.captioning.record import check_record, hashes, versions
from lpl_lightning.data.listing import images_below

__all__ = ["caption_folder"]

CaptionFormat = Literal["metadata", "sidecar"]
CaptionPrecision = Literal["float32", "float16", "bfloat16"]
OnError = Literal["skip", "raise"]


def caption_folder(
    images: str,
    model: str,
    out: str | None = None,
    format: CaptionFormat = "metadata",
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
    """Caption the images of a folder, and go on where a run was stopped.

    Called again with the same arguments it captions what has no caption yet: after a kill, or when images were added.
    Beside the captions are ``captions-record.json``, by what they were made; ``captions-report.json``, which images
    could not be captioned, have an empty caption, or one that was cut off; and ``captions-parts``, what a run goes on
    from.

    Args:
        images: Folder of the images, with sub-folders or without.
        model: Vision-language model of transformers, such as ``florence-community/Florence-2-large``: a Hugging Face
            hub id or a folder that ``save_pretrained`` wrote. Only safetensors are read.
        out: Folder that captions are written to; by default that of the images.
        format: ``metadata`` writes ``metadata.jsonl``, a row an image, once all are done; ``sidecar`` a text file
            beside each image, as it is captioned.
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
        shard: I/N, as in 0/4, for the share I of N processes; by default what torchrun sets, or all.
        on_error: What becomes of images that cannot be read: ``skip`` names them in the report, and a later run tries
            again; ``raise`` stops.
        overwrite: Replace captions that are there already from elsewhere.
        limit: Stop after this many images, rounded up to whole batches. 0 writes the table of what there is.

    Returns:
        The folder that captions are in.

    Raises:
        BlockingIOError: Another process has this share.
        FileNotFoundError: The images or the model are not there.
        ValueError: An argument is wrong, there are captions by another model, by other settings or from elsewhere, or
            with ``on_error`` raise an image cannot be read.
    """
    at_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    at_least(0, num_workers=num_workers, **({} if limit is None else {"limit": limit}))
    at_least(1, **({} if num_beams is None else {"num_beams": num_beams}))
    above(0, **({} if temperature is None else {"temperature": temperature}))
    for name, value, choices in (
        ("format", format, get_args(CaptionFormat)),
        ("dtype", dtype, get_args(CaptionPrecision)),
        ("on_error", on_error, get_args(OnError)),
    ):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    share, place = Share.find(shard), _place(device)
    folder = Path(os.path.abspath(Path(images).expanduser()))
    paths = images_below(folder, "images")
    to = folder if out is None else Path(os.path.abspath(Path(out).expanduser()))
    names = [PurePath(path).relative_to(_names_from(folder, to)).as_posix() for path in paths]
    table = Table(to, overwrite) if format == "metadata" else Sidecars(names, paths, overwrite, share.name)
    files = find_model(model, revision)
    asked = Prompt(load_processor(files, model), prompt)
    probe(asked, model)
    binding: dict[str, dict[str, Any]] = {
        "model": hashes(files),
        "settings": {
            "prompt": asked.asked,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "temperature": temperature,
            "seed": None if temperature is None else seed,
            "dtype": dtype,
        },
        # Relative where captions lie with the images, so that both can be moved.
        "images": {"folder": os.path.relpath(folder, to) if _names_from(folder, to) == to else str(folder)},
    }
    noted = {"name": model, "revision": revision, "batch_size": batch_size, "versions": versions()}
    try:
        to.mkdir(parents=True, exist_ok=True)
        check_record(to, binding, noted, share.name)
    except OSError as error:
        raise ValueError(f"`out`: {to} cannot be written ({error}). Give another folder.") from error
    with Journal(to, names, share) as journal:
        plan = planned(journal.is_missing, journal.has_failed, batch_size, share)
        table.check(journal, (number for batch in plan for number in batch))
        if limit is not None:
            plan = plan[: -(-limit // batch_size)]
        if plan:
            decoding = Decoding(max_new_tokens, num_beams, temperature, seed)
            captioner = Captioner(files, model, asked, decoding, getattr(torch, dtype), place)
            batches = Batches(paths, plan, min(batch_size, len(paths)), asked)
            loader = DataLoader(batches, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
            with tqdm(total=sum(map(len, plan)), unit="image", disable=os.environ.get("RANK", "0") != "0") as bar:
                for batch in loader:
                    rows = _captioned(batch, captioner, names)
                    if on_error == "raise" and batch.errors:
                        number, why = next(iter(batch.errors.items()))
                        raise ValueError(
                            f"{paths[number]} cannot be captioned ({why}). Mend or remove it, or set `on_error` to "
                            "skip; captions made before it are kept."
                        )
                    journal.append(rows)
                    table.add(rows)
                    bar.update(len(batch.numbers))
        journal.read_parts()
        while True:
            where = table.finish(journal)
            counts = write_report(to, journal)
            # Processes that end at the same time may write in the place of one another: the last one must know all.
            if not journal.read_parts() or journal.is_missing.any():
                break
        _say(counts, where, to / REPORT)
    return to


def _captioned(batch: Batch, captioner: Captioner, names: list[str]) -> list[Row]:
    """What became of each image of a batch, in order."""
    rows = {number: Row(names[number], None, error) for number, error in batch.errors.items()}
    if batch.inputs is not None:
        found = captioner(batch.inputs, batch.sizes, names[batch.numbers[0]])
        rows |= {
            number: Row(names[number], text, None, is_long)
            for number, (text, is_long) in zip(batch.readable, found, strict=True)
        }
    return [rows[number] for number in batch.numbers]


def _names_from(folder: Path, out: Path) -> Path:
    """The folder that names in a table are relative to: its own where a data module finds it, or else the images'."""
    return out if out in (folder, folder.parent) else folder


def _place(device: str | None) -> torch.device:
    if device is None:
        local = os.environ.get("LOCAL_RANK", "0")
        return torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch says the latter where it was built without
        raise ValueError(f"`device`={device!r} cannot be used: {error}. Give 'cpu', or leave it out.") from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _say(counts: dict[str, int], where: str, report: Path) -> None:
    rank_zero_info(f"Captions of {counts['captioned']:,} of {counts['images']:,} images: {where}. Report: {report}")
    if counts["not_captioned_yet"]:
        rank_zero_info(f"{counts['not_captioned_yet']:,} have none yet: other processes make them, or a later run.")
    for name, what in (
        ("failed", "could not be captioned"),
        ("empty", "have an empty caption"),
        ("reached_max_new_tokens", "have a caption that reached `max_new_tokens` and may be cut off"),
    ):
        if counts[name]:
            rank_zero_warn(f"{counts[name]:,} of {counts['images']:,} images {what}; {report} names them.")
