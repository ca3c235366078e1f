"""What configs/extending.md shows runs as it stands there, and what a wrong part is told is one line."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

from lpl_lightning import LatentDiffusionModule
from lpl_lightning.cli import main
from lpl_lightning.conditioning import Condition
from lpl_lightning.own_files import find_own_modules

PAGE = (ROOT / "configs" / "extending.md").read_text()
QUICKSTART = ["-c", str(ROOT / "configs" / "quickstart.yaml")]


def section(title: str) -> tuple[str, str]:
    """The Python and the YAML below a heading."""
    found = re.search(rf"^## {title}\n.*?```python\n(.*?)```.*?```yaml\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1], found[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


def short(overlay: str = "mine.yaml") -> list[str]:
    """Two steps of the quickstart with an overlay of one's own."""
    steps = "{max_steps: 2, val_check_interval: 2, limit_val_batches: 1, log_every_n_steps: 1, accelerator: cpu}"
    Path("short.yaml").write_text(
        f"trainer: {steps}\nstand_ins:\n  lpl_lightning.Sampler: {{num_steps: 2}}\n"
        "  lpl_lightning.SampleGrid: {num_images: 2}\n  lpl_lightning.LatentPerceptualLoss: {threshold: .inf}\n"
        "evaluation: {num_images: 0}\n"
    )
    return [*QUICKSTART, "-c", overlay, "-c", "short.yaml", "--data.init_args.batch_size=4"]


def written(*titles: str) -> None:
    """mine.py and mine.yaml of some sections."""
    code, overlays = zip(*map(section, titles), strict=True)
    Path("mine.py").write_text("\n".join(code))
    merged: dict[str, Any] = {}
    for overlay in overlays:
        for key, value in yaml.safe_load(overlay).items():
            if key == "trainer":
                merged.setdefault("trainer", {"callbacks+": []})["callbacks+"] += value["callbacks+"]
            elif key == "model":
                merged.setdefault("model", {"init_args": {}})["init_args"].update(value["init_args"])
            else:
                merged[key] = value
    Path("mine.yaml").write_text(yaml.safe_dump(merged))


def columns() -> dict[str, list[float]]:
    (path,) = Path("runs/quickstart/version_0").glob("metrics.csv")
    found: dict[str, list[float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    found.setdefault(name, []).append(float(value))
    return found


def module() -> LatentDiffusionModule:
    return LatentDiffusionModule.load_from_checkpoint("runs/quickstart/version_0/checkpoints/last.ckpt", trusted=True)


@pytest.mark.parametrize("titles", [("A denoiser", "Data", "A callback"), ("A noise process", "A loss term")])
def test_parts_in_a_run(folder: Path, titles: tuple[str, ...]) -> None:
    written(*titles)
    main(["fit", *short()])
    for title in titles:
        CHECKS[title]()


def check_denoiser() -> None:
    assert type(module().denoiser).__module__ == "mine"
    # Of strangers nothing of one's own is built, although it could be found.
    with pytest.raises(ValueError, match="would run 'mine\\."):
        LatentDiffusionModule.load_from_checkpoint("runs/quickstart/version_0/checkpoints/last.ckpt")


def check_noise_process() -> None:
    """A denoiser that knows the latent is sampled back to it, from any noise."""
    noise = module().noise
    z0, start = torch.randn(2, 1, 2, 2, 2)

    def predict(z: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        alpha, sigma = (x.reshape(-1, 1, 1, 1) for x in noise.alpha_sigma(t))
        velocity: torch.Tensor = (alpha * z - z0) / sigma
        return velocity

    found = module().sampler(predict, noise, start, Condition())
    assert torch.allclose(found, z0, atol=1e-5)
    assert all(noise.alpha_sigma(torch.tensor([1000.0]))[0] >= 0)


def check_autoencoder() -> None:
    autoencoder = module().autoencoder
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.allclose(autoencoder.encode(images), 1.5 * autoencoder.model.encoder(images))
    assert columns()["loss_lpl"][0] > 0


def check_data() -> None:
    assert yaml.safe_load(Path("runs/quickstart/version_0/config.yaml").read_text())["data"]["class_path"] == (
        "mine.StripesDataModule"
    )


def check_loss_term() -> None:
    found = columns()
    weighed = [0.75 * lpl + 0.1 * l1 for lpl, l1 in zip(found["loss_lpl"], found["loss_latent_l1"], strict=True)]
    rest = [whole - own for whole, own in zip(found["loss"], weighed, strict=True)]
    assert rest == pytest.approx(found["loss_diffusion"], rel=1e-4)


def check_callback() -> None:
    assert 0.1 < columns()["latent_std"][0] < 3


CHECKS = {
    "A denoiser": check_denoiser,
    "A noise process": check_noise_process,
    "An autoencoder": check_autoencoder,
    "Data": check_data,
    "A loss term": check_loss_term,
    "A callback": check_callback,
}


def lpl(*args: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process whose path does not hold the working directory."""
    script = "import sys; sys.path[:] = [p for p in sys.path if p]; from lpl_lightning.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_all_parts_by_the_command_and_what_it_left_by_others(folder: Path) -> None:
    """Beside the config, which lies elsewhere than the working directory; then the commands of the page."""
    written(*CHECKS)
    (folder / "there").mkdir()
    for name in ("mine.py", "mine.yaml"):
        Path(name).rename(folder / "there" / name)
    done = lpl("fit", *short("there/mine.yaml"))
    assert done.returncode == 0, done.stderr
    # The saved config is beside no mine.py, and nor is the checkpoint: both look in the working directory.
    (folder / "there" / "mine.py").rename(folder / "mine.py")
    sys.path.append("")
    for check in CHECKS.values():
        check()
    sys.path.pop()
    checkpoint = "runs/quickstart/version_0/checkpoints/last.ckpt"
    sys.modules.pop("mine")
    main(["test", "-c", "runs/quickstart/version_0/config.yaml", "--ckpt_path", checkpoint])
    sys.modules.pop("mine")
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    (command,) = re.findall(r"^lpl (export .*)$", PAGE, re.MULTILINE)
    main(command.split())
    assert (folder / "my_model" / "backbone.safetensors").is_file()


NET = section("A denoiser")[0]
BAD: list[tuple[str, str, str]] = [
    (
        "",
        "model: {init_args: {denoiser: {class_path: mein.SmallDenoiser}}}",
        "No module named 'mein'",
    ),
    ("", "model: {init_args: {denoiser: {class_path: mine.Nothing}}}", "module 'mine' has no attribute 'Nothing'"),
    (
        NET,
        "model: {init_args: {denoiser: {class_path: mine.SmallNet}}}",
        "does not correspond to a subclass of Denoiser",
    ),
    (
        "from lpl_lightning.noise import DDPM, NoiseProcess\nclass Half(NoiseProcess):\n  times = DDPM.times",
        "model: {init_args: {noise: {class_path: mine.Half}}}",
        "mine.Half is abstract: it lacks alpha_sigma, estimate_z0, sampling_scheduler, target, time_at",
    ),
    (
        NET,
        "trainer: {callbacks+: [{class_path: mine.SmallNet}]}",
        "not correspond to a subclass of Callback",
    ),
    (
        NET,
        "trainer: {callbacks+: [{class_path: lpl_lightning.EMA, init_args: {dekay: 1}}]}",
        "lpl_lightning.EMA: Opt",
    ),
    ("def f(:", "trainer: {callbacks+: [{class_path: mine.X}]}", "invalid syntax (mine.py, line 1)"),
]


@pytest.mark.parametrize(("code", "overlay", "said"), BAD)
def test_what_a_parser_refuses_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], code: str, overlay: str, said: str
) -> None:
    Path("mine.py").write_text(code)
    Path("mine.yaml").write_text(overlay)
    with pytest.raises(SystemExit) as ended:
        main(["fit", *short()])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lpl: error: `")
    assert said in line


def test_only_configs_name_modules(folder: Path) -> None:
    """Not the reports and records of others, in whose folder there may be what they please."""
    (folder / "gift").mkdir()
    (folder / "gift" / "stranger.py").write_text("")
    said = json.dumps({"notes": ["Drawn by stranger.figure"], "config": "gift/other.json", "class_path": "stranger.X"})
    for name in ("report.json", "record.json", "other.json"):
        (folder / "gift" / name).write_text(said)
    with pytest.raises(ValueError, match=r"gift/report\.json is no report"):
        main(["compare", "gift/report.json", "gift/report.json"])
    find_own_modules(["replay", "-c", "mine.yaml", "--record", "gift/record.json", "--record=gift/record.json"])
    assert str(folder / "gift") not in sys.path
    for given in (["--config=gift/report.json"], ["-c", "gift/report.json"], ["--evaluation.suite", "gift/other.json"]):
        find_own_modules(["test", *given])
        assert sys.path.pop() == str(folder / "gift")
    (folder / "mine.yaml").write_text("suite: gift/suite.yaml")
    (folder / "gift" / "suite.yaml").write_text("class_path: stranger.X")
    find_own_modules(["fit", "--model", "mine.yaml"])
    assert sys.path.pop() == str(folder / "gift")
