from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from backbones import BACKBONES, CLASSES, POOLED_DIM, TOKEN_DIM, denoiser
from conftest import tiny_kl
from safetensors.torch import save_file
from test_backbones import T, Z, condition
from test_module import trainer

from lpl_lightning import (
    EMA,
    Autoencoder,
    ClassTokens,
    FlowMatching,
    Freeze,
    LatentDiffusionModule,
    LoRA,
    LPLCallback,
    SD3Denoiser,
    ShapesDataModule,
)

pytest.importorskip("peft")


def module(**overrides: Any) -> LatentDiffusionModule:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "autoencoder": Autoencoder(tiny_kl()),
        "noise": FlowMatching(),
        "denoiser": denoiser("SD3"),
        "conditioner": ClassTokens(CLASSES, TOKEN_DIM, POOLED_DIM),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return LatentDiffusionModule(**(parts | overrides))


def data() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=32, val_images=8, batch_size=8)


@pytest.mark.parametrize("name", BACKBONES)
def test_lora_is_the_low_rank_update_of_the_layers_it_names(name: str) -> None:
    """W + alpha / r B A by hand, in every family."""
    plain = denoiser(name)
    model = copy.deepcopy(plain)
    LoRA(rank=4, alpha=6.0, targets=["to_q", "to_out.0"]).prepare(model)
    c = condition()
    with torch.no_grad():
        torch.testing.assert_close(model(Z, T, c), plain(Z, T, c))  # B begins at zero
        layers = dict(plain.backbone.named_modules())
        updates: dict[str, dict[str, torch.Tensor]] = {}
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
                layer, rest = key.removeprefix("backbone.").split(".lora_")
                updates.setdefault(layer, {})[rest[0]] = parameter
        for layer, update in updates.items():
            assert layer.endswith((".to_q", ".to_out.0"))
            layers[layer].weight += 6.0 / 4 * update["B"] @ update["A"]
        torch.testing.assert_close(model(Z, T, c), plain(Z, T, c), atol=1e-5, rtol=1e-4)
    wanted = {n for n in layers if n.endswith((".to_q", ".to_out.0"))}
    assert set(updates) == wanted
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.state_dict())
    assert all("lora_" in n for n in trained)
    state = {key: torch.full_like(tensor, 0.5) for key, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(dict(list(state.items())[1:]))


def test_what_a_denoiser_has_of_its_own_is_saved_beside_a_lora() -> None:
    """It is in no base model."""

    class Own(SD3Denoiser):
        def __init__(self, backbone: Any) -> None:
            super().__init__(backbone)
            self.gain: torch.Tensor
            self.register_buffer("gain", torch.ones(()))
            self.skip = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def made() -> Own:
        own = Own(denoiser("SD3").backbone)
        LoRA(rank=2).prepare(own)
        return own

    own = made()
    own.gain.fill_(2.0)
    state = own.state_dict()
    assert {name for name in state if "lora" not in name} == {"gain", "skip"}
    other = made()
    other.load_state_dict(state)
    assert other.gain == 2


def test_a_lora_in_bfloat16_trains_in_float32() -> None:
    model = denoiser("UNet (SDXL)", dtype="bfloat16")
    LoRA(rank=2).prepare(model)
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    model(Z, T, condition()).float().mean().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
def test_a_lora_run_saves_what_it_trained_and_resumes(tmp_path: Path, averaged: bool) -> None:
    def start() -> tuple[LatentDiffusionModule, list[Any]]:
        return module(fine_tuning=LoRA(rank=2)), [LPLCallback(), *([EMA(0.5)] if averaged else [])]

    tuned, callbacks = start()
    base = {n: p.clone() for n, p in tuned.named_parameters() if not p.requires_grad}
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(tuned, data())
    trained = sum(len(group["params"]) for group in run.optimizers[0].param_groups)
    assert trained == len([p for p in tuned.parameters() if p.requires_grad])
    run.save_checkpoint(tmp_path / "lora.ckpt")
    saved = torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in n or n.startswith("conditioner.") for n in saved)
    for name, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name])
    again, callbacks = start()
    longer = trainer(tmp_path, max_steps=3, callbacks=callbacks)
    longer.fit(again, data(), ckpt_path=str(tmp_path / "lora.ckpt"))
    assert longer.global_step == 3
    third, _ = start()
    third.load_state_dict(saved)
    for name, tensor in third.state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_a_lora_starts_from_the_weights_of_a_run(tmp_path: Path) -> None:
    base = module()
    with torch.no_grad():
        base.denoiser.backbone.proj_out.bias += 1
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    tuned = module(weights=str(tmp_path / "base.safetensors"), fine_tuning=LoRA())
    c = condition()
    with torch.no_grad():
        torch.testing.assert_close(tuned.denoiser.eval()(Z, T, c), base.denoiser.eval()(Z, T, c))
    assert tuned.hparams["weights"] == str(tmp_path / "base.safetensors"), "its checkpoints do not hold them"


def test_a_lora_goes_on_from_a_lora(tmp_path: Path) -> None:
    """Trained without LPL, and then with it, on the same updates."""
    first = module(fine_tuning=LoRA(rank=2))
    run = trainer(tmp_path)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "first.ckpt")
    second = module(fine_tuning=LoRA(rank=2), weights=str(tmp_path / "first.ckpt"))
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in second.state_dict().items())
    with pytest.raises(ValueError, match="of another model: .* another shape"):
        module(fine_tuning=LoRA(rank=3), weights=str(tmp_path / "first.ckpt"))


def test_weights_in_16_bits_are_not_trained_by_accident(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Weights in torch.bfloat16 are to be trained.*now 32-true.*or train LoRA"):
        trainer(tmp_path).fit(module(denoiser=denoiser("SD3", dtype="bfloat16")), data())
    trainer(tmp_path).fit(module(denoiser=denoiser("SD3", dtype="bfloat16"), fine_tuning=LoRA()), data())
    trainer(tmp_path).validate(module(denoiser=denoiser("SD3", dtype="bfloat16")), data(), verbose=False)


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel ends in 'add_q_proj'.*to_k"):
        LoRA(targets=["to_q", "add_q_proj"]).prepare(denoiser("UNet (SDXL)"))
    with pytest.raises(ValueError, match="`targets`='nothing' fits no layer of SD3Transformer2DModel"):
        LoRA(targets="nothing").prepare(denoiser("SD3"))
    with pytest.raises(ValueError, match="`rank` must be 1 or more"):
        LoRA(rank=0)
    model = denoiser("SD3")
    LoRA(targets=r"transformer_blocks\.1\.attn\.to_q").prepare(model)
    assert len(model.state_dict()) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.0}, "`alpha` must be more than 0, got 0.0"),
        ({"dropout": 1.5}, "`dropout` must be 0 or more and less than 1, got 1.5"),
        ({"dropout": -0.1}, "`dropout` must be 0 or more"),
        ({"targets": "(to_q"}, r"`targets`='\(to_q' is no regular expression: missing \)"),
    ],
)
def test_numbers_of_a_lora_that_train_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRA(**options)


def test_frozen_layers_stay_and_are_saved(tmp_path: Path) -> None:
    tuned = module(fine_tuning=Freeze(["transformer_blocks.*", "pos_embed*"], but=["transformer_blocks.1.attn.*"]))
    before = copy.deepcopy(tuned.state_dict())
    trainer(tmp_path).fit(tuned, data())
    for name, tensor in tuned.state_dict().items():
        inside = name.removeprefix("denoiser.backbone.")
        frozen = inside.startswith(("transformer_blocks.0.", "pos_embed")) or (
            inside.startswith("transformer_blocks.1.") and not inside.startswith("transformer_blocks.1.attn.")
        )
        if frozen:
            assert torch.equal(tensor, before[name]), name
    for name in ("transformer_blocks.1.attn.to_q.weight", "proj_out.weight"):
        name = f"denoiser.backbone.{name}"
        assert not torch.equal(tuned.state_dict()[name], before[name])
    assert set(before) == set(module().state_dict())


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ValueError, match="no parameter of SD3Transformer2DModel is called 'blocks.*'; there are context"
    ):
        Freeze(["blocks.*"]).prepare(denoiser("SD3"))
    with pytest.raises(ValueError, match="`but`: no parameter"):
        Freeze(["*"], but=["blocks.*"]).prepare(denoiser("SD3"))
    with pytest.raises(ValueError, match="freezes the whole backbone"):
        Freeze(["*"]).prepare(denoiser("SD3"))
    with pytest.raises(ValueError, match="`layers` must name"):
        Freeze([])


def test_weights_of_another_resolution_fit(tmp_path: Path) -> None:
    small = module(denoiser=SD3Denoiser(backbones.sd3(pos_embed_max_size=8, sample_size=16)))
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = module(
        denoiser=SD3Denoiser(backbones.sd3(pos_embed_max_size=16, sample_size=32)),
        weights=str(tmp_path / "small.safetensors"),
    )
    name = "denoiser.backbone.pos_embed.pos_embed"
    assert large.state_dict()[name].shape[1] == 16**2
    for key, tensor in small.state_dict().items():
        if key != name:
            assert torch.equal(large.state_dict()[key], tensor)
    larger = module(
        denoiser=SD3Denoiser(backbones.sd3(pos_embed_max_size=16, attention_head_dim=16, caption_projection_dim=32))
    )
    with pytest.raises(ValueError, match="of another model"):
        larger.load_weights(str(tmp_path / "small.safetensors"))
