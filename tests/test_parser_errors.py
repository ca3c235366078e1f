"""What the command line says of values that an option does not take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from torch import nn

from lpl_lightning.cli import main
from lpl_lightning.parser_errors import plain_error

LOSS = "trainer.callbacks.loss"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("trainer.max_steps", "soon", "`trainer.max_steps`: expected a value of type int, got soon."),
        (
            "trainer.callbacks.weight",
            "heavy",
            "`trainer.callbacks.weight`: expected a value of type float or 'auto', got heavy.",
        ),
        (
            f"{LOSS}.init_args.threshold",
            "inf",
            f"`{LOSS}.threshold`: expected a value of type float, got inf; in YAML it is written .inf.",
        ),
        (
            f"{LOSS}.init_args.threshold",
            "{nsr: low}",
            f"`{LOSS}.threshold.nsr`: expected a value of type float, got low.",
        ),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), f"--{option}", value])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lpl: error: {said}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "model.sampler.num_stepz",
            "`model.sampler`: lpl_lightning.Sampler: Option 'num_stepz' is not accepted. Did you mean num_steps?",
        ),
        (
            f"{LOSS}.init_args.treshold",
            f"`{LOSS}`: lpl_lightning.LatentPerceptualLoss: Option 'treshold' is not accepted. Did you mean threshold?",
        ),
        ("trainer.max_stepz", "unrecognized arguments: --trainer.max_stepz 3. Did you mean --trainer.max_steps?"),
        (
            "data.root",
            "`data`: lpl_lightning.data.ShapesDataModule: Option 'root' is not accepted. It takes image_size, "
            "train_images, val_images, batch_size, num_workers, seed, num_generate, generate_seed, prompts.",
        ),
    ],
)
def test_an_option_that_there_is_not_is_answered_with_those_there_are(
    option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), f"--{option}", "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lpl: error: {said}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["evaluate", "made", "--reference=made", "--btch_size=3"], "Did you mean --batch_size?"),
        (
            ["evaluate", "made", "--reference=made", "--batch_size=few"],
            "`batch_size`: expected a value of type int, got few.",
        ),
        (["export", "--out=made"], "missing: --ckpt"),
        (["evalute", "made"], "there is no command evalute. Did you mean evaluate?"),
        (
            ["measure", "made"],
            "there is no command measure; there are fit, validate, test, predict, profile, sweep, "
            "encode, replay, export, evaluate, compare, caption",
        ),
        (["--config=tiny.yaml", "export"], "`lpl export` takes its options after its name"),
        (
            [],
            "name a command: fit, validate, test, predict, profile, sweep, encode, replay, export, evaluate, "
            "compare, caption",
        ),
        (["validate", "--ema=average"], "`ema`: expected a value of type float or 'trained', got average."),
        (
            ["fit", f"--{LOSS}.init_args.mask_source=neat"],
            f"`{LOSS}.mask_source`: expected one of 'predicted', 'target', got neat.",
        ),
    ],
)
def test_what_is_mistyped_is_answered_in_one_line(
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By commands without a trainer too, which are not LightningCLI's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("trainer: {max_steps: 3}")
    if given[:1] in (["fit"], ["validate"]):
        given = [*given[:1], "-c", str(ROOT / "configs" / "quickstart.yaml"), *given[1:]]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("lpl: error: ")
    assert error[0].endswith(said)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"class_path": "diffusers.AutoencoderKL", "init_args": {"norm_num_groups": 5}},
            r"^num_channels \(64\) must be divisible by num_groups \(5\)$",
        ),
        ({"class_path": "test_parser_errors.Refusing"}, r"^`width` must be even, got 3\.$"),
        ({"class_path": "test_parser_errors.Mistaken"}, rf"^KeyError in .*{Path(__file__).name}, line \d+: 'width'\."),
    ],
)
def test_what_a_described_part_says_is_heard_where_it_could_be_a_path_too(model: dict[str, Any], said: str) -> None:
    """And not what the parser says of the other kinds that it might have been."""
    with pytest.raises(ValueError, match=said):
        main(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), f"--model.autoencoder.model={json.dumps(model)}"])


class Refusing(nn.Module):
    def __init__(self) -> None:
        raise ValueError("`width` must be even, got 3.")


class Mistaken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        given: dict[str, int] = {}
        self.width = given["width"]


@pytest.mark.parametrize("option", ["-c", "--config", "--suite"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "metrics:\n  a: [1\n  b: 2\n",
            "{path}, line 3: expected ',' or ']', but got ':', while parsing a flow sequence.",
        ),
        (
            "a: 1\n\tb: 2\n",
            "{path}, line 2: found character '\\t' that cannot start any token, while scanning for the next token.",
        ),
        ("some words\n", "{path} must hold keys and their values, such as `trainer: {{max_steps: 100}}`."),
        (b"\xff\xfe", "{path} is no YAML: "),
    ],
)
def test_a_file_that_no_parser_reads_is_named_with_the_line(
    option: str, text: str | bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    command = ["evaluate", "--images=made", "--reference=made"] if option == "--suite" else ["fit"]
    with pytest.raises(ValueError, match=re.escape(said.format(path=path))):
        main([*command, option, str(path)])


@pytest.mark.parametrize(("command", "key"), [("test", "evaluation"), ("validate", "validation")])
def test_an_evaluation_in_training_is_refused_where_there_is_none(command: str, key: str, tmp_path: Path) -> None:
    """It would evaluate nothing, and say nothing."""
    base = [command, "-c", str(ROOT / "configs" / "quickstart.yaml"), "-c", str(ROOT / "configs" / "tiny.yaml")]
    with pytest.raises(ValueError, match=rf"`{key}\.every_n_steps` evaluates during training, which `lpl {command}`"):
        main([*base, f"--trainer.default_root_dir={tmp_path}", f"--{key}.every_n_steps=5"])


class Base:
    def __init__(self, depth: int, width: int) -> None: ...


class Passing(Base):
    def __init__(self, name: str, **options: int) -> None:
        super().__init__(**options)


class Closed(Base):
    def __init__(self, name: str) -> None: ...


@pytest.mark.parametrize(("part", "taken"), [("Passing", "name, depth, width"), ("Closed", "name")])
def test_options_that_a_class_hands_on_are_its_own(part: str, taken: str) -> None:
    message = f"""Parser key "model":
  Problem with given class_path '{__name__}.{part}':
    Option 'lr' is not accepted"""
    assert plain_error(message) == f"`model`: {__name__}.{part}: Option 'lr' is not accepted. It takes {taken}."
