"""What the command line says of values that an option does not take."""

from __future__ import annotations

import pytest
from conftest import ROOT

from lpl_lightning.cli import main
from lpl_lightning.parser_errors import plain_error

LOSS = "trainer.callbacks.loss"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("trainer.max_steps", "soon", "`trainer.max_steps`: expected a value of type int, got soon."),
        ("trainer.callbacks.weight", "heavy", "`trainer.callbacks.weight`: expected a value of type float, got heavy."),
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
