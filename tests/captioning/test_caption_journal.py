"""What is kept of a run, wherever it was cut."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from captioners import full_disk
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lpl_lightning.captioning.batches import Batches, Share, planned
from lpl_lightning.captioning.journal import Journal, Row

NAMES = ["a.png", "b c.png", "sub/é.png", "d.png", "e.png", os.fsdecode(b"\xff.png"), "g.png"]
ROWS = [Row(name, f"caption {number} Kätzchen \u2028", None, number == 1) for number, name in enumerate(NAMES)]
ROWS[3] = Row(NAMES[3], None, "it is no image")
ROWS[4] = Row(NAMES[4], "")
BATCHES = [ROWS[:3], ROWS[3:5], ROWS[5:]]


def written(folder: Path, batches: list[list[Row]], share: Share = Share()) -> Path:  # noqa: B008
    with Journal(folder, NAMES, share) as journal:
        for rows in batches:
            journal.append(rows)
    return journal.own


def test_rows_come_back(tmp_path: Path) -> None:
    written(tmp_path, BATCHES)
    with Journal(tmp_path, NAMES, Share()) as journal:
        assert list(journal.rows()) == ROWS
        assert not journal.is_missing.any()
        assert journal.has_failed.tolist() == [False] * 3 + [True] + [False] * 3
        assert (journal.number("d.png"), journal.number("x.png")) == (3, None)
    # As any reader of JSON lines has them.
    lines = [json.loads(line) for line in journal.own.read_bytes().splitlines()]
    assert [line["file_name"] for line in lines] == NAMES
    assert [line["left"] for line in lines] == [2, 1, 0, 1, 0, 1, 0]
    assert lines[3] == {"file_name": "d.png", "error": "it is no image", "left": 1}


def test_cut_anywhere_it_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", BATCHES).read_bytes()
    ends = [0]
    for count in (1, 2, 3):
        ends.append(len(written(tmp_path / f"{count}", BATCHES[:count]).read_bytes()))
    for size in sorted({*range(0, len(whole), 4), *ends, *(end - 1 for end in ends[1:]), len(whole)}):
        path = tmp_path / "cut" / "part-0-of-1.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole[:size])
        kept = max(number for number, end in enumerate(ends) if end <= size)
        with Journal(tmp_path / "cut", NAMES, Share()) as journal:
            assert list(journal.rows()) == [row for rows in BATCHES[:kept] for row in rows], size
            for rows in BATCHES[kept:]:
                journal.append(rows)
        assert path.read_bytes() == whole, size


def test_zeros_at_the_end_are_taken_off(tmp_path: Path) -> None:
    """What some file systems leave after a power cut."""
    path = written(tmp_path, BATCHES[:1])
    before = path.read_bytes()
    path.write_bytes(before + b"\0" * 100)
    assert written(tmp_path, []).read_bytes() == before


def test_a_full_disk_is_one_error_and_costs_a_batch(tmp_path: Path) -> None:
    path = written(tmp_path / "whole", BATCHES)
    size = len(written(tmp_path / "two", BATCHES[:2]).read_bytes())
    with full_disk(size + 10), pytest.raises(ValueError, match=r"part-0-of-1\.jsonl cannot be written \(.*Make room"):
        written(tmp_path / "full", BATCHES)
    found = tmp_path / "full" / "part-0-of-1.jsonl"
    assert len(found.read_bytes()) == size + 10
    assert written(tmp_path / "full", BATCHES[2:]).read_bytes() == path.read_bytes()


def test_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, BATCHES)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"sub/', b"sub/"))
    with pytest.raises(ValueError, match=r"part-0-of-1.jsonl: the line at byte \d+ is damaged .* Remove it"):
        written(tmp_path, [])


def test_parts_of_all_processes_are_read_and_half_batches_of_others_left_out(tmp_path: Path) -> None:
    written(tmp_path, BATCHES[:1], Share(0, 2))
    other = written(tmp_path, BATCHES[1:], Share(1, 2))
    with Journal(tmp_path, NAMES, Share(0, 2)) as journal:
        assert list(journal.rows()) == ROWS
        other.write_bytes(other.read_bytes()[:-5])
        journal.read_parts()
        assert list(journal.rows()) == ROWS[:5]
    assert not other.read_bytes().endswith(b"}\n"), "it is the other's to mend"


def test_two_processes_cannot_have_one_share(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, NAMES, Share()) as journal,
        pytest.raises(BlockingIOError, match=r"part-0-of-1.jsonl is being written by another process"),
    ):
        written(tmp_path, [])
    journal.own.unlink()
    written(tmp_path, BATCHES)


def test_what_fails_again_is_not_repeated(tmp_path: Path) -> None:
    path = written(tmp_path, BATCHES)
    before = path.read_bytes()
    assert written(tmp_path, [[ROWS[3]]]).read_bytes() == before
    written(tmp_path, [[Row(NAMES[3], None, "another reason")], [Row(NAMES[3], "mended")]])
    with Journal(tmp_path, NAMES, Share()) as journal:
        assert journal.row(3) == Row(NAMES[3], "mended")
        assert not journal.has_failed.any()


def test_a_caption_is_not_hidden_by_an_earlier_failure(tmp_path: Path) -> None:
    """Also where the part with the failure is read last, as when two processes become one."""
    written(tmp_path, [ROWS[3:5]], Share(1, 2))
    written(tmp_path, [[Row(NAMES[3], "mended")]], Share(0, 1))
    with Journal(tmp_path, NAMES, Share(0, 1)) as journal:
        journal.read_parts()
        assert journal.row(3) == Row(NAMES[3], "mended")
        assert not journal.has_failed.any()


def test_images_that_are_gone_or_new(tmp_path: Path) -> None:
    written(tmp_path, BATCHES)
    with Journal(tmp_path, ["new.png", *NAMES[2:]], Share()) as journal:
        assert journal.is_missing.tolist() == [True] + [False] * 5
        assert list(journal.rows()) == ROWS[2:]


# Which batches are left to a process


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5))
def test_processes_share_all_images_out(count: int, batch_size: int, of: int) -> None:
    none = np.zeros(count, bool)
    plans = [planned(~none, none, batch_size, Share(index, of)) for index in range(of)]
    batches = sorted(batch for plan in plans for batch in plan)
    # Whatever their number, they make the batches that one process would.
    assert batches == planned(~none, none, batch_size, Share())
    assert [number for batch in batches for number in batch] == list(range(count))


@given(st.lists(st.sampled_from("dmf"), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_what_is_done_is_not_done_again(states: list[str], batch_size: int, of: int) -> None:
    is_missing, has_failed = (np.array([state == kind for state in states]) for kind in "mf")
    plans = [planned(is_missing, has_failed, batch_size, Share(index, of)) for index in range(of)]
    numbers = [number for plan in plans for batch in plan for number in batch]
    assert sorted(numbers) == [number for number, state in enumerate(states) if state != "d"]
    assert all(1 <= len(batch) <= batch_size for plan in plans for batch in plan)


def test_batches_have_one_shape(tmp_path: Path) -> None:
    """Whatever could not be read, and however few are left."""
    for number in range(5):
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("text")
    (tmp_path / "4.png").write_text("text")
    given: list[list[int]] = []

    def prepare(images: list[Image.Image]) -> dict[str, int]:
        given.append([image.width - 4 for image in images])
        if 3 in given[-1]:
            raise ValueError("three")
        return {"rows": len(images)}

    batches = Batches([str(tmp_path / f"{number}.png") for number in range(5)], [[0, 1, 2], [3, 2], [4]], 3, prepare)
    first, second, third = (batches[number] for number in range(3))
    assert (first.readable, first.sizes, list(first.errors)) == ([0, 2], [(4, 4), (6, 4)], [1])
    assert given[0] == [0, 2, 0]
    assert (second.readable, second.errors) == ([2], {3: "the model's processor refuses it: ValueError: three"})
    assert given[-1] == [2, 2, 2]
    assert first.inputs == second.inputs == {"rows": 3}
    assert (third.readable, third.inputs, list(third.errors)) == ([], None, [4])


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Share.find(None) == Share(0, 1)
    assert Share.find("3/4") == Share(3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Share.find(None) == Share(1, 2)
    assert Share.find("0/1") == Share(0, 1)
    for wrong in ("4/4", "1", "/2", "-1/2", "1/2/3", "a/b", "0/0"):
        with pytest.raises(ValueError, match=rf"`shard` must be I/N, with I from 0 to N - 1, got '{wrong}'"):
            Share.find(wrong)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match=r"RANK/WORLD_SIZE must be I/N.*got '2/2'. Start by torchrun"):
        Share.find(None)
