from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lpl_lightning.pretrained import check_fit, locate, read_state, resize_positions


def test_what_is_named_is_found(tmp_path: Path) -> None:
    assert Path(locate("embedded:autoencoder_shapes", "model"), "config.json").is_file()
    assert locate("embedded:denoiser_shapes", "weights") == Path(locate("embedded:denoiser_shapes", "weights"))
    assert locate(str(tmp_path), "model") == tmp_path
    assert locate("stabilityai/sdxl-vae", "model") == "stabilityai/sdxl-vae"


@pytest.mark.parametrize("source", ["./vae", "/no/such/folder", "~/no_such_vae", "a/b/c", "weights.safetensors", ""])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="`model`=.* does not exist"):
        locate(source, "model")


def test_unknown_embedded_weights_name_the_known_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"these do: \['embedded:autoencoder_shapes', 'embedded:denoiser_shapes'\]"
    ):
        locate("embedded:typo", "model")


def test_every_file_of_weights_reads_the_same(tmp_path: Path) -> None:
    state = {"a": torch.randn(2), "b": torch.randn(3)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.ckpt"):
        read = read_state(str(tmp_path / name))
        assert all(torch.equal(read[key], state[key]) for key in state)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Malicious(tmp_path / "ran")}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_state(str(tmp_path / "evil.ckpt"))
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        read_state(str(tmp_path / "list.ckpt"))
    for source in (str(tmp_path), "some/hub-id"):
        with pytest.raises(ValueError, match="must be a Lightning checkpoint"):
            read_state(source)


def test_a_misfit_says_what_and_how_many() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4)}
    check_fit(own, dict(own), "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt are of another model") as raised:
        check_fit(own, {"a": torch.zeros(2), "b": torch.zeros(9), "d": torch.zeros(1)}, "x.ckpt")
    said = str(raised.value)
    assert "1 weights are missing, such as 'c'" in said
    assert "1 are not of this model, such as 'd'" in said
    assert "such as 'b': expected (3,), got (9,)" in said


def grid(side: int) -> torch.Tensor:
    """Embeddings (1, side * side, 3) that say where they are: row and column in the unit square, and odd or even."""
    at = (torch.arange(side) + 0.5) / side
    sign = (-1.0) ** torch.arange(side)
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([rows, columns, sign[:, None] * sign[None]], dim=-1).flatten(0, 1)[None]


@pytest.mark.parametrize(("old", "new"), [(8, 16), (8, 12), (16, 8)])
def test_positions_keep_their_place_at_another_resolution(old: int, new: int) -> None:
    own = {"net.pos_embed": torch.zeros(1, new**2, 3), "net.weight": torch.zeros(2)}
    found = {"net.pos_embed": grid(old), "net.weight": torch.ones(2)}
    fitted = resize_positions(own, found)
    inner = fitted["net.pos_embed"].view(new, new, 3)[3:-3, 3:-3]
    expected = grid(new).view(new, new, 3)[3:-3, 3:-3]
    torch.testing.assert_close(inner[..., :2], expected[..., :2], atol=1e-5, rtol=0)
    if new < old:
        assert inner[..., 2].abs().max() < 0.05, "what is too fine for the new grid is averaged, not aliased"
    assert fitted["net.weight"] is found["net.weight"]
    assert found["net.pos_embed"].shape[1] == old**2


def test_what_is_no_grid_is_left_to_the_check_of_shapes() -> None:
    for name, shape, wanted in (
        ("pos_embed", (1, 15, 3), (1, 16, 3)),
        ("pos_embed", (1, 16, 3), (1, 16, 4)),
        ("weight", (1, 16, 3), (1, 64, 3)),
    ):
        found = {name: torch.zeros(shape)}
        assert resize_positions({name: torch.zeros(wanted)}, found) == found
