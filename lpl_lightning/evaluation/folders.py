"""``lpl evaluate``: a folder of images from anywhere, against a folder of real ones."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.arguments import at_least
from lpl_lightning.evaluation.cache import ReferenceCache, default_folder
from lpl_lightning.evaluation.evaluator import Evaluator, expected
from lpl_lightning.evaluation.image_files import ImageFiles
from lpl_lightning.evaluation.image_metrics import CaptionMetrics
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.report import REPORT, Report, check_folder, check_other
from lpl_lightning.evaluation.suite import Suite

__all__ = ["evaluate_folder"]


def evaluate_folder(
    images: str,
    reference: str | None = None,
    suite: Suite | None = None,
    out: str | None = None,
    image_size: int | None = None,
    convert: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
    cache: bool = True,
) -> Report:
    """Measure a folder of images against a folder of real ones, and write a report.

    Without a suite, values are those that need no downloaded weights: the Frechet Wavelet Distance and power spectra.
    ``configs/metrics/paper.yaml`` is a suite with FID and all else that papers report; give it as ``--suite``.

    Args:
        images: Folder of the images, with sub-folders or without.
        reference: Folder of the real images.
        suite: What is measured.
        out: Folder that the report is written to; by default the images' with ``-evaluation`` at its end. A report
            there is made anew if it is of the same images, suite and reference, and kept by an error if not.
        image_size: Side in pixels that all images are brought to: the shorter side is resized and the middle square
            taken. By default they are taken as they are, squares of one size.
        convert: Read images that are not RGB of 8 bits as training does; by default they are refused.
        batch_size: Images passed through networks at once.
        num_workers: Processes that read images.
        device: Where networks run, such as ``cuda``; by default there if there is one, or else on the CPU.
        cache: Whether to keep what was computed of the real images for the next time, in the user's folder for caches.

    Returns:
        The report, which ``report.json`` and ``report.md`` in the folder hold.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: Images are not as they must be, there are too few, one of the two folders of images lies in the
            other, or the report's folder holds another report or lies among the images.
    """
    at_least(1, batch_size=batch_size)
    at_least(0, num_workers=num_workers)
    place = _place(device)
    if reference is None:
        raise ValueError("`reference` must be given: a folder of real images, as in --reference FOLDER.")
    suite = Suite() if suite is None else suite
    captions = any(isinstance(measure, CaptionMetrics) for measure in suite)
    generated = ImageFiles(images, "images", image_size, convert, captions)
    real = ImageFiles(reference, "reference", image_size, convert)
    where = Path(os.path.abspath(generated.folder))  # without "..", which has no name
    _check_nested(where, real.folder)
    folder = where.with_name(f"{where.name}-evaluation") if out is None else Path(out).expanduser()
    _check_out(folder, where, real.folder)
    about, about_real = generated.provenance(), real.provenance()
    if about["image_size"] != about_real["image_size"]:
        raise ValueError(
            f"`images` are of {about['image_size']} px, `reference` of {about_real['image_size']} px, between which "
            "metrics mean nothing. Give `image_size`, the side that both are brought to."
        )
    sets = Sets(int(about["image_size"]), len(real), len(generated), captions)
    suite.check(sets)
    check_other(folder, "out", expected(suite, sets))
    evaluator = Evaluator(suite, place, ReferenceCache(default_folder() if cache else None), batch_size, num_workers)
    evaluator.take_real(real, sets, {"name": reference, **about_real}, real.quick_key())
    check_other(folder, "out", evaluator.made)
    report = evaluator.measure(generated, where.name, {**about, "folder": str(where)})
    path = evaluator.write(report, folder)
    print(report.markdown())
    rank_zero_info(f"Report: {path}")
    return report


def _place(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        return found
    except (RuntimeError, AssertionError) as error:  # torch says the latter where it was built without
        raise ValueError(f"`device`={device!r} cannot be used: {error}. Give 'cpu', or leave it out.") from error


def _check_nested(images: Path, reference: Path) -> None:
    """Refuse a folder within the other, whose images would be on both sides."""
    one, other = (Path(os.path.realpath(folder)) for folder in (images, reference))
    for inner, outer, argument in ((one, other, "reference"), (other, one, "images")):
        if outer in inner.parents:
            raise ValueError(
                f"{inner} lies in `{argument}`, {outer}, of which its images are a part, too. Give folders of which "
                "none holds the other."
            )


def _check_out(folder: Path, images: Path, reference: Path) -> None:
    """Refuse a folder that cannot be written to, that of another set's report, and one whose plots would be images."""
    check_folder(folder, "out")
    there = Path(os.path.realpath(folder))
    for argument, read in (("images", images), ("reference", reference)):
        if (read := Path(os.path.realpath(read))) in (there, *there.parents):
            raise ValueError(
                f"`out`: {folder} lies in `{argument}`, {read}, of which its plots would be images the next time. Give "
                "a folder elsewhere."
            )
    if (folder / REPORT).is_file() and (known := Report.read(folder).images.get("folder")) != str(images):
        raise ValueError(f"`out`: {folder} holds the report of {known}. Give another folder, or delete it.")
