"""A folder of images, whose captions go into a table or into text files beside them.

Several processes share out its batches.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Any, Literal

from lpl_lightning.captioning.batches import Share
from lpl_lightning.captioning.journal import PARTS, Journal
from lpl_lightning.captioning.loop import CaptionLoop
from lpl_lightning.captioning.outputs import Sidecars, Table
from lpl_lightning.captioning.report import REPORT, report_of, say, write_report
from lpl_lightning.data.listing import images_below

__all__ = ["CaptionFormat", "CaptionedFolder"]

CaptionFormat = Literal["metadata", "sidecar"]


class CaptionedFolder:
    """Images of a folder, and where their captions go.

    Attributes:
        out: Folder that captions are written to.
        binding: What must stay as it is for a run to go on.

    Args:
        images: The folder.
        out: Folder that captions are written to; None takes that of the images.
        format: In what files.
        overwrite: Whether captions from elsewhere may be replaced.
        share: The process's.

    Raises:
        FileNotFoundError: The folder is not there.
        ValueError: It has no images, or ``sidecar`` would give two of them one file.
    """

    def __init__(self, images: str, out: str | None, format: CaptionFormat, overwrite: bool, share: Share) -> None:
        self.folder = Path(os.path.abspath(Path(images).expanduser()))
        self.paths, self.share = images_below(self.folder, "images"), share
        self.out = self.folder if out is None else Path(os.path.abspath(Path(out).expanduser()))
        # Names are relative to the table's own folder where a data module finds it, or else to the images'.
        self.root = self.out if self.out in (self.folder, self.folder.parent) else self.folder
        self.names = [PurePath(path).relative_to(self.root).as_posix() for path in self.paths]
        self.files: Table | Sidecars = Table(self.out, overwrite)
        if format == "sidecar":
            self.files = Sidecars(self.names, self.paths, overwrite, share.name)
        # Relative where captions lie with the images, so that both can be moved.
        place = os.path.relpath(self.folder, self.out) if self.root == self.out else str(self.folder)
        self.binding: dict[str, dict[str, Any]] = {"images": {"folder": place}}

    def caption(self, loop: CaptionLoop) -> None:
        """Caption what has no caption yet, and write what there is.

        Raises:
            BlockingIOError: Another process has this share.
            ValueError: There are captions from elsewhere, an image cannot be captioned, or the disk is full.
        """
        with Journal(self.out / PARTS, self.names, self.share) as journal:
            plan = loop.plan(journal, self.share)
            self.files.check(journal, (number for batch in plan for number in batch))
            loop.caption(plan, self.paths, journal, str(self.root), self.files.add)
            journal.read_parts()
            while True:
                where = self.files.finish(journal)
                report = report_of(journal)
                write_report(self.out / REPORT, report, journal.writer)
                # Processes that end at the same time may write in the place of one another: the last one must know all.
                if not journal.read_parts() or journal.is_missing.any():
                    break
        say(report["counts"], where, self.out / REPORT)
