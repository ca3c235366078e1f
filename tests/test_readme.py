"""README's words hold: its commands run, its links exist, its code works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_script

from lpl_lightning.cli import main

README = (ROOT / "README.md").read_text()


def command(name: str) -> list[str]:
    found = re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no <!-- {name} -->"
    return [line.strip() for line in found[1].splitlines()]


def test_there_are_two_commands_and_each_installs() -> None:
    for name in ("main-command", "test-command"):
        (line,) = command(name)
        assert line.startswith("python -m pip install -e ")
    assert command("test-command")[0].endswith("&& python -m pytest")


def test_the_main_command_trains_what_it_says(tmp_path: Path) -> None:
    """The part after the installation, cut to two steps."""
    words = shlex.split(command("main-command")[0].split("&&")[1])
    assert words[0] == "lpl"
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    short += ["--trainer.enable_progress_bar=false", "--model.sampler.num_steps=2"]
    config = str(ROOT / words[words.index("-c") + 1])
    main([words[1], "-c", config, *short, f"--trainer.logger.init_args.save_dir={tmp_path}"])
    assert list(tmp_path.rglob("samples/*.png"))


@pytest.mark.slow
def test_the_main_command_needs_nothing_of_the_extras(tmp_path: Path) -> None:
    """In a process where what is installed for them alone cannot be found."""
    words = shlex.split(command("main-command")[0].split("&&")[1])
    options = [*words[1:], "-c", str(ROOT / "configs" / "tiny.yaml"), f"--trainer.logger.init_args.save_dir={tmp_path}"]
    script = [sys.executable, str(Path(__file__).with_name("without_extras.py"))]
    done = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("samples/*.png"))
    # What an extra is needed for says which.
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    options = ["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    said = 'lpl: error: Run pip install "lpl-lightning[text]": StableDiffusion3Pipeline requires the transformers'
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_lpl_command_of_the_text_names_configs_that_exist() -> None:
    for path in re.findall(r"-c (\S+\.yaml)", README):
        assert (ROOT / path).is_file(), path


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("http") or (ROOT / path).exists(), path


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.py").write_text(block)
        run_script(tmp_path / f"{number}.py")


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lpl_lightning", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for name in ("fit", "validate", "test", "predict"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_papers_of_a_project(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200
