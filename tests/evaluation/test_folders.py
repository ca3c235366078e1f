"""``lpl evaluate``: two folders in, a report out, and what is refused before time is spent."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from evaluator_ranks import save_tower_config
from forked import LPL, Script
from PIL import Image, ImageFilter
from torch import nn
from torchvision.models import squeezenet1_0
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from lpl_lightning.cli import main
from lpl_lightning.evaluation import Report, SpectrumMetrics, Suite, evaluate_folder
from lpl_lightning.evaluation.feature_metrics import FeatureMetrics
from lpl_lightning.metrics.features import ModuleFeatures

SIDE = 16


class Means(nn.Module):
    """Images to the means of their channels; ``bad`` gives numbers that are none."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * (math.nan if self.bad else 1)


def write(folder: Path, count: int, seed: int, contrast: float = 1.0, side: int = SIDE) -> Path:
    """Smooth random photos."""
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(seed)
    for index in range(count):
        coarse = 127.5 + (drawn.integers(0, 256, (4, 4, 3)) - 127.5) * contrast
        image = Image.fromarray(coarse.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.png")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Arguments that evaluate 50 images against 60 and keep nothing anywhere else."""
    images, real = write(tmp_path / "images", 50, 1, 0.5), write(tmp_path / "real", 60, 2)
    return ["evaluate", str(images), "--reference", str(real), "--cache=false"]


def refusal(args: list[str]) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        main(args)
    said = str(raised.value)
    assert said.count("\n") < 3
    return said


def test_two_folders_in_a_report_out(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(folders)
    out = tmp_path / "images-evaluation"
    assert sorted(file.name for file in out.iterdir()) == [
        *("report.json", "report.md", "samples.safetensors", "spectra.csv", "spectra.png"),
    ]
    report = Report.read(out)
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert next(iter(report.values)) == "spectrum_log_difference"
    assert report.values["spectrum_log_difference"].value > 0.5, "half the contrast, a quarter of the power"
    assert (report.name, report.images["count"], report.reference["count"]) == ("images", 50, 60)
    for about in (report.images, report.reference):
        assert (about["image_size"], about["resize"], about["crop"]) == (SIDE, "none", "none")
    assert report.images["hash"] != report.reference["hash"]
    same = evaluate_folder(
        folders[1], folders[3], out=str(tmp_path / "again"), batch_size=7, num_workers=1, cache=False
    )
    assert same.images["hash"] == report.images["hash"]
    for name, value in report.values.items():
        assert same.values[name].value == pytest.approx(value.value, rel=1e-5)


def test_a_suite_is_a_file_and_a_run_is_its_settings(folders: list[str], tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "class_path: lpl_lightning.evaluation.Suite\n"
        "init_args: {measures: [lpl_lightning.evaluation.SpectrumMetrics]}\n"
    )
    main([*folders, "--suite", str(suite), "--out", str(tmp_path / "deep" / "out")])
    assert all(name.startswith("spectrum") for name in Report.read(tmp_path / "deep" / "out").values)
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        yaml.safe_dump({"images": folders[1], "reference": folders[3], "out": str(tmp_path / "b"), "cache": False})
    )
    main(["evaluate", "--config", str(settings)])
    assert "frechet_wavelet" in Report.read(tmp_path / "b").values


def test_a_folder_against_itself(folders: list[str], tmp_path: Path) -> None:
    report = evaluate_folder(folders[3], folders[3], out=str(tmp_path / "out"), cache=False)
    assert report.images["hash"] == report.reference["hash"]
    assert all(value.value == pytest.approx(0, abs=1e-8) for value in report.values.values())


# What is refused


@pytest.mark.parametrize("outer", ["images", "reference"])
def test_a_folder_within_the_other(tmp_path: Path, outer: str) -> None:
    images = {name: tmp_path / name for name in ("images", "reference")}
    write(images[outer], 50, 1)
    inner = next(name for name in images if name != outer)
    images[inner] = write(images[outer] / "deeper" / "inner", 60, 2)
    out = ["--out", str(tmp_path / "out"), "--cache=false"]
    said = refusal(["evaluate", str(images["images"]), "--reference", str(images["reference"]), *out])
    assert said.startswith(f"{images[inner]} lies in `{outer}`, {images[outer]}, of which its images are a part")
    assert not (tmp_path / "out").exists()


def put(folder: Path, kind: str) -> None:
    """One more image, which is not like the others."""
    path = folder / "odd.png"
    square = Image.new("RGB", (SIDE, SIDE), (10, 20, 30))
    if kind in ("L", "RGBA", "P", "1"):
        square.convert(kind).save(path)
    elif kind == "CMYK":
        square.convert(kind).save(path, "TIFF")
    elif kind == "16":
        Image.fromarray(np.full((SIDE, SIDE), 1000, dtype=np.uint16)).save(path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:400])
    else:
        width, height = kind.split("x")
        square.resize((int(width), int(height))).save(path)


ODD = {
    "L": r"1 of [56]1 images in .* not RGB of 8 bits: odd\.png \(mode L\).*set `convert`",
    "RGBA": r"not RGB of 8 bits: odd\.png \(mode RGBA\).*set `convert`",
    "P": r"not RGB of 8 bits: odd\.png \(mode P\)",
    "1": r"not RGB of 8 bits: odd\.png \(mode 1\)",
    "CMYK": r"not RGB of 8 bits: odd\.png \(mode CMYK\)",
    "16": r"not RGB of 8 bits: odd\.png \(mode I;16\)",
    "empty": r"1 of [56]1 images in .* cannot be read: odd\.png .*Make them anew or remove them",
    "text": r"cannot be read: odd\.png",
    "cut": r"odd\.png cannot be read .*Make it anew or remove it",
    "17x17": r"not squares of one size, which 0\.png with 16 x 16 is: odd\.png with 17 x 17\. Set `image_size`",
    "16x12": r"odd\.png with 16 x 12\. Set `image_size`",
}


@pytest.mark.parametrize("where", ["images", "reference"])
@pytest.mark.parametrize("kind", ODD)
def test_an_image_unlike_the_others_is_named(folders: list[str], tmp_path: Path, kind: str, where: str) -> None:
    put(Path(folders[1 if where == "images" else 3]), kind)
    said = refusal(folders)
    assert said.startswith(f"`{where}`: ")
    assert re.search(ODD[kind], said), said
    assert not (tmp_path / "images-evaluation").exists()


@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "CMYK", "16"])
def test_such_an_image_is_converted_when_asked(folders: list[str], tmp_path: Path, kind: str) -> None:
    put(Path(folders[1]), kind)
    main([*folders, "--convert=true"])
    assert Report.read(tmp_path / "images-evaluation").images["count"] == 51


def test_sizes_are_made_one_when_asked(folders: list[str], tmp_path: Path) -> None:
    put(Path(folders[1]), "40x24")
    main([*folders, "--image_size=32"])
    about = Report.read(tmp_path / "images-evaluation").images
    assert (about["image_size"], about["enlarged"]) == (32, 51)
    assert (about["resize"], about["crop"]) == ("bicubic, antialiased", "middle square")


def test_folders_and_arguments_that_cannot_be(folders: list[str], tmp_path: Path) -> None:
    images, real = folders[1], folders[3]
    (tmp_path / "none").mkdir()
    small = str(write(tmp_path / "small", 60, 3, side=8))
    few = str(write(tmp_path / "few", 1, 3))
    for args, message in (
        ([str(tmp_path / "nowhere"), "--reference", real], "`images` must be a folder of images, but"),
        ([str(tmp_path / "none"), "--reference", real], "`images` must hold images, but"),
        ([images, "--reference", str(tmp_path / "nowhere")], "`reference` must be a folder of images, but"),
        ([images], "`reference` must be given: a folder of real images, as in --reference FOLDER"),
        ([small, "--reference", real], "`images` are of 8 px, `reference` of 16 px"),
        ([few, "--reference", real], "48 images or more, got 1 generated"),
        ([images, "--reference", few], "48 images or more, got 1 real"),
        ([images, "--reference", real, "--batch_size=0"], "`batch_size` must be 1 or more, got 0"),
        ([images, "--reference", real, "--device=nowhere"], "`device`='nowhere' cannot be used"),
        ([images, "--reference", real, "--device=meta"], "`device`='meta' cannot be used: it computes nothing"),
        ([images, "--reference", real, "--image_size=0"], "`image_size` must be 1 or more, got 0"),
    ):
        assert message in refusal(["evaluate", *args, "--cache=false"])
    assert not list(tmp_path.glob("*-evaluation"))


def test_the_report_of_another_set_is_kept(folders: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    main([*folders, *out])
    before = (tmp_path / "out" / "report.json").read_bytes()
    said = refusal(["evaluate", folders[3], "--reference", folders[1], *out, "--cache=false"])
    assert "`out`: " in said
    assert f"holds the report of {folders[1]}. Give another folder, or delete it" in said
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    main([*folders, *out])  # its own is written anew


def test_a_report_that_was_made_otherwise_is_kept(folders: list[str], tmp_path: Path) -> None:
    """With another suite, reference or number of images; its own is written anew."""
    main(folders)
    out = tmp_path / "images-evaluation"
    before = (out / "report.json").read_bytes()
    other = str(write(tmp_path / "other", 60, 9))
    suite = "{class_path: lpl_lightning.evaluation.Suite, init_args: {measures: [%s]}}"
    for args, differ in (
        ([*folders, "--suite", suite % "lpl_lightning.evaluation.SpectrumMetrics"], "suite"),
        ([*folders[:3], other, "--cache=false"], "reference"),
        ([*folders, "--image_size=8"], "image_size, suite"),
    ):
        said = refusal(args)
        assert f"`out`: {out} holds a report that was made otherwise ({differ}; see `made` in report.json)" in said
        assert (out / "report.json").read_bytes() == before
    (Path(folders[1]) / "50.png").write_bytes((Path(folders[1]) / "1.png").read_bytes())
    assert "(generated;" in refusal(folders)
    (Path(folders[1]) / "50.png").unlink()
    main(folders)


def test_a_report_among_the_images_is_refused(folders: list[str], tmp_path: Path) -> None:
    for argument, folder in (("images", folders[1]), ("reference", folders[3])):
        for out in (folder, f"{folder}/report", f"{tmp_path}/x/../{Path(folder).name}"):
            said = refusal([*folders, "--out", out])
            assert f"lies in `{argument}`, {folder}, of which its plots would be images" in said
    (tmp_path / "link").symlink_to(folders[1])
    assert "lies in `images`" in refusal([*folders, "--out", str(tmp_path / "link" / "out")])
    assert not (tmp_path / "images" / "report").exists()


def test_a_folder_that_cannot_be_made_is_refused_at_once(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("lpl_lightning.evaluation.folders.Evaluator", None)  # nothing is measured
    for out in ("file", "file/below/it"):
        said = refusal([*folders, f"--out={tmp_path}/{out}"])
        assert f"`out` must be a folder, but {tmp_path / 'file'} is a file" in said


def test_the_images_may_stand_after_options(folders: list[str], tmp_path: Path) -> None:
    _, images, *rest = folders
    main(["evaluate", *rest, "--batch_size", "7", images])
    main(["evaluate", "--device=cpu", images, *rest])
    assert Report.read(tmp_path / "images-evaluation").images["count"] == 50
    said = refusal(["evaluate", images, *rest, str(tmp_path / "real")])
    assert f"`lpl evaluate` takes one folder, that of the images, got {images} {tmp_path / 'real'}" in said


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("{class_path: lpl_lightning.evaluation.Suite, init_args: {measure: []}}", "measure"),
        (
            "{class_path: lpl_lightning.evaluation.Suite, init_args: {measures: [lpl_lightning.FIDMetrics]}}",
            "FIDMetrics",
        ),
    ],
)
def test_a_suite_that_is_none(folders: list[str], suite: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*folders, "--suite", suite])
    assert message in capsys.readouterr().err


def test_numbers_that_are_none_are_refused(folders: list[str], tmp_path: Path) -> None:
    suite = Suite([FeatureMetrics(ModuleFeatures(Means()), "x", kernel=False), SpectrumMetrics()])
    out = str(tmp_path / "out")
    assert evaluate_folder(folders[1], folders[3], suite, out, cache=False).values["frechet_x"].value > 0
    measure = FeatureMetrics(ModuleFeatures(Means()), "x", kernel=False)
    network: Any = measure.extractor.get_submodule("module")
    network.bad = True
    with pytest.raises(ValueError, match=r"x, real: .*NaN|not finite"):
        evaluate_folder(folders[1], folders[3], Suite([measure]), str(tmp_path / "bad"), cache=False)
    assert not (tmp_path / "bad").exists()


def test_no_network_for_weights_is_one_clear_error(folders: list[str], tmp_path: Path) -> None:
    """In a process of its own, with the proxy at a port where nobody listens."""
    environment = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    words = [*folders, "--suite", ROOT / "configs/metrics/paper.yaml"]
    done = Script(LPL, *words, **environment, TORCH_HOME=str(tmp_path / "torch")).end()
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert "weights-inception-2015-12-05-6726825d.pth cannot be downloaded" in said
    assert f"Without network: download it elsewhere, and put it at {tmp_path / 'torch'}" in said
    assert "or give its path as `weights`" in said
    assert not (tmp_path / "images-evaluation").exists()


# The suites that ship


def with_random_weights(config: Any, tmp_path: Path) -> Any:
    """A suite's config whose networks are the same classes, small or with random weights."""
    found = json.loads(json.dumps(config))
    for measure in found["init_args"]["measures"]:
        settings = measure.setdefault("init_args", {})
        if "extractor" in settings or "Wavelet" in measure["class_path"]:
            settings |= {"allow_few": True}
        if "extractor" in settings:
            of = settings["extractor"]
            if of["class_path"].endswith("InceptionFeatures"):
                of["init_args"] |= {"weights": "random:"}
            else:
                folder = tmp_path / "dinov2"
                folder.mkdir()
                (folder / "config.json").write_text(
                    json.dumps(
                        {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
                    )
                )
                (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 28, "width": 28}}))
                of["init_args"] |= {"model": f"random:{folder}"}
        if "score" in settings:
            settings["score"]["init_args"] = {"model_name": save_tower_config(tmp_path / "tower")}
    return found


NAMES = {
    "paper": [
        *("fid", "inception_score", "kid", "precision_inception", "recall_inception", "density_inception"),
        *("coverage_inception", "frechet_dinov2", "kernel_dinov2", "precision_dinov2", "recall_dinov2"),
        *("density_dinov2", "coverage_dinov2", "spectrum_log_difference", "spectrum_error_low"),
        *("spectrum_error_middle", "spectrum_error_high", "frechet_wavelet"),
    ],
    "captions": [
        *("clip_score", "spectrum_log_difference", "spectrum_error_low", "spectrum_error_middle"),
        *("spectrum_error_high", "frechet_wavelet"),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_suites(tmp_path: Path, name: str) -> None:
    images, real = write(tmp_path / "images", 8, 1, 0.5), write(tmp_path / "real", 9, 2)
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text(f"photo {path.stem}")
    config = yaml.safe_load((ROOT / "configs" / "metrics" / f"{name}.yaml").read_text())
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(with_random_weights(config, tmp_path)))
    main(["evaluate", str(images), "--reference", str(real), "--cache=false", "--suite", str(suite)])
    report = Report.read(tmp_path / "images-evaluation")
    assert list(report.values) == NAMES[name]
    for value in report.values.values():
        assert math.isfinite(value.value)
        assert value.provenance["generated"] == 8
    assert sorted(path.stem for path in (ROOT / "configs" / "metrics").iterdir()) == sorted(NAMES)


@pytest.mark.slow
def test_real_photos_by_a_real_network(shared: Path, tmp_path: Path) -> None:
    """Blurred photos are told from photos, by the distance that scipy gives of features taken without the package."""
    weights = shared / "weights" / "squeezenet1_0_imagenet" / "squeezenet1_0_fp16.pth"
    archive = shared / "data" / "clothing64.zip"
    if not weights.is_file() or not archive.is_file():
        pytest.skip("../shared has no squeezenet1_0_imagenet or no clothing64.zip")
    linalg: Any = pytest.importorskip("scipy.linalg")
    with zipfile.ZipFile(archive) as file:
        photos = [name for name in sorted(file.namelist()) if name.endswith((".jpg", ".png", ".webp"))]
        for index, name in enumerate(photos[::50][:50]):
            file.extract(name, tmp_path / "all")
            with Image.open(tmp_path / "all" / name) as photo:
                for folder, image in (("real", photo), ("blurred", photo.filter(ImageFilter.GaussianBlur(1)))):
                    (tmp_path / folder).mkdir(exist_ok=True)
                    image.convert("RGB").save(tmp_path / folder / f"{index}.png")
    config = yaml.safe_load(
        (ROOT / "lpl_lightning/evaluation/README.md").read_text().split("```yaml")[-1].split("```")[0]
    )
    settings = config["init_args"]["measures"][0]["init_args"]
    assert settings["name"] == "squeezenet"
    settings["extractor"]["init_args"]["weights"] = str(weights)
    settings |= {"allow_few": True, "kernel": False}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(config))
    main(
        ["evaluate", str(tmp_path / "blurred"), "--reference", str(tmp_path / "real")]
        + ["--suite", str(tmp_path / "suite.yaml"), "--cache=false"]
    )
    report = Report.read(tmp_path / "blurred-evaluation")

    network = squeezenet1_0()
    network.load_state_dict({key: value.float() for key, value in torch.load(weights, weights_only=True).items()})
    network.eval()

    def features(folder: Path) -> Any:
        found = []
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                bytes_ = resize(pil_to_tensor(image).float(), [227, 227], antialias=True)
            less_mean = bytes_ - torch.tensor([123.0, 117.0, 104.0])[:, None, None]
            with torch.no_grad():
                found.append(network.features(less_mean[None]).mean((2, 3))[0].double().numpy())
        return np.stack(found)

    one, two = features(tmp_path / "blurred"), features(tmp_path / "real")
    a, b = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    # The trace of the root of a b, whose eigenvalues are not negative, by scipy's general eigenvalues.
    cross = np.sqrt(linalg.eigvals(a @ b).real.clip(0)).sum()
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert report.values["frechet_squeezenet"].value == pytest.approx(expected, rel=1e-2)
    assert report.values["recall_squeezenet"].value < 0.9
    assert report.values["spectrum_error_high"].value > report.values["spectrum_error_low"].value
