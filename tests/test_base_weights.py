from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import denoiser
from safetensors.torch import save_file
from test_backbones import T, Z, condition
from test_fine_tuning import data, module
from test_module import trainer

from lpl_lightning import Freeze, LatentDiffusionModule, LoRA
from lpl_lightning.base_weights import BaseWeights

pytest.importorskip("peft")


def other(seed: int, **overrides: Any) -> LatentDiffusionModule:
    """A module whose backbone is drawn by a seed, tuned by LoRA unless told otherwise."""
    model = denoiser("SD3")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module(**({"fine_tuning": LoRA(rank=2), "denoiser": model} | overrides))


def predicted(tuned: LatentDiffusionModule) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tuned.denoiser.eval()(Z, T, condition())
    return found


@pytest.fixture
def lora(tmp_path: Path) -> LatentDiffusionModule:
    """Trained over ``base.safetensors``, with its checkpoint ``lora.ckpt``, both in the test's folder."""
    save_file(other(0, fine_tuning=None).state_dict(), tmp_path / "base.safetensors")
    first = other(1, weights=str(tmp_path / "base.safetensors"))
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "lora.ckpt")
    return first


@pytest.mark.parametrize("older", [False, True], ids=["as it is now", "of an earlier release"])
def test_a_lora_as_weights_brings_its_base(lora: LatentDiffusionModule, tmp_path: Path, older: bool) -> None:
    """The same predictions from a backbone that was drawn anew, and again from a checkpoint of that."""
    base, path = str(tmp_path / "base.safetensors"), tmp_path / "lora.ckpt"
    if older:
        found = torch.load(path, weights_only=True)
        del found["lpl_lightning_lora_base"]
        torch.save(found, path)
    second = other(2, weights=str(path))
    torch.testing.assert_close(predicted(second), predicted(lora), rtol=0, atol=0)
    assert (second.hparams["weights"], second.base) == (base, base), "not the LoRA, which its checkpoints hold"
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(second, data())
    run.save_checkpoint(tmp_path / "second.ckpt")
    parts = {name: getattr(other(3), name) for name in ("autoencoder", "noise", "conditioner")}
    third = LatentDiffusionModule.load_from_checkpoint(
        tmp_path / "second.ckpt", **parts, denoiser=denoiser("SD3"), fine_tuning=LoRA(rank=2)
    )
    torch.testing.assert_close(predicted(third), predicted(second), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("older", [False, True], ids=["as it is now", "of an earlier release"])
def test_a_lora_over_another_base_is_refused_as_a_checkpoint(
    lora: LatentDiffusionModule, tmp_path: Path, older: bool
) -> None:
    path, moved = str(tmp_path / "lora.ckpt"), tmp_path / "moved.safetensors"
    if older:
        found = torch.load(path, weights_only=True)
        del found["lpl_lightning_lora_base"]
        torch.save(found, path)
    wanted = (
        f"trained over the weights of {tmp_path / 'base.safetensors'}; this model has others. Give `--model.weights"
    )
    for start in ("fit", "test", "predict"):
        with pytest.raises(ValueError, match=wanted):
            getattr(trainer(tmp_path, max_steps=3), start)(other(4), data(), ckpt_path=path)
    with pytest.raises(ValueError, match=wanted):
        other(4).load_weights(path)
    (tmp_path / "base.safetensors").rename(moved)
    again = other(5, weights=str(moved))
    trainer(tmp_path).test(again, data(), ckpt_path=path, verbose=False)
    torch.testing.assert_close(predicted(again), predicted(lora), rtol=0, atol=0)
    trainer(tmp_path, max_steps=3).fit(again, data(), ckpt_path=path)
    assert again.base == str(moved)
    with pytest.raises(FileNotFoundError, match="holds a LoRA alone.*that does not exist. Put it there"):
        other(6, weights=path)
    save_file(other(7, fine_tuning=None).state_dict(), tmp_path / "base.safetensors")
    if not older:
        with pytest.raises(ValueError, match="in which are others by now: give `weights` the file as it was"):
            other(6, weights=path)


def test_a_lora_of_which_nothing_says_its_base(lora: LatentDiffusionModule, tmp_path: Path) -> None:
    """Over a backbone that is random it is refused; over one that was chosen as it is, another is warned of."""
    save_file(lora.state_dict(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="does not say where the weights are that it was trained over"):
        other(2, weights=str(tmp_path / "lora.safetensors"))
    found = torch.load(tmp_path / "lora.ckpt", weights_only=True)
    found["lpl_lightning_lora_base"]["source"] = None
    torch.save(found, tmp_path / "lora.ckpt")
    chosen = denoiser("SD3")
    chosen.is_pretrained = True
    with pytest.warns(UserWarning, match="trained over other weights than those of this model's `backbone`"):
        module(denoiser=chosen, fine_tuning=LoRA(rank=2), weights=str(tmp_path / "lora.ckpt"))
    with pytest.raises(ValueError, match="over other weights than this model's: give the denoiser the `backbone`"):
        trainer(tmp_path).test(other(2), data(), ckpt_path=str(tmp_path / "lora.ckpt"))


@pytest.mark.parametrize("kind", ["SD3", "DiT", "UNet (SDXL)"])
def test_weights_are_known_again_in_any_precision_and_not_after_a_step(kind: str) -> None:
    plain = denoiser(kind)
    found = BaseWeights.of(plain)
    assert found.values is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        coarse = copy.deepcopy(plain)
        coarse.backbone = torch.nn.Module.to(coarse.backbone, dtype)
        assert BaseWeights.of(coarse).differs(found) is False
        assert BaseWeights.of(torch.nn.Module.to(coarse, torch.bfloat16)).differs(found) is False
    trained = copy.deepcopy(plain)
    for parameter in trained.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(trained.parameters(), lr=1e-4).step()
    assert BaseWeights.of(trained).differs(found) is True
    assert BaseWeights.of(denoiser("PixArt")).differs(found) is True


def test_runs_whose_checkpoints_hold_all_note_no_base(tmp_path: Path) -> None:
    for tuning in (None, Freeze(["proj_out.*"])):
        checkpoint: dict[str, Any] = {}
        other(1, fine_tuning=tuning).on_save_checkpoint(checkpoint)
        assert "lpl_lightning_lora_base" not in checkpoint


def test_a_checkpoint_says_what_its_run_began_from(lora: LatentDiffusionModule, tmp_path: Path) -> None:
    """One of a LoRA that began from another says that, and not what both were trained over."""
    path = str(tmp_path / "lora.ckpt")
    found = torch.load(path, weights_only=True)
    begun = BaseWeights.begun_by(found)
    assert begun is not None
    assert begun.source == str(tmp_path / "base.safetensors")
    assert begun.are(lora.begun)
    assert begun.are(replace(begun, source="moved"))
    assert begun.are(replace(begun, values=[0.0] * len(begun.values or []))), "the file was written anew"
    assert not begun.are(BaseWeights())
    second = other(2, weights=path)
    assert second.begun.source == path
    assert not second.begun.are(begun)
    del found["lpl_lightning_begun"]
    assert BaseWeights.begun_by(found) is None, "of an earlier release"
    assert BaseWeights.begun_by({"lpl_lightning_base": "a.ckpt"}) == BaseWeights("a.ckpt")
    assert BaseWeights("a.ckpt").are(BaseWeights("./a.ckpt", 0.9)), "which did not say the average"
    assert not replace(begun, ema=0.9, values=[]).are(begun)
    assert BaseWeights.begun_by({}) == BaseWeights()
