"""Weights, records and models of strangers: none runs what comes with it, or leads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import image_batch, tiny_kl
from strangers import EVIL, indexed, pickled, refused, with_code
from test_replay import fit, trainer

import lpl_lightning
from lpl_lightning import Autoencoder, LatentDiffusionModule, StepGuard
from lpl_lightning.captioning.models import find_model
from lpl_lightning.cli import main
from lpl_lightning.file_names import inside
from lpl_lightning.text_encoders import TransformersText

NAMES = ["../out.safetensors", "/etc/passwd", "a/../../x", "..", "", "C:\\x", "\\\\host\\x", "..\\x", "a\0b", None, 3]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(name: Any) -> None:
    with pytest.raises(ValueError, match="does not lie in folder"):
        inside(Path("folder"), name)


@pytest.mark.parametrize("name", ["a.safetensors", "train/000.tar", "..a", "a..b", "é ü"])
def test_names_that_do_not(name: str) -> None:
    assert inside(Path("folder"), name) == Path("folder") / name


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_pickle_given_as_weights(suffix: str, tmp_path: Path, ran: Path, make_module: Any) -> None:
    path = pickled(tmp_path / f"evil{suffix}", ran)
    wanted = "cannot be read as a checkpoint" if suffix == ".ckpt" else "cannot be read as"
    refused(ran, wanted, lambda: make_module(weights=path))
    refused(ran, wanted, lambda: LatentDiffusionModule.load_from_checkpoint(path))
    refused(ran, wanted, lambda: main(["export", "--ckpt", path, "--out", str(tmp_path / "out")]))
    tiny_kl().save_config(tmp_path)
    refused(ran, "can run code" if suffix == ".ckpt" else "cannot be read as", lambda: Autoencoder(path))


def test_code_beside_a_tokenizer(tmp_path: Path, ran: Path) -> None:
    pytest.importorskip("transformers")
    source = Path(lpl_lightning.__file__).parent / "weights" / "tiny" / "sd3"
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        for path in (source / part).iterdir():
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    with_code(tmp_path / "tokenizer", ran, AutoTokenizer=["evil.Tokenizer", None])
    for name in ("AutoConfig", "AutoTokenizer"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / "evil.py").write_text(EVIL.format(str(ran)))  # where transformers looks for it
    load = lambda: TransformersText(f"random:{tmp_path}", "text_encoder", max_length=8)  # noqa: E731
    refused(ran, "There is no tokenizer .* code of its own, which is not run", load)
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    for architecture in ("pipeline", "AutoModel", "utils", 3):
        said = {**config, "architectures": [architecture]}
        (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(said))
        refused(ran, "which transformers does not have", load)


@pytest.mark.parametrize("kind", ["autoencoder", "text", "caption"])
def test_an_index_of_weights_that_leads_elsewhere(kind: str, tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "model"
    if kind == "autoencoder":
        tiny_kl().save_pretrained(folder)
        indexed(folder, "diffusion_pytorch_model.safetensors", ran, lambda: Autoencoder(str(folder)))
        return
    tiny = Path(lpl_lightning.__file__).parent / "weights" / "tiny" / "sd3"
    encoder: Any = TransformersText(f"random:{tiny}", "text_encoder", max_length=8)
    encoder.model.save_pretrained(folder)
    load = {"text": lambda: TransformersText(str(folder)), "caption": lambda: find_model(str(folder), None)}[kind]
    (folder / "others.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    indexed(folder, "model.safetensors", ran, load)


def test_a_record_of_a_step(tmp_path: Path, ran: Path, make_module: Any) -> None:
    fit(trainer(tmp_path, StepGuard(record_steps=[0]), max_steps=1), make_module(), [image_batch()])
    folder = next(path for path in (tmp_path / "nonfinite").iterdir() if path.is_dir())
    replay = lambda: trainer(tmp_path / "again").replay(make_module(), str(folder))  # noqa: E731
    said = json.loads((folder / "record.json").read_text())
    (tmp_path / "nonfinite" / said["weights"]).rename(tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        (folder / "record.json").write_text(json.dumps({**said, "weights": name}))
        refused(ran, f"it names '{name}', which does not lie in", replay)
    (folder / "record.json").write_text(json.dumps({**said, "packed": []}))
    refused(ran, "is no step as this version writes it", replay)
    (folder / "record.json").write_text(json.dumps({key: said[key] for key in said if key != "step"}))
    refused(ran, "is no step as this version writes it: it lacks step", replay)
    (folder / "record.json").write_text(json.dumps(said))
    pickled(tmp_path / "nonfinite" / said["weights"], ran)
    refused(ran, "cannot be read as safetensors", replay)
    pickled(folder / "tensors.safetensors", ran)
    refused(ran, "is no step as this version writes it", replay)
