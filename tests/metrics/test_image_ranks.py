"""Metrics of images on two real processes are those of one."""

from __future__ import annotations

from pathlib import Path

import torch
from forked import run_script
from image_ranks import SIDE, values


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    images = {name: torch.rand(20, 3, SIDE, SIDE) * 2 - 1 for name in ("real", "generated")}
    images["real"][:7] *= 0.3  # the ranks' shares are not alike
    torch.save(images, tmp_path / "images.pt")
    run_script(Path(__file__).with_name("image_ranks.py"), tmp_path)
    found = torch.load(tmp_path / "values.pt")
    torch.testing.assert_close(found, values(images, slice(None), alone=True), rtol=1e-9, atol=1e-12)
