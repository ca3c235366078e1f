"""Every config runs, made small by one overlay, and is built at its full size on no device at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import ROOT
from full_size import stand_ins
from PIL import Image
from safetensors.torch import load_file
from test_cli import in_folder, last_run, logged

from lpl_lightning import DDPM, LatentDiffusionModule, UNetDenoiser
from lpl_lightning.cli import LPLCLI, main
from lpl_lightning.evaluation import Report
from lpl_lightning.profiling import ProfilingTrainer

CONFIGS = ROOT / "configs"
NOISES = ["ddpm_epsilon", "ddpm_v", "flow"]
PAPER = ["imagenet256", "imagenet512", "cc12m256", "cc12m512"]
LORA = ["sdxl_lora_lpl", "sd3_lora_lpl"]
OTHERS = ["quickstart", "folder", "denoiser_shapes", "autoencoder_shapes"]
OVERLAYS = [*NOISES, "lpl", "guards", "preemptible", "tiny", "sdxl_vae", "mmdit_805m", "mmdit_2363m"]
DEVICES = ["ddp", "fsdp2"]
"""Run by two processes in test_devices.py."""
STACKS = [
    *(["imagenet256", noise, *lpl] for noise in NOISES for lpl in ([], ["lpl"])),
    *([config, noise, "lpl"] for config, noise in zip(PAPER[1:], NOISES, strict=True)),
    *([config] for config in PAPER[1:]),
    ["imagenet512", "mmdit_805m", "lpl"],
    ["imagenet512", "mmdit_2363m", "flow", "sdxl_vae"],
    *([config] for config in LORA),
    *([config] for config in OTHERS),
    ["folder", "flow", "lpl", "guards", "preemptible"],
]


PLAIN = [[config] for config in PAPER[1:]]


def test_no_config_is_forgotten() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PAPER, *LORA, *OTHERS, *OVERLAYS, *DEVICES}


def given(stack: list[str]) -> list[str]:
    return [word for name in stack for word in ("-c", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize(
    "stack",
    # What is there with LPL too takes as long without.
    [pytest.param(one, marks=pytest.mark.slow) if [*one, "lpl"] in STACKS or one in PLAIN else one for one in STACKS],
    ids="+".join,
)
def test_every_config_takes_two_steps_and_draws(stack: list[str], tmp_path: Path) -> None:
    if stack[0] in LORA:
        pytest.importorskip("peft")
    main(["fit", *given([*stack, "tiny"]), "--trainer.enable_progress_bar=false", *in_folder(tmp_path)])
    (run,) = (tmp_path / "runs").glob("*/version_0")
    if stack[0] == "autoencoder_shapes":
        assert (run / "autoencoder" / "config.json").is_file()
        return
    assert len(list(run.glob("samples/step-00000002.png"))) == 1
    assert list(run.glob("checkpoints/*.ckpt"))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in weights if name.startswith(("autoencoder.", "conditioner.encoders."))]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2
    has_lpl = "lpl" in stack or stack[0] in ("quickstart", *LORA)
    assert any("LPLCallback" in callback["class_path"] for callback in saved["trainer"]["callbacks"]) == has_lpl
    if stack[0] in LORA:
        lora = load_file(run / "diffusers" / "pytorch_lora_weights.safetensors")
        assert all(tensor.any() for name, tensor in lora.items()), (
            "two steps have moved each matrix that begins at zero"
        )
        metrics = logged(run)
        assert metrics["lpl_weight"][-1] > 0


@pytest.mark.parametrize(
    "stack",
    [["imagenet256", "flow", "lpl"], pytest.param(["cc12m256", "ddpm_v"], marks=pytest.mark.slow)],
    ids="+".join,
)
def test_what_was_trained_is_evaluated(stack: list[str], tmp_path: Path) -> None:
    """By ``lpl test`` into the run's folder, by labels and by captions; and quickly by ``lpl validate``."""
    options = ["--trainer.enable_progress_bar=false", "--evaluation.cache=false", "--validation.cache=false"]
    quiet = [*given([*stack, "tiny"]), *options, *in_folder(tmp_path)]
    main(["fit", *quiet])
    run = last_run(tmp_path)
    ckpt = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    main(["test", *quiet, *ckpt])
    (folder,) = (run / "evaluation").iterdir()
    (written,) = folder.glob("4-images-*")
    report = Report.read(written)
    assert report.generation["global_step"] == 2
    assert report.generation["ema"] == (0.99975 if "lpl" in stack else 0.9999)
    assert {"spectrum_log_difference", "reconstruction_psnr"} < report.values.keys()
    captions = [path.read_text() for path in sorted(folder.rglob("*.txt"))]
    assert len(captions) == (4 if stack[0] == "cc12m256" else 0)
    main(["validate", *quiet, *ckpt])
    (quick,) = (path for path in (run / "validation").iterdir() if path.is_dir())
    assert len(list((run / "validation").glob("loss_by_noise_last-*.csv"))) == 1
    assert Report.read(next(quick.glob("2-images-*"))).images["count"] == 2
    assert Report.read(written).images["count"] == 4


def test_the_paper_post_trains_from_its_own_weights(tmp_path: Path) -> None:
    """256 px, then 512 px with LPL from the weights as trained, and from their average, with other random numbers."""
    quiet = ["--trainer.enable_progress_bar=false", *in_folder(tmp_path)]
    main(["fit", *given(["imagenet256", "flow", "tiny"]), *quiet, "--model.optimizer.lr=0.01"])
    source = last_run(tmp_path) / "checkpoints" / "last.ckpt"
    first = torch.load(source, weights_only=True)
    name, grid = "denoiser.backbone.proj_out.weight", "denoiser.backbone.pos_embed.pos_embed"
    average = first["state_dict"] | first["lpl_lightning_averages"]["0.9999"]
    for ema, expected in ((None, first["state_dict"]), (0.9999, average)):
        rule = {"lpl_lightning.LatentDiffusionModule": {"weights": str(source), "weights_ema": ema}}
        (tmp_path / "start.yaml").write_text(yaml.safe_dump({"stand_ins": rule}))
        stack = [*given(["imagenet512", "flow", "lpl", "tiny"]), "-c", str(tmp_path / "start.yaml")]
        main(["fit", *stack, "--data.image_size=128", "--seed_everything=5", *quiet])
        last = last_run(tmp_path) / "checkpoints" / "last.ckpt"
        second = torch.load(last, weights_only=True)
        assert expected[grid].shape[1] == 16**2
        assert second["state_dict"][grid].shape[1] == 32**2
        moved = (second["state_dict"][name] - expected[name]).abs().max()
        assert 0 < moved < 3e-4, "two steps at 1e-4 from there"
        assert set(second["lpl_lightning_averages"]) == {"0.99975"}
    apart = (first["state_dict"][name] - average[name]).abs().max()
    assert apart > 1e-3, "the two are told apart by where training went on from"


def test_a_pretrained_backbone_is_drawn_from_without_a_checkpoint(tmp_path: Path) -> None:
    """The base that a LoRA is compared with; one with random weights is refused as before."""
    UNetDenoiser("random:embedded:tiny/sdxl", subfolder="unet").backbone.save_pretrained(tmp_path / "base" / "unet")
    tiny = [*given(["sdxl_lora_lpl", "tiny"]), "--data.num_generate=1", f"--writer.dirname={tmp_path / 'out'}"]
    tiny += ["--trainer.enable_progress_bar=false", *in_folder(tmp_path)]
    with pytest.raises(ValueError, match="`lpl predict` needs trained weights"):
        main(["predict", *tiny])
    main(["predict", *tiny, f"--model.denoiser.backbone={tmp_path / 'base'}"])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def build(stack: list[str], tmp_path: Path) -> LatentDiffusionModule:
    """The module of a config at its full size, on the meta device."""
    (tmp_path / "full.yaml").write_text(yaml.safe_dump({"stand_ins": stand_ins(tmp_path / "models")}))
    with torch.device("meta"):
        cli = LPLCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=ProfilingTrainer,
            auto_configure_optimizers=False,
            run=False,
            args=[*given(stack), "-c", str(tmp_path / "full.yaml"), "--trainer.precision=32-true"],
        )
    assert isinstance(cli.model, LatentDiffusionModule)
    return cli.model


def millions(module: torch.nn.Module, trained: bool = False) -> int:
    counted = (p.numel() for p in module.parameters() if p.requires_grad or not trained)
    return round(sum(counted) / 1e6)


@pytest.mark.parametrize(
    ("stack", "backbone"),
    [
        (["imagenet256"], 805),
        (["imagenet512", "ddpm_v"], 805),
        (["imagenet256", "mmdit_805m", "flow", "lpl"], 805),
        (["imagenet512", "mmdit_2363m"], 2363),
        (["cc12m256", "flow"], 806),
        (["cc12m512", "lpl", "sdxl_vae"], 806),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_the_papers_models_at_full_size(stack: Any, backbone: int, tmp_path: Path) -> None:
    module = build(stack, tmp_path)
    assert millions(module.denoiser) == backbone
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert millions(module.autoencoder) == (84 if "sdxl_vae" in stack else 194)
    assert millions(module.autoencoder, trained=True) == 0
    side = 512 if "512" in stack[0] else 256
    module.denoiser.check(module.autoencoder.latent_channels, side // 8, module.conditioner)
    assert module.sampler.guidance_scale == (2.0 if side == 512 else 1.5)
    assert module.sampler.num_steps == 50
    if "ddpm_v" in stack:
        assert isinstance(module.noise, DDPM)
        assert module.noise.prediction_type == "v_prediction"
        assert module.noise.sampling_scheduler().config.rescale_betas_zero_snr
    if stack[0].startswith("cc12m"):
        assert millions(module.conditioner) == 123 + 695
        assert millions(module.conditioner, trained=True) == 0


@pytest.mark.parametrize(
    ("config", "backbone", "text", "lora"),
    [("sdxl_lora_lpl", 2567, 123 + 695, 23), ("sd3_lora_lpl", 2243, 124 + 695 + 4762, 7)],
)
def test_fine_tuned_models_at_full_size(config: str, backbone: int, text: int, lora: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    module = build([config], tmp_path)
    assert millions(module, trained=True) == lora
    assert millions(module.denoiser) == pytest.approx(backbone + lora, abs=1)
    assert millions(module.conditioner) == pytest.approx(text, abs=1)
    module.denoiser.check(module.autoencoder.latent_channels, 128, module.conditioner)
    assert module.denoiser.dtype == torch.bfloat16


def test_stand_ins_of_all_files_are_put_wherever_they_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a class is named without arguments, and over what the command line says."""
    first = {"lpl_lightning.sampling.Sampler": {"num_steps": 7}, "runs": str(tmp_path / "elsewhere")}
    second = {
        "lpl_lightning.sampling.Sampler": {"guidance_scale": 1.0},
        "lpl_lightning.FlowMatching": {"shift": 3.0},
        "photos/val": str(tmp_path / "photos"),
    }
    for name, rules in (("first", first), ("second", second)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"stand_ins": rules}))
    files = [word for name in ("first", "second") for word in ("-c", str(tmp_path / f"{name}.yaml"))]
    args = ["fit", *given(["quickstart"]), *files, "--trainer.max_steps=0", "--model.sampler.num_steps=9"]
    args.append("--evaluation.reference=photos/val")
    with caplog.at_level("INFO"):
        main([*args, "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"])
    (run,) = (tmp_path / "elsewhere" / "quickstart").iterdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["evaluation"]["reference"] == str(tmp_path / "photos")
    parts = config["model"]["init_args"]
    assert parts["sampler"]["init_args"]["num_steps"] == 7
    assert parts["sampler"]["init_args"]["guidance_scale"] == 1.0
    assert parts["noise"]["init_args"]["shift"] == 3.0
    for said in ("Sampler with num_steps 7, guidance_scale 1.0", f"{tmp_path / 'elsewhere'} for runs"):
        assert f"Stand-in: {said}" in caplog.text


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lpl_lightning.Sampler": {"steps": 7}}, "steps"),
        ({"lpl_lightning.Nothing": {"steps": 7}}, "must be the path of a class"),
        ({"stabilityai/sdxl-vae": {"steps": 7}}, "a string to stand in for a string"),
    ],
)
def test_bad_stand_ins_are_refused(
    rules: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"stand_ins": rules}))
    with pytest.raises((ValueError, SystemExit)) as raised:
        main(["fit", *given(["quickstart"]), "-c", str(tmp_path / "overlay.yaml"), *in_folder(tmp_path)])
    assert message in str(raised.value) + capsys.readouterr().err


NOTHING_READ = "no image is read before the parts are known to fit"


@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (
            ["imagenet256", "ddpm_epsilon"],
            ["--model.noise.rescale_betas_zero_snr=true"],
            "`rescale_betas_zero_snr`=True cannot go with `prediction_type`='epsilon'",
        ),
        (
            ["imagenet256", "flow"],
            ["--model.sampler.scheduler=diffusers.DDPMScheduler"],
            "DDPMScheduler is set for prediction_type='epsilon', but the noise process FlowMatching trains 'flow'",
        ),
        (
            ["imagenet256"],
            ["--data=lpl_lightning.ImageFolderDataModule", "--data.root={photos}", "--data.captions=sidecar"],
            "The data have captions and no classes, but ClassTokens goes by class labels",
        ),
        (
            ["cc12m256"],
            ["--data=lpl_lightning.ImageFolderDataModule", "--data.root={photos}", "--data.captions=null"],
            "Captions needs data with captions, but ImageFolderDataModule has none",
        ),
        (
            ["cc12m256"],
            ["--model.conditioner.token_dim=176"],
            "`token_dim`=176 of the conditioner (Captions) must be 80",
        ),
        (
            ["sdxl_lora_lpl"],
            ["--model.fine_tuning.targets=[to_q, add_q_proj]"],
            "`targets`: no layer of UNet2DConditionModel ends in 'add_q_proj'",
        ),
        (
            ["sdxl_lora_lpl"],
            ["--model.conditioner.size_conditions=false"],
            "is conditioned on sizes: set `size_conditions: true`",
        ),
    ],
    ids=["epsilon at zero snr", "flow by ddpm", "captions by class", "no captions", "encoder", "targets", "sizes"],
)
def test_what_does_not_fit_is_one_error_before_data_are_read(
    stack: list[str], options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stack[0] in LORA:
        pytest.importorskip("peft")
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for name in ("a.png", "a.txt", "one/a.png", "one/a.txt"):
        (tmp_path / "photos" / name).write_text("neither image nor read")

    def never(*_: Any) -> None:
        raise AssertionError(NOTHING_READ)

    monkeypatch.setattr("lpl_lightning.data.shapes.ShapesDataset.__getitem__", never)
    monkeypatch.setattr("lpl_lightning.data.folder.in_threads", never)
    options = [option.format(photos=tmp_path / "photos") for option in options]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        main(["fit", *given([*stack, "tiny"]), *options, *in_folder(tmp_path)])
    assert len(str(raised.value)) < 500


BUCKETS = ["-c", str(CONFIGS / "data" / "buckets.yaml")]


def test_buckets_are_laid_over_a_recipe(tmp_path: Path) -> None:
    """Trained, validated and tested on photos of several shapes; the log says which."""
    photos = tmp_path / "photos"
    for index in range(24):
        folder = photos / f"class {index % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise([(96, 64), (64, 96), (80, 80)][index % 3], 60).save(folder / f"{index}.png")
    data = f"data: {{class_path: lpl_lightning.ImageFolderDataModule, init_args: {{root: {photos}, image_size: 128}}}}"
    (tmp_path / "photos.yaml").write_text(data)
    stack = [*given(["folder", "lpl", "tiny"]), "-c", str(tmp_path / "photos.yaml"), *BUCKETS]
    quiet = ["--data.buckets.divisor=16", "--data.batch_size=2", "--data.num_workers=0", "--data.val_fraction=0.3"]
    quiet += ["--trainer.enable_progress_bar=false", "--evaluation.cache=false", *in_folder(tmp_path)]
    main(["fit", *stack, *quiet])
    run = last_run(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    assert saved["buckets"] == {"divisor": 16, "max_aspect": 2.0}
    assert logged(run)["val_loss"]
    main(["test", *stack, *quiet, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    (folder,) = (run / "evaluation").glob("*/*-images-*")
    assert Report.read(folder).images["image_size"] == 128


def test_a_missing_text_encoder_is_named(tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(ROOT / "lpl_lightning" / "weights" / "tiny" / "sd3", models)
    shutil.rmtree(models / "text_encoder_3")
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    tiny["stand_ins"]["stabilityai/stable-diffusion-3.5-medium"] = f"random:{models}"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    with pytest.raises(FileNotFoundError, match="text encoder .*`subfolder`='text_encoder_3' is not there"):
        main(["fit", *given(["sd3_lora_lpl"]), "-c", str(tmp_path / "tiny.yaml"), *in_folder(tmp_path)])
