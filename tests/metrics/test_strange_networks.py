"""Networks of strangers for features and scores: none runs what comes with it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from strangers import Runs, indexed, pickled, refused, with_code
from torch import Tensor, nn
from towers import TOWER, save_tower, tiny_dino

from lpl_lightning.metrics import (
    CLIPScore,
    InceptionFeatures,
    OpenCLIPFeatures,
    ReferenceStatistics,
    TorchScriptFeatures,
    TorchvisionFeatures,
    TransformersFeatures,
)
from lpl_lightning.metrics.reconstruction import LPIPS
from lpl_lightning.text_encoders import OpenCLIPText


def cached(tmp_path: Path, url: str, ran: Path) -> None:
    pickled(tmp_path / "torch" / "hub" / "checkpoints" / url.rsplit("/", 1)[-1], ran)


WEIGHTS: dict[str, Callable[[str], object]] = {
    "inception": lambda path: InceptionFeatures(path),
    "torchvision": lambda path: TorchvisionFeatures("squeezenet1_0", path),
    "open_clip": lambda path: OpenCLIPFeatures("ViT-S-32-alt", path),
    "open_clip's text": lambda path: OpenCLIPText("ViT-S-32-alt", path),
    "CLIPScore": lambda path: CLIPScore("ViT-S-32-alt", path),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_pickle_given_as_weights(kind: str, suffix: str, tmp_path: Path, ran: Path) -> None:
    if kind != "torchvision":
        pytest.importorskip("torch_fidelity" if kind == "inception" else "open_clip")
    path = pickled(tmp_path / f"evil{suffix}", ran)
    refused(ran, "could run code|cannot be read", lambda: WEIGHTS[kind](path))
    assert torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=False)
    assert ran.exists(), "it would have"


@pytest.mark.parametrize("network", ["inception", "lpips", "torchvision"])
def test_a_pickle_where_torch_keeps_downloads(network: str, tmp_path: Path, ran: Path) -> None:
    """torch checks the hash of what it downloads, and not of what someone has put there."""
    if network == "inception":
        cached(tmp_path, pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").URL_INCEPTION_V3, ran)
        refused(ran, "cannot be read as weights: it holds posix.mkdir, which could run code", InceptionFeatures)
    elif network == "lpips":
        cached(tmp_path, torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url, ran)
        refused(ran, "squeezenet1_1.*cannot be read as weights: it holds posix.mkdir", lambda: LPIPS("squeeze"))
    else:
        cached(tmp_path, torchvision.models.SqueezeNet1_0_Weights.DEFAULT.url, ran)
        load = lambda: TorchvisionFeatures("squeezenet1_0", "IMAGENET1K_V1")  # noqa: E731
        refused(ran, "squeezenet1_0.*it holds posix.mkdir", load)


@pytest.mark.parametrize("kind", ["npz", "pickle", "safetensors", "bomb"])
def test_statistics(kind: str, tmp_path: Path, ran: Path) -> None:
    path = tmp_path / "statistics.npz"
    if kind == "safetensors":
        pickled(path, ran)
        refused(ran, "holds no reference statistics", lambda: ReferenceStatistics.load(path))
        return
    if kind == "npz":
        np.savez(path, mu=np.array([Runs(ran)], dtype=object), sigma=np.zeros((1, 1)))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Runs(ran)))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, shape in (("mu", (3,)), ("sigma", (10**4, 10**3))):
                array = io.BytesIO()
                np.save(array, np.zeros(shape))
                archive.writestr(f"{name}.npy", array.getvalue())
        assert path.stat().st_size < 10**6
    message = "`sigma` is unpacked to 80,000,128 bytes" if kind == "bomb" else "allow_pickle"
    refused(ran, message, lambda: ReferenceStatistics.read_npz(path, {"features": 3}, 10))


def test_code_beside_a_feature_network(tmp_path: Path, ran: Path) -> None:
    tiny_dino().save_pretrained(tmp_path / "dino")  # type: ignore[operator]
    with_code(tmp_path / "dino", ran, AutoConfig="evil.Config", AutoModel="evil.Model")
    for source in ("", "random:"):
        load = lambda source=source: TransformersFeatures(f"{source}{tmp_path / 'dino'}", size=28)  # noqa: E731
        refused(ran, "cannot be loaded: it needs code of its own, which is not run", load)


def test_code_beside_a_model_of_open_clip(tmp_path: Path, ran: Path) -> None:
    folder = tmp_path / "tower"
    save_tower(folder)
    asks = {"hf_tokenizer_name": "here", "tokenizer_kwargs": {"trust_remote_code": True}}
    config = {"model_cfg": TOWER | {"text_cfg": TOWER["text_cfg"] | asks}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    with_code(folder, ran, AutoConfig="evil.Config", AutoTokenizer=["evil.Tokenizer", None])
    for make in (OpenCLIPText, OpenCLIPFeatures, CLIPScore):
        refused(ran, "`trust_remote_code` among `tokenizer_kwargs`", lambda make=make: make(f"local-dir:{folder}"))  # type: ignore[misc]
    with suppress(Exception):
        pytest.importorskip("open_clip").get_tokenizer(f"local-dir:{folder}")
    assert ran.exists(), "it would have"


def test_a_pickle_in_the_folder_of_a_model(tmp_path: Path, ran: Path) -> None:
    save_tower(tmp_path / "tower")
    (tmp_path / "tower" / "open_clip_model.safetensors").unlink()
    pickled(tmp_path / "tower" / "open_clip_pytorch_model.bin", ran)
    refused(ran, "its weights cannot be read: a pickle", lambda: OpenCLIPFeatures(f"local-dir:{tmp_path / 'tower'}"))
    tiny_dino().save_pretrained(tmp_path / "dino")  # type: ignore[operator]
    (tmp_path / "dino" / "model.safetensors").unlink()
    pickled(tmp_path / "dino" / "pytorch_model.bin", ran)
    refused(ran, "cannot be had: expected .*safetensors", lambda: TransformersFeatures(str(tmp_path / "dino"), size=28))


class Script(nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.path = "x"

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_program_given_as_a_feature_network(tmp_path: Path, ran: Path) -> None:
    script = torch.jit.script(Script())
    script.path = str(ran)
    script.save(str(tmp_path / "evil.pt"))
    refused(
        ran, "a TorchScript file is a program.*Set `trusted`", lambda: TorchScriptFeatures(str(tmp_path / "evil.pt"))
    )
    TorchScriptFeatures(str(tmp_path / "evil.pt"), trusted=True)
    assert ran.exists(), "it would have"


def test_an_index_of_weights_that_leads_elsewhere(tmp_path: Path, ran: Path) -> None:
    tiny_dino().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    load = lambda: TransformersFeatures(str(tmp_path / "model"), size=28)  # noqa: E731
    indexed(tmp_path / "model", "model.safetensors", ran, load)
