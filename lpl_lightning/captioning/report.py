"""What became of each image: the report beside captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpl_lightning.captioning.journal import Journal
from lpl_lightning.captioning.record import write_whole

__all__ = ["REPORT", "Report", "merged", "report_of", "say", "write_report"]

REPORT = "captions-report.json"

Report = dict[str, Any]
"""``counts`` by name; ``failed``, why by the name of an image; names in ``empty`` and ``reached_max_new_tokens``."""


def report_of(journal: Journal) -> Report:
    """What is known of the images of a listing."""
    failed: dict[str, str] = {}
    empty: list[str] = []
    long: list[str] = []
    done = 0
    for row in journal.rows():
        if row.text is None:
            failed[row.name] = str(row.error)
            continue
        done += 1
        if not row.text:
            empty.append(row.name)
        if row.is_long:
            long.append(row.name)
    counts = {
        "images": len(journal.names),
        "captioned": done,
        "not_captioned_yet": len(journal.names) - done - len(failed),
        "failed": len(failed),
        "empty": len(empty),
        "reached_max_new_tokens": len(long),
    }
    return {"counts": counts, "failed": failed, "empty": empty, "reached_max_new_tokens": long}


def merged(reports: Iterable[Report]) -> Report:
    """One report of several listings."""
    counts: Counter[str] = Counter()
    found: Report = {"counts": counts}
    for report in reports:
        for name, value in report.items():
            if name == "counts":
                counts.update(value)
            elif isinstance(value, dict):
                found.setdefault(name, {}).update(value)
            elif isinstance(value, list):
                found.setdefault(name, []).extend(value)
    return found


def write_report(path: Path, report: Report, writer: str) -> None:
    """Write a report, which appears whole or not at all."""
    write_whole(path, [json.dumps(report, indent=2).encode() + b"\n"], writer)


def say(counts: Mapping[str, int], where: str, report: Path) -> None:
    """Tell what a run came to."""
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
