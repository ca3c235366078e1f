"""Every noise process with every backbone and every condition that it takes: the table of configs/README.md."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from backbones import BACKBONES, CLASSES, POOLED_DIM, TOKEN_DIM, denoiser
from conftest import ROOT, tiny_kl
from test_module import trainer, ungated
from torch import Tensor

from lpl_lightning import (
    DDPM,
    EDM,
    Autoencoder,
    Captions,
    ClassLabels,
    ClassTokens,
    FlowMatching,
    LatentDiffusionModule,
    LPLCallback,
    Sampler,
    ShapesDataModule,
)
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.text_encoders import TextEmbedding, TextEncoder

NOISES: dict[str, NoiseProcess] = {
    "ddpm_epsilon": DDPM("epsilon"),
    "ddpm_v": DDPM("v_prediction"),
    "flow": FlowMatching(),
    "edm": EDM(),
}
WITHOUT_POOLED = ("PixArt", "UNet (SD 1.5)", "Sana")


def cells() -> list[tuple[str, str, str]]:
    """(noise, backbone, condition) as the table has them."""
    table = (ROOT / "configs" / "README.md").read_text().split("## What goes with what")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    found = []
    for row in rows[2:]:
        for noise, conditions in zip(rows[0][2:], row[2:], strict=True):
            found += [(noise, row[0], condition) for condition in conditions.split(", ")]
    return found


class Letters(TextEncoder):
    """A frozen encoder of text that is seen at a glance: letters are embedded one by one, the mask hides the rest."""

    token_dim, pooled_dim = TOKEN_DIM, POOLED_DIM

    def __init__(self) -> None:
        super().__init__()
        self.settings = {}
        self.table = torch.nn.Embedding(256, TOKEN_DIM + POOLED_DIM).requires_grad_(False)

    def embed(self, captions: Any) -> TextEmbedding:
        rows = [list(text.encode()[:12]) for text in captions]
        ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
        both = self.table(ids)
        return TextEmbedding(both[..., :TOKEN_DIM], ids > 0, both[..., TOKEN_DIM:].mean(dim=1))


def conditioner(kind: str, backbone: str) -> Conditioner:
    if kind == "labels":
        return ClassLabels(CLASSES)
    if kind == "classes":
        return ClassTokens(CLASSES, TOKEN_DIM, None if backbone in WITHOUT_POOLED else POOLED_DIM, tokens_per_class=2)
    return Captions([Letters()], size_conditions=True)


@pytest.mark.parametrize(("noise", "backbone", "condition"), cells())
def test_trains_with_lpl_and_samples(noise: str, backbone: str, condition: str, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    model = denoiser(backbone)
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        NOISES[noise],
        model,
        conditioner(condition, backbone),
        sampler=Sampler(num_steps=2, guidance_scale=1.5),
    )
    before = copy.deepcopy(module.state_dict())
    run = trainer(tmp_path, callbacks=[LPLCallback(weight=3.0, loss=ungated)], limit_val_batches=0)
    run.fit(module, ShapesDataModule(image_size=16, train_images=16, val_images=4, batch_size=8))
    assert run.callback_metrics["loss"].isfinite()
    assert run.callback_metrics["loss_lpl"] > 0
    changed = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) / 2
    images = module.eval().generate([0, 1], [3, 4], ["a red star", "a ring on blue stripes"])
    alone = module.generate([1], [4], ["a ring on blue stripes"])
    assert images.isfinite().all()
    torch.testing.assert_close(images[1:], alone, atol=1e-3, rtol=1e-3)
    other: Tensor = module.generate([1], [5], ["a yellow square"])
    assert not torch.allclose(alone, other, atol=1e-4), "the condition reaches the image"
    assert module.generate([1], [5], ["a yellow square"], image_size=32).shape[-2:] == (32, 32)
    if model.patch > 1:
        with pytest.raises(ValueError, match=f"no multiple of {model.patch}"):
            module.generate([1], [5], ["a yellow square"], image_size=20)


def test_the_table_has_every_combination() -> None:
    found = cells()
    expected = {
        (noise, backbone, kind)
        for noise in NOISES
        for backbone in BACKBONES
        for kind in ("labels", "classes", "captions")
        if (kind == "labels") == (backbone == "DiT") and not (kind == "classes" and backbone == "UNet (SDXL)")
    }
    assert len(found) == len(set(found))
    assert set(found) == expected
    text = (ROOT / "configs" / "README.md").read_text()
    for file in re.findall(r"`(\w+\.yaml)`", text):
        assert (ROOT / "configs" / file).is_file(), file
