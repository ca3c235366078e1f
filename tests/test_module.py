from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch, tiny_dit, tiny_kl, tiny_sd3
from diffusers import DDPMScheduler
from families import FAMILIES, tiny_rae
from forked import run_ranks
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lpl_lightning import (
    DDPM,
    EDM,
    Autoencoder,
    ClassTokens,
    FlowMatching,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    LPLCallback,
    SampleGrid,
    Sampler,
    ShapesDataModule,
)
from lpl_lightning.draws import Draws
from lpl_lightning.noise import NoiseProcess, NoisyLatents
from lpl_lightning.times import CosMap, LogitNormal

MakeModule = Callable[..., LatentDiffusionModule]


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "max_steps": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }
    return pl.Trainer(**(settings | options))


@pytest.fixture
def data() -> ShapesDataModule:
    return ShapesDataModule(image_size=16, train_images=32, val_images=8, batch_size=8)


def fits(make_module: MakeModule, **overrides: Any) -> LatentDiffusionModule:
    return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8), **overrides)


@pytest.mark.parametrize("dit", [False, True], ids=["sd3_flow", "dit_ddpm"])
def test_loss_is_the_mean_squared_error_of_the_target(
    make_module: MakeModule, dit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from the parts with the same draws."""
    module = make_module(dit)
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    batch = image_batch()
    torch.manual_seed(5)
    loss = module.training_step(batch, 0)
    torch.manual_seed(5)
    draws = Draws.fresh(6)
    z0 = module.autoencoder.encode(batch["image"], draws.generators)
    noise = torch.stack([torch.randn(4, 4, 4, generator=generator) for generator in draws.generators])
    noisy = module.noise.noised(z0, noise, module.noise.times(draws.time))
    condition = module.conditioner(batch, 6, draws.drop < 0.1)
    prediction = module.denoiser(noisy.z_t, noisy.t, condition)
    torch.testing.assert_close(loss, F.mse_loss(prediction, module.noise.target(noisy)))
    torch.testing.assert_close(logged["loss_diffusion"], loss)


def ungated(autoencoder: Autoencoder) -> LatentPerceptualLoss:
    """With a threshold that most samples pass, however small the latents."""
    return LatentPerceptualLoss(autoencoder, reference_side=0)


def test_lpl_leaves_the_diffusion_loss_of_the_first_step_as_it_is(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module)
    twin = copy.deepcopy(module)
    seen = []
    for model, callbacks in ((module, []), (twin, [LPLCallback(weight=3.0, loss=ungated)])):
        pl.seed_everything(3, verbose=False)
        run = trainer(tmp_path, max_steps=1, callbacks=callbacks)
        run.fit(model, data)
        seen.append(run.callback_metrics)
    assert seen[0]["loss_diffusion"] == seen[1]["loss_diffusion"]
    assert "loss_lpl" not in seen[0]
    assert seen[1]["loss_lpl"] > 0
    torch.testing.assert_close(seen[1]["loss"], seen[1]["loss_diffusion"] + 3 * seen[1]["loss_lpl"])


@pytest.mark.parametrize(
    "noise",
    [
        DDPM("epsilon", min_snr_gamma=5.0),
        DDPM("v_prediction", min_snr_gamma=5.0),
        DDPM("sample", beta_schedule="squaredcos_cap_v2"),
        FlowMatching(LogitNormal(), shift=2.0),
        FlowMatching(CosMap()),
        EDM(),
    ],
    ids=["epsilon", "v", "sample", "flow_logit_normal_shifted", "flow_cosmap", "edm"],
)
def test_every_noise_process_trains_with_lpl_and_samples(
    noise: NoiseProcess, make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module, noise=noise)
    before = copy.deepcopy(module.denoiser.state_dict())
    run = trainer(tmp_path, max_steps=2, callbacks=[LPLCallback(weight=3.0, loss=ungated)])
    run.fit(module, data)
    assert run.callback_metrics["loss"].isfinite()
    assert run.callback_metrics["loss_lpl"].isfinite()
    assert any(not torch.equal(value, before[name]) for name, value in module.denoiser.state_dict().items())
    images = module.generate([3, 4], torch.tensor([1, 2]))
    assert images.isfinite().all()
    torch.testing.assert_close(module.generate([4], torch.tensor([2])), images[1:], atol=1e-4, rtol=1e-4)


def test_validation_draws_the_same_noise_each_time(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module)
    losses = [trainer(tmp_path).validate(module, data, verbose=False)[0]["val_loss"] for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("lpl", [False, True], ids=["without_lpl", "with_lpl"])
def test_training_lowers_the_validation_loss(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path, lpl: bool
) -> None:
    module = fits(make_module, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    run = trainer(
        tmp_path, max_steps=60, max_epochs=-1, callbacks=[LPLCallback(weight=0.3, loss=ungated)] if lpl else []
    )
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    after = run.validate(module, data, verbose=False)[0]
    assert after["val_loss_diffusion"] < 0.9 * before["val_loss_diffusion"]
    if lpl:
        assert after["val_loss_lpl"] < before["val_loss_lpl"]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_checkpoint_holds_only_what_was_trained_and_resumes(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module)
    run = trainer(tmp_path, callbacks=[LPLCallback()])
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("autoencoder")]
    again = fits(make_module)
    longer = trainer(tmp_path, max_steps=3)
    longer.fit(again, data, ckpt_path=str(tmp_path / "a.ckpt"))
    assert longer.global_step == 3
    parts = {k: getattr(module, k) for k in ("autoencoder", "noise", "denoiser", "conditioner")}
    loaded = LatentDiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", **copy.deepcopy(parts))
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_post_training_starts_from_the_weights_alone(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path, suffix: str
) -> None:
    base = fits(make_module)
    source = tmp_path / f"base.{suffix}"
    if suffix == "ckpt":
        run = trainer(tmp_path)
        run.fit(base, data)
        run.save_checkpoint(source)
    else:
        save_file(base.state_dict(), source)
    module = fits(make_module, weights=str(source))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(module, data)
    assert run.global_step == 1
    moved = [(a - b).abs().max() for a, b in zip(module.state_dict().values(), base.state_dict().values(), strict=True)]
    assert 0 < max(moved) < 5e-3  # one AdamW step at 1e-3 from there


def test_weights_of_another_model_are_refused(make_module: MakeModule, data: ShapesDataModule, tmp_path: Path) -> None:
    save_file(fits(make_module, denoiser=tiny_sd3(num_layers=1)).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"are of another model: \d+ weights are missing, such as 'denoiser"):
        trainer(tmp_path).fit(fits(make_module, weights=str(tmp_path / "other.safetensors")), data)
    run = trainer(tmp_path)
    run.fit(fits(make_module, denoiser=tiny_sd3(num_attention_heads=1, caption_projection_dim=8)), data)
    run.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="the checkpoint are of another model: .* another shape, such as"):
        trainer(tmp_path).fit(fits(make_module), data, ckpt_path=str(tmp_path / "other.ckpt"))
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        trainer(tmp_path).fit(fits(make_module, weights=str(tmp_path / "text.ckpt")), data)


def test_what_does_not_fit_is_refused_before_the_first_step(make_module: MakeModule, tmp_path: Path) -> None:
    cases = [
        (fits(make_module), ShapesDataModule(image_size=18), r"`image_size`=18 .* divisible by 4.*\(16, 20\)"),
        (fits(make_module), ShapesDataModule(image_size=20), "latents are 5 wide"),
        (make_module(), ShapesDataModule(image_size=16), "`num_classes`=3 of the conditioner does not fit"),
        (
            fits(make_module, autoencoder=Autoencoder(tiny_kl(latent_channels=16))),
            ShapesDataModule(image_size=16),
            "takes latents of 4 channels, the autoencoder makes 16",
        ),
        (
            fits(make_module, autoencoder=Autoencoder(FAMILIES["qwen"].model())),
            ShapesDataModule(image_size=16),
            "AutoencoderKLQwenImage is one of video, and this module trains on images",
        ),
    ]
    for module, data, message in cases:
        run = trainer(tmp_path)
        with pytest.raises(ValueError, match=message):
            run.fit(module, data)
        assert run.global_step == 0


def test_images_depend_on_seed_label_and_weights_alone(make_module: MakeModule) -> None:
    module = make_module().eval()
    together = module.generate([3, 4, 5], [0, 1, 2])
    assert together.shape == (3, 3, 16, 16)
    assert together.abs().max() <= 1
    torch.testing.assert_close(together[1:2], module.generate([4], [1]), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(module.generate([4], [1]), module.generate([4], [2]))
    assert module.generate([], []).shape == (0, 3, 16, 16)


def test_images_of_a_size_that_the_autoencoder_does_not_make_are_refused(make_module: MakeModule) -> None:
    """Those of AutoencoderRAE have one, whatever its latents' size."""
    denoiser = tiny_sd3(in_channels=64, out_channels=64, pos_embed_max_size=8)
    module = make_module(autoencoder=Autoencoder(tiny_rae()), denoiser=denoiser)
    assert module.generate([0], [0], image_size=8).shape == (1, 3, 8, 8)
    with pytest.raises(
        ValueError, match="`image_size` must be 8, the only size that the autoencoder decodes to, got 16"
    ):
        module.generate([0], [0], image_size=16)


def test_images_in_training_mode_are_those_of_eval_mode(make_module: MakeModule) -> None:
    """Without dropout; and parts of either mode stay in it."""
    module = make_module(dit=True, denoiser=tiny_dit(dropout=0.5))
    with torch.no_grad():
        for parameter in module.denoiser.parameters():
            parameter.normal_(std=0.2)  # a new DiT ends in zeros
    wanted = copy.deepcopy(module).eval().generate([3, 4], [0, 1])
    module.train()
    module.denoiser.backbone.transformer_blocks[0].eval()
    modes = {name: part.training for name, part in module.named_modules()}
    torch.testing.assert_close(module.generate([3, 4], [0, 1]), wanted, atol=0, rtol=0)
    assert set(modes.values()) == {True, False}
    assert modes == {name: part.training for name, part in module.named_modules()}


def test_sampling_during_training_does_not_change_it(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module)
    twin = copy.deepcopy(module)
    for model, callbacks in ((module, []), (twin, [SampleGrid(num_images=8, every_n_steps=1)])):
        pl.seed_everything(3, verbose=False)
        lpl = LPLCallback(start_step=1, ramp_steps=2)
        run = trainer(tmp_path, max_steps=3, callbacks=[*callbacks, lpl])
        run.fit(model, data)
        # Only where the module is back in training mode does LPL follow its schedule and log under its own name.
        assert run.callback_metrics["lpl_weight"] == pytest.approx(2.0)
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_to_start_from_never_replace_trained_ones(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    """Not when the module is validated after training, nor when its checkpoint is loaded and evaluated."""
    save_file(fits(make_module).state_dict(), tmp_path / "base.safetensors")
    module = fits(make_module, weights=str(tmp_path / "base.safetensors"))
    run = trainer(tmp_path)
    run.fit(module, data)
    trained = copy.deepcopy(module.state_dict())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.validate(module, data, verbose=False)
    (tmp_path / "base.safetensors").unlink()  # the checkpoint needs it no more
    parts = {k: getattr(module, k) for k in ("autoencoder", "noise", "denoiser", "conditioner")}
    loaded = LatentDiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", **copy.deepcopy(parts))
    trainer(tmp_path).validate(loaded, data, verbose=False)
    for model in (module, loaded):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained[name])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_weight_averaging_starts_from_the_weights_and_resumes(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    base = make_module(conditioner=ClassTokens(1000, token_dim=8, pooled_dim=8)).state_dict()
    save_file(base, tmp_path / "base.safetensors")

    def start(steps: int, decay: float, start_at: int) -> tuple[LatentDiffusionModule, pl.Trainer]:
        average = EMAWeightAveraging(decay=decay, update_starting_at_step=start_at)
        module = make_module(
            conditioner=ClassTokens(1000, token_dim=8, pooled_dim=8), weights=str(tmp_path / "base.safetensors")
        )
        return module, trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=[average, LPLCallback()])

    class ManyClasses(ShapesDataModule):
        num_classes = 1000

    many_classes = ManyClasses(image_size=16, train_images=32, val_images=8, batch_size=8)
    module, run = start(2, 0.5, 100)
    run.fit(module, many_classes)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, base[name]), "an average without an update is what it began with"
    module, run = start(2, 0.9999, 0)
    run.fit(module, many_classes)
    everything = torch.ones(2, dtype=torch.bool)
    embeddings = module.state_dict()["conditioner.pooled.weight"]
    torch.testing.assert_close(module.conditioner({}, 2, everything).pooled[0].detach(), embeddings[1000])
    run.save_checkpoint(tmp_path / "ema.ckpt")
    again, longer = start(3, 0.9999, 0)
    longer.fit(again, many_classes, ckpt_path=str(tmp_path / "ema.ckpt"))
    assert longer.global_step == 3


def test_pure_bfloat16_trains_with_the_autoencoder_in_float32(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    module = fits(make_module)
    run = trainer(tmp_path, precision="bf16-true", callbacks=[LPLCallback(), SampleGrid(num_images=8)])
    run.fit(module, data)
    assert module.denoiser.dtype == torch.bfloat16
    assert module.autoencoder.dtype == torch.float32
    assert torch.isfinite(run.callback_metrics["loss"])


def test_a_checkpoint_trained_for_something_else_is_refused(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.fit(fits(make_module), data)
    run.save_checkpoint(tmp_path / "flow.ckpt")
    with pytest.raises(ValueError, match="trained for something else: prediction_type flow there, epsilon here"):
        trainer(tmp_path).fit(fits(make_module, noise=DDPM()), data, ckpt_path=str(tmp_path / "flow.ckpt"))
    other = Autoencoder(tiny_kl(scaling_factor=0.7, shift_factor=0.1))
    with pytest.raises(ValueError, match=r"latent_scale \[0\.5\] there, \[0\.7\] here"):
        trainer(tmp_path).fit(fits(make_module, autoencoder=other), data, ckpt_path=str(tmp_path / "flow.ckpt"))
    run = trainer(tmp_path)
    run.fit(fits(make_module, noise=DDPM()), data)
    run.save_checkpoint(tmp_path / "ddpm.ckpt")
    linear = fits(make_module, noise=DDPM(beta_schedule="linear"))
    with pytest.raises(ValueError, match="noise_schedule beta_schedule scaled_linear there, beta_schedule linear here"):
        trainer(tmp_path).test(linear, data, ckpt_path=str(tmp_path / "ddpm.ckpt"))
    # A checkpoint of before says nothing of the schedule.
    older = torch.load(tmp_path / "ddpm.ckpt", weights_only=True)
    del older["lpl_lightning"]["noise_schedule"]
    linear.on_load_checkpoint(older)


def test_weights_trained_for_something_else_are_warned_of(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """A flow's may become a DDPM's by training: they are taken, as a checkpoint to go on from is not."""
    flow = fits(make_module)
    run = trainer(tmp_path)
    run.fit(flow, data)
    run.save_checkpoint(tmp_path / "flow.ckpt")
    save_file(flow.state_dict(), tmp_path / "flow.safetensors")
    said = r"flow\.ckpt were trained for something else: prediction_type flow there, epsilon here\. Without training"
    with pytest.warns(UserWarning, match=said):
        taken = fits(make_module, noise=DDPM(), weights=str(tmp_path / "flow.ckpt"))
    assert all(torch.equal(tensor, flow.state_dict()[name]) for name, tensor in taken.state_dict().items())
    with pytest.warns(UserWarning, match=said):
        fits(make_module, noise=DDPM()).load_weights(str(tmp_path / "flow.ckpt"))
    recwarn.clear()
    fits(make_module, weights=str(tmp_path / "flow.ckpt"))
    fits(make_module, noise=DDPM(), weights=str(tmp_path / "flow.safetensors"))
    assert not [warning for warning in recwarn if "something else" in str(warning.message)]


def test_a_checkpoint_of_edm_says_the_scale_of_its_data(
    make_module: MakeModule, data: ShapesDataModule, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.fit(fits(make_module, noise=EDM(sigma_data=0.5)), data)
    run.save_checkpoint(tmp_path / "edm.ckpt")
    path = str(tmp_path / "edm.ckpt")
    trainer(tmp_path).test(fits(make_module, noise=EDM(sigma_data=0.5)), data, ckpt_path=path, verbose=False)
    other = fits(make_module, noise=EDM(sigma_data=1.0))
    for start in (trainer(tmp_path).test, trainer(tmp_path, max_steps=3).fit):
        with pytest.raises(ValueError, match=r"trained for something else: sigma_data 0\.5 there, 1\.0 here"):
            start(other, data, ckpt_path=path)
    older = torch.load(path, weights_only=True)
    del older["lpl_lightning"]["sigma_data"]
    other.on_load_checkpoint(older)


def test_a_sampler_that_adds_noise_draws_it_from_the_seeds(make_module: MakeModule) -> None:
    process = DDPM()
    scheduler = DDPMScheduler.from_config(process.sampling_scheduler().config)
    module = make_module(dit=True, sampler=Sampler(num_steps=3, guidance_scale=1.0, scheduler=scheduler)).eval()
    state = torch.get_rng_state()
    first, again = module.generate([3, 4], [1, 1]), module.generate([4], [1])
    torch.testing.assert_close(first[1:], again, atol=1e-4, rtol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_classes_there_is_nothing_to_guide_by(make_module: MakeModule) -> None:
    module = make_module(conditioner=ClassTokens(0, token_dim=8, pooled_dim=8)).eval()
    sizes: list[int] = []
    module.denoiser.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    module.generate([0, 1])
    assert sizes == [2, 2]


class Uneven(pl.LightningDataModule):
    """Images of one's own, in batches of these sizes."""

    image_size, num_classes = 16, 8

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def train_dataloader(self) -> DataLoader[Any]:
        item = {"image": torch.zeros(3, 16, 16), "label": torch.tensor(0)}
        return DataLoader(cast(Any, [item] * 4), batch_sampler=cast(Any, [range(size) for size in self.sizes]))


def drawn(module: LatentDiffusionModule) -> list[torch.Tensor]:
    """Noise of all batches that a module trains on, as they come."""
    found: list[torch.Tensor] = []
    plain: Callable[..., NoisyLatents] = module.noise.noised

    def watched(z0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> NoisyLatents:
        if z0.shape[1] == 4:  # not the latents that the process is checked on
            found.append(noise.clone())
        return plain(z0, noise, t)

    module.noise.noised = watched  # type: ignore[method-assign]
    return found


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("sizes", [(4, 4, 3), (3, 4)], ids=["short_last", "short_first"])
def test_a_short_batch_draws_nothing_twice(make_module: MakeModule, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Two epochs, whose samples have each a noise of its own; of a run that was stopped between them, the same."""
    options: dict[str, Any] = {"limit_val_batches": 0, "max_steps": -1}
    whole, first, second = (fits(make_module) for _ in range(3))
    noise, before, after = (drawn(module) for module in (whole, first, second))
    pl.seed_everything(3, verbose=False)
    trainer(tmp_path, max_epochs=2, **options).fit(whole, Uneven(sizes))
    assert [len(batch) for batch in noise] == [*sizes, *sizes]
    assert len({float(sample.sum()) for batch in noise for sample in batch}) == 2 * sum(sizes)
    pl.seed_everything(3, verbose=False)
    run = trainer(tmp_path, max_epochs=1, **options)
    run.fit(first, Uneven(sizes))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_epochs=2, **options)
    again.fit(second, Uneven(sizes), ckpt_path=str(tmp_path / "a.ckpt"))
    for one, other in zip(noise, [*before, *after], strict=True):
        assert torch.equal(one, other)


def test_a_run_that_goes_on_by_other_processes_draws_on(make_module: MakeModule) -> None:
    """One of two with half of each batch draws what the first of one process would have drawn for that half."""
    one, two = fits(make_module), fits(make_module)
    checkpoint: dict[str, Any] = {"state_dict": one.state_dict()}
    one._draw_seed = two._draw_seed = 7

    def draws(module: LatentDiffusionModule, size: int, rank: int, ranks: int, batch: int) -> torch.Tensor:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batch))
        module._trainer = cast(Any, SimpleNamespace(global_rank=rank, world_size=ranks, fit_loop=loop))
        found, _ = module._draw(size, "train", batch)
        module._trainer = None
        return found.time

    draws(one, 6, 0, 1, 0)
    one.on_save_checkpoint(checkpoint)
    whole = draws(one, 6, 0, 1, 1)
    two.on_load_checkpoint(checkpoint)
    halves = [draws(two, 3, rank, 2, 1) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)


def test_processes_count_each_sample_of_buckets_once(make_module: MakeModule) -> None:
    """Each item of their loader is a batch; the last that a process gets may be the first once more."""
    sizes = [4, 4, 3, 4, 2]
    images = [torch.zeros(size, 1) for size in sizes]
    kept, numbers = [], []
    for rank in (0, 1):
        module = fits(make_module)
        sampler: Any = DistributedSampler(cast(Any, images), 2, rank, shuffle=False)
        loader = DataLoader(cast(Any, images), batch_size=None, sampler=sampler)
        module._trainer = cast(Any, SimpleNamespace(global_rank=rank, world_size=2, val_dataloaders=loader))
        for batch_idx, batch in enumerate(loader):
            draws, count = module._draw(len(batch), "val", batch_idx)
            kept.append(count)
            numbers += [] if draws.time is None else draws.time[:count].tolist()
        module._trainer = None
    assert kept == [4, 3, 2, 4, 4, 0]
    assert len(set(numbers)) == sum(sizes)


def test_a_frozen_model_has_nothing_to_train(make_module: MakeModule) -> None:
    module = make_module()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train"):
        module.configure_optimizers()


def test_ranks_draw_their_own_times_and_noise(tmp_path: Path) -> None:
    """Two real processes, seeded alike as a config seeds them."""
    run_ranks(Path(__file__).with_name("distinct_ranks.py"), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("t", "noise"):
        assert not (first[name] == second[name]).any(), name


@pytest.mark.filterwarnings("ignore:Attribute '.*' is an instance of `nn.Module`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_objects_that_a_subclass_takes_are_given_again(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path
) -> None:
    """A checkpoint, which runs no code, holds none; whether the subclass says so or not, and what is plain it keeps."""

    class Mine(LatentDiffusionModule):
        def __init__(self, critic: nn.Module, threshold: float, notes: bool, **parts: Any) -> None:
            super().__init__(**parts)
            if notes:
                self.save_hyperparameters(ignore=["critic"])
            self.critic = critic

    plain = make_module()
    parts = {name: getattr(plain, name) for name in ("autoencoder", "noise", "denoiser", "conditioner")}
    for notes in (False, True):
        module = Mine(nn.Linear(2, 2), 0.5, notes, **parts)
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, DataLoader(cast(Any, [image_batch(2)]), batch_size=None))
        run.save_checkpoint(tmp_path / "mine.ckpt")
        held = torch.load(tmp_path / "mine.ckpt", weights_only=True)["hyper_parameters"]
        assert held == {"threshold": 0.5, "notes": notes, "weights": None, "weights_ema": None}
        again = Mine.load_from_checkpoint(tmp_path / "mine.ckpt", critic=nn.Linear(2, 2), **parts)
        torch.testing.assert_close(again.critic.weight, module.critic.weight)
