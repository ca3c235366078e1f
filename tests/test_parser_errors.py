"""What the command line says of values that an option does not take."""

from __future__ import annotations

import pytest
from conftest import ROOT

from lpl_lightning.cli import main

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
