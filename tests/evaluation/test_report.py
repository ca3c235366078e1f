from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lpl_lightning.evaluation.report import REPORT, Report, Resampling, Value, formatted, write_whole

MADE = {
    "class": "InceptionFeatures",
    "model": "inception-v3-compat 2048",
    "weights": "0123456789abcdef",
    "resize": "bilinear of TensorFlow 1, stretch",
    "antialias": False,
    "generated": 5000,
    "real": 4000,
}


def report(**overrides: Any) -> Report:
    values = {
        "fid": Value(
            12.3456,
            "lower",
            MADE,
            resampling=Resampling("frechet", "features_inception"),
            biased_by=("generated", "real"),
        ),
        "inception_score": Value(9.1, "higher", MADE, std=0.25),
        "density_x": Value(0.5, "higher", {}, resampling=Resampling("mean", "density_x", "real", 0.2)),
        "psnr": Value(math.inf, None, {}),
        "less": Value(-math.inf, None, {}, std=math.nan),
        "lost": Value(math.nan, "lower", {"model": "a|b"}),
    }
    given: dict[str, Any] = {
        "name": "Häuser 图",
        "values": values,
        "images": {"folder": "x", "count": 5000, "image_size": 64, "hash": "aaaa1111"},
        "reference": {"name": "photos", "count": 4000, "hash": "bbbb2222"},
        "generation": {"seed": 3, "guidance": None, "ema": 0.999},
        "versions": {"torch": "2.9.1"},
        "notes": ["spectra.png is not there."],
    }
    return Report(**(given | overrides))


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report()
    path = written.write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / REPORT
    for place in (path, str(path), path.parent):
        found = Report.read(place)
        assert math.isnan(found.values["lost"].value)
        lost_spread = found.values["less"].std
        assert lost_spread is not None
        assert math.isnan(lost_spread)
        assert str(found) == str(written)  # NaN is unequal to itself
        for name in ("fid", "inception_score", "density_x", "psnr"):
            assert found.values[name] == written.values[name]
        assert found.values["fid"].biased_by == ("generated", "real")
        assert found.values["density_x"].resampling == Resampling("mean", "density_x", "real", 0.2)
    # Any reader of JSON takes it: no NaN or Infinity, which the format lacks.
    json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert Report.read(Report("bare", {}).write(tmp_path / "bare")) == Report("bare", {})


def test_people_read_all_of_it(tmp_path: Path) -> None:
    report().write(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Häuser 图\n")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert set(rows) == {"value", "fid", "inception_score", "density_x", "psnr", "less", "lost"}
    for said in (
        *("12.35", "lower", "class InceptionFeatures", "model inception-v3-compat 2048", "weights 0123456789abcdef"),
        *("resize bilinear of TensorFlow 1, stretch", "antialias false", "generated 5000", "real 4000"),
    ):
        assert said in rows["fid"]
    assert "9.1 ± 0.25 | higher" in rows["inception_score"]
    assert "±" not in rows["fid"]
    assert "| inf |  |" in rows["psnr"]
    assert "-inf ± nan" in rows["less"]
    assert "model a\\|b" in rows["lost"]  # or else the table would have a column more
    for said in (
        *("## Images", "- folder: x", "- count: 5000", "- image_size: 64", "- hash: aaaa1111"),
        *("## Reference", "- name: photos", "- count: 4000", "- hash: bbbb2222"),
        *("## Generation", "- seed: 3", "- guidance: null", "- ema: 0.999"),
        *("## Versions", "- torch: 2.9.1", "## Notes", "- spectra.png is not there."),
    ):
        assert said in text.splitlines()
    assert "##" not in Report("bare", {}).markdown()


def test_numbers_have_four_digits_that_count() -> None:
    assert [formatted(value) for value in (0.000123456, 12.3456, 999.94, 1000.04, 51734.26, -2e6, math.inf)] == [
        *("0.0001235", "12.35", "999.9", "1000.0", "51734.3", "-2000000.0", "inf")
    ]


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no .*report\.json: make one by `lpl test` or"):
        Report.read(tmp_path)
    whole = report().as_dict()
    for broken in (
        "{",
        "[]",
        "\udcff",
        json.dumps(whole | {"format": "lpl_lightning evaluation 0"}),
        json.dumps({key: said for key, said in whole.items() if key != "format"}),
        json.dumps({key: said for key, said in whole.items() if key != "values"}),
        json.dumps(whole | {"unknown": 1}),
        json.dumps(whole | {"values": {"fid": {"value": 1.0}}}),
        json.dumps(whole | {"values": {"fid": whole["values"]["fid"] | {"value": None}}}),
        json.dumps(whole | {"values": {"fid": whole["values"]["fid"] | {"resampling": {"kind": "mean"}}}}),
    ):
        (tmp_path / REPORT).write_bytes(broken.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"report\.json is no report as this version writes it"):
            Report.read(tmp_path)


def test_a_report_of_an_earlier_version_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """It says of no value what it is biased by, and its SSIM is of another range."""
    whole = report().as_dict()
    values = {
        name: {key: said for key, said in value.items() if key != "biased_by"}
        for name, value in whole.pop("values").items()
    }
    old = whole | {"format": "lpl_lightning evaluation 1", "values": values}
    (tmp_path / REPORT).write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match="`format` is 'lpl_lightning evaluation 1', not .* 2'; evaluate the images again"
    ):
        Report.read(tmp_path)


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.json", "report.md"}
    with pytest.raises(TypeError):  # what JSON cannot hold
        report(images={"folder": object()}).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    texts = ["a" * 3_000_000, "b" * 3_000_000]
    write_whole(tmp_path / "x", texts[0])
    done = threading.Event()
    found = set()

    def read() -> None:
        while not done.is_set():
            found.add((tmp_path / "x").read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        assert write_whole(tmp_path / "x", texts[turn % 2]) == tmp_path / "x"
    done.set()
    reader.join()
    assert found <= set(texts)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "x"}


def test_two_who_write_at_once_do_not_meet(tmp_path: Path) -> None:
    """Also where both have one process id, as on two machines that share a file system."""
    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(write_whole, tmp_path / "x", letter * 100_000) for letter in "ab" * 200]:
            written.result()
    assert {path.name for path in tmp_path.iterdir()} == {"x"}
    assert set((tmp_path / "x").read_text()) in ({"a"}, {"b"})
