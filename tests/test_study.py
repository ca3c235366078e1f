"""The commands of the study are ones that the command line takes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SHARED
from PIL import Image

from lpl_lightning import Autoencoder
from lpl_lightning.cli import main
from lpl_lightning.data import ShapesDataset
from lpl_lightning.stand_ins import merged

SCRIPT = ROOT / "notebooks" / "study.py"


def planned(folder: Path, experiment: str, scale: str) -> list[list[str]]:
    script = [sys.executable, str(SCRIPT), "plan", experiment, "--scale", scale]
    script += ["--anew", "--out", str(folder / "runs")]
    script += ["--profile"] if experiment == "thin" else []
    script += (
        ["--autoencoder", str(SHARED / "weights" / "taesd")] if experiment == "ceilings" and SHARED.is_dir() else []
    )
    said = subprocess.run([*script, "--photos", str(folder)], capture_output=True, text=True, check=True, cwd=ROOT)
    return [shlex.split(line) for line in said.stdout.splitlines()]


@pytest.mark.parametrize(
    ("scale", "experiments", "kinds"),
    [
        pytest.param(
            "cpu", ("main", "rivals", "thin", "ceilings", "dit", "taesd3", "taesd"), 30, marks=pytest.mark.slow
        ),
        pytest.param("gpu", ("thin",), 6, marks=pytest.mark.slow),
        pytest.param("gpu-128", ("thin", "dit"), 10, marks=pytest.mark.slow),
    ],
)
def test_commands_are_understood(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scale: str,
    experiments: tuple[str, ...],
    kinds: int,
) -> None:
    """One of each kind of run: config files, options, stand-ins."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    seen = set()
    for program, command, *options in (words for name in experiments for words in planned(tmp_path, name, scale)):
        kind = (
            command,
            *(word for word in options if word.endswith(".yaml") or word.startswith("--data=")),
            "stand_ins" in str(options),
        )
        if kind in seen:
            continue
        seen.add(kind)
        if program == "python":
            assert (ROOT / command).is_file()
            continue
        assert program == "lpl"
        with pytest.raises(SystemExit) as ended:
            main([command, *options, "--print_config"])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
    assert len(seen) == kinds
    of_ceilings = {"evaluate", "notebooks/reconstruct.py"} if "ceilings" in experiments else set()
    assert {kind[0] for kind in seen} == {"fit", "encode", "test", "profile"} | of_ceilings


def test_it_begins_with_the_autoencoder_that_lies_beside_it(tmp_path: Path) -> None:
    """Which loads, at f = 4 and with the four maps that LPL compares."""
    script = [sys.executable, str(SCRIPT), "plan", "main", "--out", str(tmp_path / "runs")]
    said = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert not [line for line in said if "study/autoencoder.yaml" in line]
    assert said[0].startswith("lpl encode")
    (folder,) = {
        word.removeprefix("--model.autoencoder.model=")
        for line in said
        for word in shlex.split(line)
        if word.startswith("--model.autoencoder.model=")
    }
    autoencoder = Autoencoder(folder)
    assert autoencoder.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16, 16)
    assert autoencoder.feature_names == ("mid", "up_0", "up_1", "up_2")


def test_the_tiny_decoder_decodes_as_the_autoencoder_does() -> None:
    """Images that neither has seen, at a tenth of the parameters; nearer to it than to the images of other latents."""
    autoencoder, tiny = (Autoencoder(str(ROOT / "notebooks" / name)) for name in ("autoencoder", "tiny_autoencoder"))
    data = ShapesDataset(64, split="test", seed=7)
    latents = autoencoder.encode(torch.stack([data[index]["image"] for index in range(32)]))
    expected, found = autoencoder.decode(latents), tiny.decode(latents)
    error = (found - expected).square().mean()
    assert error < 0.2 * (found - expected.roll(1, dims=0)).square().mean()
    assert (tiny.downscale, tiny.latent_channels) == (autoencoder.downscale, autoencoder.latent_channels)
    sizes = [sum(one.numel() for one in of.model.decoder.parameters()) for of in (autoencoder, tiny)]
    assert sizes[0] > 10 * sizes[1]


@pytest.mark.slow
def test_a_tiny_decoder_is_distilled(tmp_path: Path) -> None:
    """Two steps by the script; blocks that do not upsample as far are refused."""
    for number in range(4):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    script = [sys.executable, str(ROOT / "notebooks" / "distill.py"), str(tmp_path / "photos"), str(tmp_path / "out")]
    script += ["--channels", "4", "--steps", "2", "--batch-size", "2"]
    refused = subprocess.run([*script, "--blocks", "1", "1"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.returncode == 2
    assert "`--blocks` [1, 1] upsample by 2; the latents are smaller than the images by 4" in refused.stderr
    assert not (tmp_path / "out").exists()
    subprocess.run(script, capture_output=True, cwd=ROOT, check=True)
    made = Autoencoder(str(tmp_path / "out"))
    assert (made.downscale, made.latent_channels) == (4, 4)
    assert made.model.config["decoder_block_out_channels"] == [4, 4, 4]


def test_another_pretraining_lies_beside(tmp_path: Path) -> None:
    """Else what was trained from one would be taken for what was trained from the other."""
    script = [sys.executable, str(SCRIPT), "plan", "main", "--out", str(tmp_path / "runs"), "--only", "flow-lpl-2"]
    for options, seed, out in (([], 0, "runs"), (["--pretraining", "1"], 1, "runs-pretraining-1")):
        said = subprocess.run([*script, *options], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        before, after = (line for line in said.splitlines() if line.startswith("lpl fit"))
        assert f"--seed_everything={seed} " in before
        assert "--seed_everything=2 " in after
        assert f"--model.weights={tmp_path / out / 'pretrain-flow'}/" in after
        assert said.count(str(tmp_path)) == said.count(f"{tmp_path / out}/") + said.count(f"={tmp_path / out} ")


def test_latents_that_were_begun_go_on(tmp_path: Path) -> None:
    """``lpl encode`` writes its manifest before the first of them."""
    folder = tmp_path / "runs" / "latents"
    for finished in (None, False, True):
        if finished is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text(json.dumps({"finished": finished}))
        commands = [words[1] for words in planned(tmp_path, "main", "cpu")]
        assert ("encode" in commands) == (finished is not True)


def test_paths_are_of_where_one_stands(tmp_path: Path) -> None:
    """Commands run in the repository's folder, from wherever they are planned."""
    (tmp_path / "seen" / "latents").mkdir(parents=True)
    (tmp_path / "seen" / "latents" / "manifest.json").write_text('{"finished": true}')
    script = [sys.executable, str(SCRIPT), "plan", "main", "--photos", str(ROOT / "mine")]
    for out, cwd, expected in (("seen", tmp_path, f"{tmp_path}/seen"), ("../seen", ROOT / "tests", "seen")):
        said = subprocess.run([*script, "--out", out], capture_output=True, text=True, check=True, cwd=cwd).stdout
        assert f"save_dir={expected} " in said
        assert ("lpl encode" in said) == (cwd != tmp_path)
    assert "--data.root=mine/train" in said


@pytest.mark.parametrize(("scale", "image_size"), [("gpu", 64), ("gpu-128", 128)])
def test_latents_are_as_large_as_the_denoiser_takes_them(tmp_path: Path, scale: str, image_size: int) -> None:
    """The autoencoder's f is 4, and a token is 2 x 2 latents."""
    encode, fit, *_ = (
        words for words in planned(tmp_path, "main", scale) if "study/autoencoder.yaml" not in str(words)
    )
    assert (encode[1], fit[1]) == ("encode", "fit")
    assert f"--data.image_size={image_size}" in encode
    base, *overlays = (yaml.safe_load((ROOT / word).read_text()) for word in fit if word.endswith(".yaml"))
    backbone = base["model"]["init_args"]["denoiser"]["init_args"]["backbone"]
    rules = merged(config.get("stand_ins", {}) for config in overlays)[backbone["class_path"]]
    assert isinstance(rules, dict)
    size = backbone["init_args"] | rules
    assert (size["sample_size"], size["pos_embed_max_size"]) == (image_size // 4, image_size // 8)
    assert size["num_attention_heads"] == 4


def test_a_budget_is_not_profiled(tmp_path: Path) -> None:
    """A profile is of LPL before the budget has been looked at."""
    words = planned(tmp_path, "thin", "cpu")
    profiled = [str(options) for _, command, *options in words if command == "profile"]
    assert [any(f'"{name}":' in options for options in profiled) for name in ("keep", "every_n_steps", "budget")] == [
        1,
        1,
        0,
    ]


def test_each_run_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of two would be taken for the other, which had been trained before."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    study = import_module("study")
    for scale in study.SCALES.values():
        known: dict[str, Any] = {}
        for run in (run for runs in study.experiments(scale).values() for run in runs):
            assert known.setdefault(run.name, run) == run


def test_differences_over_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paired by seed, a run whose other is missing left out; the interval by its formula."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    lines = ["folder,run,step,ema,num_steps,guidance,images,against,photos,value,is"]
    values = {"none": (10.0, 20.0, 30.0, 99.0), "lpl": (8.0, 19.0, 27.0)}
    for name, found in values.items():
        lines += [f"study,flow-{name}-{seed},5,0.9,50,2.0,100,val,10,fd,{x}" for seed, x in enumerate(found, start=1)]
    alone = ("study,flow-lpl-scratch", "study,ddpm_v-none-1", "another,flow-none-1")
    lines += [f"{run},5,0.9,50,2.0,100,val,10,fd,1.0" for run in alone]
    lines += ["study,flow-none-1,5,0.9,50,3.0,100,val,10,fd,77.0", "study,flow-none-1,5,0.9,10,2.0,100,val,10,fd,77.0"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    said = import_module("study").table(tmp_path / "results.csv").splitlines()
    # Differences -2, -1, -3: mean -2, standard error 1 / sqrt(3), and 4.302653 deviations of two degrees of freedom.
    half = 4.302653 / 3**0.5
    assert said[2:] == [
        f"| study | flow | val | 50 | fd | 3 | 20 | 18 | -2 [{-2 - half:.4g}, {-2 + half:.4g}] | -10.0 % |"
    ]


def test_reports_become_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured, and what ``lpl compare`` found, in pairs of one seed and setting; other folders' rows stay."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    study = import_module("study")
    out = tmp_path / "mine"
    runs = [
        ("flow-none-1", 5, 7),
        ("flow-lpl-1", 5, 7),
        ("flow-lpl-1", 5, 9),
        ("flow-lpl-2", 5, 7),
        ("flow-none-2", 9, 7),
    ]
    runs += [("flow-lpl-short-1", 5, 6), ("flow-rgb-1", 5, 6), ("flow-none-longer-1", 8, 6), ("flow-rgb-1", 8, 6)]
    runs += [("pretrain-flow", 5, 6), ("flow-lpl-scratch", 5, 6), ("flow-none-from-5-1", 5, 6)]
    # A choice is also compared with the main comparison's pair, where that is measured alike.
    runs += [(f"ddpm_v-{name}-1", 5, 6) for name in ("none", "lpl", "share-0.1")]
    guided = [("flow-none-3", 5, 6), ("flow-lpl-3", 5, 6)]
    for name, step, count in [*runs, *guided]:
        folder = out / name / "version_0" / "evaluation" / f"step={step}" / f"{count}-images"
        folder.mkdir(parents=True)
        report = {"values": {"fd": {"value": step}}, "images": {"count": count}}
        report["reference"] = {"name": "a/val", "count": 3}
        scale = 3.0 if name == guided[1][0] else 2.0
        report["generation"] = {"global_step": step, "ema": 0.9, "num_steps": 4, "guidance_scale": scale}
        (folder / "report.json").write_text(json.dumps(report))
    pairs = {
        tuple(path.relative_to(out).parts[0] for path in map(Path, words[2].removeprefix("--runs=[")[:-1].split(",")))
        for words in (task.words() for task in study.comparisons(out))
    }
    assert pairs == {
        ("flow-none-1", "flow-lpl-1"),
        ("flow-lpl-short-1", "flow-rgb-1"),
        ("flow-lpl-short-1", "flow-none-longer-1"),
        ("pretrain-flow", "flow-lpl-scratch"),
        ("ddpm_v-none-1", "ddpm_v-lpl-1"),
        ("ddpm_v-lpl-1", "ddpm_v-share-0.1-1"),
        ("ddpm_v-none-1", "ddpm_v-share-0.1-1"),
    }
    made = {(name, str(setting)) for name, *_, setting in study.tested(out) if name.endswith("-3")}
    assert made == {("flow-none-3", "6-0.9-4"), ("flow-lpl-3", "6-0.9-4-guidance-3")}
    cells = {
        "none": {"difference": None},
        "lpl": {"difference": -1, "difference_interval": {"low": -2, "high": 0}, "verdict": None},
    }
    # A training that was stopped after step 3 and went on from step 2 in another folder, the eleventh.
    for version, logs in ((0, "1,8\n"), (2, "3,9\n"), (10, "1,\n2,nan\n3,4\n4,6\n")):
        folder = out / "flow-lpl-1" / f"version_{version}"
        folder.mkdir(exist_ok=True)
        (folder / "metrics.csv").write_text("step,lpl_weight\n" + logs)
    unfinished = out / "flow-mask-False-1" / "version_0"
    unfinished.mkdir(parents=True)
    (unfinished / "metrics.csv").write_text("step,lpl_weight\n3,9\n")
    folder = out / "comparisons" / "flow-lpl-1-5-7-0.9-4-val"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"rows": {"fd": {"cells": cells}}}))
    for table in ("RESULTS", "SPECTRA", "DIFFERENCES"):
        monkeypatch.setattr(study, table, tmp_path / f"{table}.csv")
    by_5, by_6 = ("flow-lpl-1,5,0.9,4,2.0,7,val,3,fd", "flow-lpl-1,6,0.9,4,2.0,7,val,3,fd")
    before = [f"yours,{by_5},1", f"mine,{by_5},1", f"mine,{by_6},1"]
    (tmp_path / "RESULTS.csv").write_text("\n".join(["folder,run", *before]) + "\n")
    study.collect(out)
    rows = (tmp_path / "RESULTS.csv").read_text().splitlines()
    assert rows[0].startswith("folder,run,step,")
    # What has been measured anew is in the place of what was, and nothing else is gone.
    assert rows[1:4] == [before[0], f"mine,{by_5},5", before[2]]
    assert "mine,flow-lpl-1,4,,,,,,,log_lpl_weight,5.0" in rows
    assert len(rows) == 1 + 2 + len(runs) + len(guided) + 1
    assert (tmp_path / "DIFFERENCES.csv").read_text().splitlines()[1:] == ["mine,flow-lpl-1-5-7-0.9-4-val,fd,-1,-2,0,"]
    assert "flow-lpl-1" not in str([task.name for task in study.comparisons(out)]), "what has been done is not again"


def test_tasks_wait_for_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In real processes: what needs a task that failed is not begun, all else is."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    study = import_module("study")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "say.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).touch(); sys.exit(int(sys.argv[2]))")

    def task(name: str, *needs: str, code: int = 0) -> Any:
        return study.Task(name, lambda: ["python", str(script), str(tmp_path / name), str(code)], needs)

    todo = [task("third", "second"), task("second", "first"), task("first"), task("lost", "bad"), task("bad", code=3)]
    monkeypatch.setattr(study, "PRELOADED", [])
    with pytest.raises(SystemExit, match="bad, lost"):
        study.work(todo, tmp_path, 2, 60)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "third", "bad", "say.py", "logs"}
    times = [(tmp_path / name).stat().st_mtime_ns for name in ("first", "second", "third")]
    assert times == sorted(times)


def test_grid_has_a_row_a_run_and_a_column_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the order that its text says; nothing is drawn where a run has not been measured."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    study = import_module("study")
    monkeypatch.setattr(study, "GRID", tmp_path / "grid.png")
    order = [(name, count, loss) for name in study.PROCESSES for count in (10, 50) for loss in ("none", "lpl")]
    scale = study.SCALES["cpu"]
    for row, (process, count, loss) in enumerate(order):
        if row == len(order) - 1:
            with pytest.raises(SystemExit, match=f"{process}-{loss}-1 by {count} steps"):
                study.grid(tmp_path, scale, columns=2)
        folder = tmp_path / f"{process}-{loss}-1" / "version_0" / "evaluation" / f"step=500-{count}"
        made = {"global_step": 500, "ema": 0.995, "num_steps": count, "guidance_scale": 2.0}
        (folder / "val").mkdir(parents=True)
        (folder / "val" / "report.json").write_text(json.dumps({"generation": made, "images": {"count": 5000}}))
        for seed, part in ((1, "0000"), (0, "0001"), (2, "0000")):  # files lie in folders, which do not order them
            (folder / "images" / part).mkdir(parents=True, exist_ok=True)
            colour = (20 * row, 100 * seed, 0)
            Image.new("RGB", (64, 64), colour).save(folder / "images" / part / f"{seed:06}.png")
    study.grid(tmp_path, scale, columns=2)
    with Image.open(tmp_path / "grid.png") as drawn:
        assert drawn.size == (2 * 66 - 2, 12 * 66 - 2)
        for row in range(12):
            assert [drawn.getpixel((66 * seed + 1, 66 * row + 63)) for seed in (0, 1)] == [
                (20 * row, 100 * seed, 0) for seed in (0, 1)
            ]
        assert drawn.getpixel((65, 65)) == (255, 255, 255)
