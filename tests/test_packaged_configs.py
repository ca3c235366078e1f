from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lpl_lightning import packaged_configs
from lpl_lightning.packaged_configs import with_packaged_configs


def test_what_is_not_here_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    assert len(names) > 20
    args = [word for name in names for word in ("-c", str(name))]
    expected = [word for name in names for word in ("-c", str(ROOT / name))]
    assert with_packaged_configs(args) == expected
    assert with_packaged_configs(["--suite=configs/metrics/paper.yaml"]) == [
        f"--suite={ROOT / 'configs/metrics/paper.yaml'}"
    ]
    others = ["configs/mine.yaml", "quickstart.yaml", "configs/../configs/flow.yaml", "configs", "fit", "--a=b=c", ""]
    assert with_packaged_configs(others) == others


def test_ones_own_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then those of the installed package, and those of the repository last."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flow.yaml").touch()
    monkeypatch.setattr(packaged_configs, "FOLDERS", (tmp_path / "package", ROOT / "configs"))
    assert with_packaged_configs(["configs/flow.yaml"]) == ["configs/flow.yaml"]
    (tmp_path / "configs" / "flow.yaml").unlink()
    assert with_packaged_configs(["configs/flow.yaml"]) == [str(tmp_path / "package" / "flow.yaml")]
    assert with_packaged_configs(["configs/lpl.yaml"]) == [str(ROOT / "configs" / "lpl.yaml")]


def test_the_command_takes_them(tmp_path: Path) -> None:
    """As the shell calls it, from an empty folder."""
    code = "from lpl_lightning.cli import main; main()"
    words = ["fit", "-c", "configs/quickstart.yaml", "-c", "configs/ddpm_v.yaml", "--print_config"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert "both args and command line arguments" not in ended.stderr
    config = yaml.safe_load(ended.stdout)
    assert config["model"]["init_args"]["noise"]["init_args"]["prediction_type"] == "v_prediction"
