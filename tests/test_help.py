"""``--help``: every key of ours says what it is, and what is said of defaults is true."""

import inspect
import re
import subprocess
import sys
from typing import Any

import jsonargparse
import pytest
from docstring_parser import parse
from lightning.pytorch import Callback, LightningDataModule, LightningModule

import lpl_lightning
from lpl_lightning.callbacks import Evaluation
from lpl_lightning.cli import main
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.options import PRESETS

COMMANDS = ["fit", "validate", "test", "predict", "profile", "sweep", "encode", "replay"]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_key_of_every_public_class_says_what_it_is() -> None:
    public = [getattr(lpl_lightning, name) for name in lpl_lightning.__all__]
    classes = [one for one in public if inspect.isclass(one) and not issubclass(one, BaseException)]
    assert {Callback, LightningModule, LightningDataModule} <= {base for one in classes for base in one.__mro__}
    for one in [*classes, Evaluation]:
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(one, "part")
        silent = [action.dest for action in parser._actions if action.dest.startswith("part.") and not action.help]
        assert not silent, f"{one.__name__} says nothing of {silent}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_group_of_options_has_a_title(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of([command, "--help"], capsys)
    assert "<class" not in said
    heads = re.findall(r"^(\S.*):$", said, re.MULTILINE)
    assert len(heads) == len(set(heads)), "two groups of options have the same title"
    # Options of the command line's own, without a group of a class.
    silent = re.findall(r"^  (--[a-z_]+(?:\.[a-z_]+)?)(?: [A-Z_{][^ ]*)?\n  (?=-)", said, re.MULTILINE)
    assert not silent


def test_models_that_are_offered_are_those_to_train() -> None:
    """And not what they derive from, or what encodes. What other tests import would be offered too in this process."""
    words = [sys.executable, "-m", "lpl_lightning", "fit", "--help"]
    said = "".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    offered = re.search(r"LightningModule\]?,default:null,knownsubclasses:(.*?)\)", said)
    assert offered
    own = {name for name in offered[1].split(",") if name.startswith("lpl_lightning")}
    assert own == {"lpl_lightning.LatentDiffusionModule", "lpl_lightning.AutoencoderModule"}


def test_the_command_says_what_it_and_its_commands_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(help_of(["--help"], capsys).split())
    assert "Latent Perceptual Loss" in said
    assert "command line tool" not in said
    assert "measure them against real ones, and write a report." in said
    for command in COMMANDS:
        assert re.search(rf" {command} [A-Z]", said), f"{command} is not described"


def test_readme_finds_the_losses_keys(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--trainer.callbacks", "LPLCallback", "--trainer.callbacks.loss.help", "LatentPerceptualLoss"]
    said = help_of(words, capsys)
    for name in PRESETS["paper"]:
        assert f"--loss.{name}" in said


def test_what_is_said_of_the_paper_presets_values_is_what_they_are() -> None:
    said: dict[str, str] = {one.arg_name: one.description or "" for one in parse(LatentPerceptualLoss.__doc__).params}
    numbers: dict[str, Any] = {
        name: value for name, value in PRESETS["paper"].items() if isinstance(value, int | float) and value is not True
    } | {"threshold": PRESETS["paper"]["threshold"].nsr}
    assert {"depth", "threshold", "quantile", "erosion"} <= numbers.keys()
    for name, value in numbers.items():
        found = re.search(r"(?:paper's is|[Bb]y default) ([\d.]*\d|not)\b", said[name].replace("\n", " "))
        assert found, f"{name} does not say what it is by default"
        assert found[1] == ("not" if value is False else f"{value}"), name
    for name, value in PRESETS["paper"].items():
        if isinstance(value, str):
            quoted = rf"``{value}``[^`]*?(?:,? ?\(?the (?:paper's|default)|the paper's)"
            assert re.search(quoted, said[name].replace("\n", " ")), f"{name} does not say that it is {value}"
