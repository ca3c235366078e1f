"""The same photos as a folder, a Hugging Face data set and tar shards give the same batches."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_kl, tiny_sd3
from PIL import Image
from shard_files import bare_tar, photo, png
from torch import Tensor

from lpl_lightning import Autoencoder, ClassTokens, FlowMatching, LatentDiffusionModule
from lpl_lightning.data import (
    HuggingFaceDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    LatentCacheDataModule,
    WebDatasetDataModule,
)
from lpl_lightning.data.latent_shards import LatentShard
from lpl_lightning.encoding import EncodingTrainer

datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")
Make = Callable[[Path, Path], ImageDataModule]
COMMON: dict[str, Any] = {"image_size": 16, "batch_size": 8, "num_workers": 0}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def folder_module(root: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, val_root=root, verify=False, **COMMON)


def in_order(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The photos as the folder's module validates on them, and the classes."""
    data = folder_module(root)
    return [(Path(path), int(label or 0)) for path, label in data.dataset("val").files], data.class_names


def rows(root: Path, to: Path) -> dict[str, Any]:
    files, classes = in_order(root)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    found = [{"image": {"bytes": path.read_bytes(), "path": None}, "label": label} for path, label in files]
    to.mkdir()
    half = len(found) // 2
    for shard, part in enumerate((found[:half], found[half:])):
        datasets.Dataset.from_list(part, features=features).to_parquet(to / f"{shard}.parquet")
    return {"path": "parquet", "data_files": str(to / "*.parquet"), "label": "label", "val_split": "train"}


def as_table(root: Path, to: Path) -> ImageDataModule:
    return HuggingFaceDataModule(**rows(root, to), **COMMON)


def as_stream(root: Path, to: Path) -> ImageDataModule:
    return HuggingFaceDataModule(**rows(root, to), streaming=True, **COMMON)


def as_image_folder(root: Path, to: Path) -> ImageDataModule:
    files = str(root / "**")
    return HuggingFaceDataModule("imagefolder", data_files=files, label="label", val_split="train", **COMMON)


def as_shards(root: Path, to: Path) -> ImageDataModule:
    files, classes = in_order(root)
    to.mkdir()
    half = len(files) // 2
    for shard, part in enumerate((files[:half], files[half:])):
        members = [
            (f"{shard}-{number:04}{ending}", data)
            for number, (path, label) in enumerate(part)
            for ending, data in ((path.suffix, path.read_bytes()), (".cls", classes[label].encode()))
        ]
        (to / f"{shard}.tar").write_bytes(bare_tar(members))
    urls = str(to / "{0..1}.tar")
    return WebDatasetDataModule(urls, val_urls=urls, label="cls", classes=list(classes), **COMMON)


SOURCES = [as_table, as_stream, as_image_folder, as_shards]


def assert_same(batch: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert batch.keys() == other.keys() == {"image", "label", "original_size", "crop_top_left"}
    for key in batch:
        assert batch[key].dtype == other[key].dtype
        assert torch.equal(batch[key], other[key]), key


def real_photos(shared: Path, to: Path) -> Path:
    archive = shared / "data" / "clothing64.zip"
    if not archive.is_file():
        pytest.skip("no clothing64.zip in ../shared/data: real photos are not at hand")
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.startswith("test/")][::12]
        files.extractall(to, names)
    return to / "test"


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_real_photos(shared: Path, tmp_path: Path, make: Make) -> None:
    root = real_photos(shared, tmp_path)
    first, *_ = folder_module(root).val_dataloader()
    other, *_ = make(root, tmp_path / "made").val_dataloader()
    assert len(first["label"].unique()) > 2
    assert_same(first, other)


def odd_photos() -> dict[str, bytes]:
    """An image of each mode, most of which decoders give as something other than upright RGB."""
    image, grey = photo(0, (24, 18)), photo(1, (24, 18)).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    alpha = image.convert("RGBA")
    alpha.putalpha(grey)
    deep = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (18, 24), dtype=np.uint16))
    return {
        "turned.jpg": png(image, "JPEG", exif=exif),
        "palette.png": png(image.quantize(16)),
        "alpha.png": png(alpha),
        "grey.png": png(grey),
        "grey_alpha.png": png(alpha.convert("LA")),
        "deep.png": png(deep),
        "cmyk.jpg": png(image.convert("CMYK"), "JPEG"),
        "plain.webp": png(image, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_images_of_all_modes(tmp_path: Path, make: Make) -> None:
    for number, (name, content) in enumerate(odd_photos().items()):
        path = tmp_path / "photos" / f"class {number % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (first,) = folder_module(tmp_path / "photos").val_dataloader()
    (other,) = make(tmp_path / "photos", tmp_path / "made").val_dataloader()
    assert_same(first, other)
    sizes = sorted(map(tuple, other["original_size"].tolist()))
    assert sizes == [(18, 24)] * 7 + [(24, 18)], "the turned one is upright"


@pytest.mark.parametrize("make", [None, as_table, as_stream, as_shards], ids=["folder", "table", "stream", "shards"])
def test_a_cache_of_latents_gives_the_latents_of_the_same_first_batch(
    shared: Path, tmp_path: Path, make: Make | None
) -> None:
    """Real photos and a real autoencoder, from the folder and the others."""
    root = real_photos(shared, tmp_path / "photos")
    data = folder_module(root) if make is None else make(root, tmp_path / "made")
    autoencoder = Autoencoder(str(shared / "weights" / "taesd3"))
    classes = ClassTokens(data.num_classes, token_dim=8, pooled_dim=8)
    module = LatentDiffusionModule(autoencoder, FlowMatching(), tiny_sd3(), classes)
    run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    out = run.encode(module, data, str(tmp_path / "latents"), splits=("val",), dtype="float32", shard_size=11)
    found = next(iter(LatentCacheDataModule(out, batch_size=8).val_dataloader()))
    expected = next(iter(folder_module(root).val_dataloader()))
    torch.testing.assert_close(found["latent"], autoencoder.encode(expected["image"]), rtol=1e-4, atol=1e-4)
    for key in ("label", "original_size", "crop_top_left"):
        assert torch.equal(found[key], expected[key])


@pytest.mark.parametrize("make", [as_table, as_stream, as_shards], ids=lambda make: make.__name__)
def test_loader_processes_encode_the_same(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All training images once, in crops and mirrored, from streams too, of which each process reads a part."""
    monkeypatch.setitem(COMMON, "crop", "random")
    monkeypatch.setitem(COMMON, "horizontal_flip", True)
    for number in range(30):
        for root, first in (("photos", 0), ("others", 30)):
            path = tmp_path / root / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(photo(first + number, (24, 18))))
    found = []
    for workers in (0, 2):
        data: Any = make(tmp_path / "photos", tmp_path / f"made{workers}")
        data.num_workers = workers
        torch.manual_seed(0)
        parts: Any = (FlowMatching(), tiny_sd3(), ClassTokens(2, token_dim=8, pooled_dim=8))
        module = LatentDiffusionModule(Autoencoder(tiny_kl()), *parts)
        run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        out = run.encode(module, data, str(tmp_path / str(workers)), ("train",), shard_size=8, crops=2)
        dataset = LatentCacheDataModule(out).dataset("train")
        keys = [
            dataset.shard(n).item(row)["key"] for n in range(len(dataset.paths)) for row in range(len(dataset.shard(n)))
        ]
        assert len(set(keys)) == len(keys) == 30
        found.append([path.read_bytes() for path in sorted(out.rglob("*.tar"))])
        assert dataset.shard(0).tensors["latent"].shape[1] == 4
    assert found[0] == found[1]
    assert len(found[0]) == 4
    # As many images of the same names are others.
    shutil.rmtree(tmp_path / "made2")
    data = make(tmp_path / "others", tmp_path / "made2")
    with pytest.raises(ValueError, match=r"begun with other settings \(data\.train\.(contents|names) [^;]*\)"):
        run.encode(module, data, str(tmp_path / "2"), ("train",), shard_size=8, crops=2)


@pytest.mark.parametrize("images_per_epoch", [5, 50])
@pytest.mark.parametrize("make", [as_stream, as_shards], ids=lambda make: make.__name__)
def test_each_image_of_a_stream_is_encoded_once(tmp_path: Path, make: Make, images_per_epoch: int) -> None:
    """However many an epoch has, also where the data were looked at before."""
    for number in range(20):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(photo(number, (24, 18))))
    data: Any = make(tmp_path / "photos", tmp_path / "made")
    data.images_per_epoch = images_per_epoch
    assert len(data.dataset("train")) == images_per_epoch
    parts: Any = (FlowMatching(), tiny_sd3(), ClassTokens(2, token_dim=8, pooled_dim=8))
    run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    out = run.encode(LatentDiffusionModule(Autoencoder(tiny_kl()), *parts), data, str(tmp_path / "out"))
    for split in ("train", "val"):
        (shard,) = LatentCacheDataModule(out).dataset(split).paths
        keys = [LatentShard(shard).item(row)["key"] for row in range(len(LatentShard(shard)))]
        assert len(set(keys)) == len(keys) == 20


def test_an_encoding_goes_on_with_the_same_table_alone(tmp_path: Path) -> None:
    """Where it lies does not matter, but another of as many rows is refused."""

    def encoded(name: str, first: int) -> dict[str, bytes]:
        root = tmp_path / f"{name} photos"
        for number in range(12):
            (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            (root / "ab"[number % 2] / f"{number:02}.png").write_bytes(png(photo(first + number, (24, 18))))
        torch.manual_seed(0)
        parts: Any = (FlowMatching(), tiny_sd3(), ClassTokens(2, token_dim=8, pooled_dim=8))
        module = LatentDiffusionModule(Autoencoder(tiny_kl()), *parts)
        run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        run.encode(module, as_table(root, tmp_path / name), str(tmp_path / "out"), ("train",), shard_size=5)
        return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.tar")}

    whole = encoded("one", 0)
    assert len(whole) == 3
    next((tmp_path / "out").rglob("*.tar")).unlink()
    with pytest.raises(ValueError, match="holds a cache that was begun with other settings"):
        encoded("other", 1)
    assert encoded("moved", 0) == whole
