from __future__ import annotations

import copy
import json
import math
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from forked import Script, run_script
from lightning.pytorch.callbacks import Callback
from PIL import Image
from test_captions import Letters
from test_module import trainer
from torch import Tensor

from lpl_lightning import Autoencoder, Captions, ClassTokens, LatentDiffusionModule, LossByNoise, LPLCallback
from lpl_lightning.agreement import check_encoded
from lpl_lightning.cli import main
from lpl_lightning.data import AspectBuckets, ImageFolderDataModule, LatentCacheDataModule, ShapesDataModule
from lpl_lightning.data.batches import Request
from lpl_lightning.data.faults import read_faults
from lpl_lightning.data.latent_shards import LatentShard
from lpl_lightning.data.reading import load_rgb
from lpl_lightning.encoding import EncodingTrainer
from lpl_lightning.losses import LatentPerceptualLoss

MakeModule = Callable[..., LatentDiffusionModule]


def photos_in(root: Path, count: int = 30, side: tuple[int, int] = (21, 16)) -> Path:
    """Noise of two classes; wider than high, so that crops differ."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)).save(path)
    return root


def folder_data(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, 16, **({"batch_size": 4, "num_workers": 0, "val_fraction": 0.2} | options))


def encode(module: LatentDiffusionModule, data: Any, out: Path, **options: Any) -> Path:
    # A config may limit what it predicts, which is no limit here.
    run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_predict_batches=1)
    return run.encode(module, data, str(out), **options)


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        names = ("loss", "loss_diffusion", "loss_lpl")
        self.found.append({name: float(trainer.callback_metrics[name]) for name in names})


def trained(module: LatentDiffusionModule, data: Any, folder: Path) -> tuple[list[dict[str, float]], list[Tensor], Any]:
    losses = Losses()
    lpl = LPLCallback(loss=lambda autoencoder: LatentPerceptualLoss(autoencoder, reference_side=0, mask_outliers=False))
    torch.manual_seed(3)
    run = trainer(folder, callbacks=[lpl, losses], max_steps=7, max_epochs=-1, limit_val_batches=1.0)
    run.fit(module, data)
    (validation,) = run.validate(module, data, verbose=False)
    return losses.found, [parameter.detach().clone() for parameter in module.parameters()], validation


@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_latents_equals_training_from_images(
    make_module: MakeModule, tmp_path: Path, workers: int
) -> None:
    """The same seeds, the posterior's mean and no augmentation: the same losses, LPL's too, and the same weights."""
    photos = photos_in(tmp_path / "photos")

    def module() -> LatentDiffusionModule:
        torch.manual_seed(0)
        return make_module(
            autoencoder=Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1), sample_posterior=False),
            conditioner=ClassTokens(2, token_dim=8, pooled_dim=8),
        )

    encode(module(), folder_data(photos), tmp_path / "cache", dtype="float32", shard_size=7)
    cached = LatentCacheDataModule(tmp_path / "cache", batch_size=4, num_workers=workers)
    assert cached.class_names == ("a", "b")
    expected = trained(module(), folder_data(photos), tmp_path / "images")
    found = trained(module(), cached, tmp_path / "latents")
    assert len(found[0]) == 7
    assert any(step["loss_lpl"] > 0 for step in found[0])
    for one, other in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one_weight, other_weight in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one_weight, other_weight, rtol=1e-3, atol=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-4)


def test_latents_are_the_posteriors_moments_of_the_images(make_module: MakeModule, tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos", 10)
    module = make_module()
    encode(module, folder_data(photos), tmp_path / "cache", dtype="float32", shard_size=4)
    dataset = LatentCacheDataModule(tmp_path / "cache").dataset("train")
    images = folder_data(photos, verify=False).dataset("train")
    assert len(dataset) == len(images) > 4
    model: Any = module.autoencoder.model
    for index in range(len(images)):
        item, image = dataset[index], images[index]
        with torch.no_grad():
            posterior = model.encode(image["image"][None]).latent_dist
        torch.testing.assert_close(item["latent"], (posterior.mean[0] - 0.1) * 0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(item["latent_std"], posterior.std[0] * 0.5, rtol=1e-4, atol=1e-5)
        assert int(item["label"]) == image["label"]
        assert torch.equal(item["original_size"], image["original_size"])
        assert torch.equal(item["crop_top_left"], image["crop_top_left"])
        assert item["target_size"].tolist() == [16, 16]
    # And a module draws from them as from images.
    batch = {"latent": dataset[0]["latent"][None].half(), "latent_std": dataset[0]["latent_std"][None].half()}
    drawn = torch.cat([module.clean_latents(batch) for _ in range(3000)])
    off = (drawn.mean(0) - batch["latent"][0].float()) / (dataset[0]["latent_std"] / math.sqrt(3000))
    assert off.abs().max() < 5
    torch.testing.assert_close(drawn.std(0), dataset[0]["latent_std"], rtol=0.1, atol=0.003)
    first = module.clean_latents(batch, torch.Generator().manual_seed(4))
    assert torch.equal(first, module.clean_latents(batch, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_the_trainers_precision_is_not_the_autoencoders(
    make_module: MakeModule, tmp_path: Path, precision: Any
) -> None:
    """A recipe's precision is for what it trains: images are encoded as they were read."""
    found = []
    for each in ("32-true", precision):
        run = EncodingTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, precision=each)
        torch.manual_seed(0)
        run.encode(
            make_module(), folder_data(photos_in(tmp_path / "photos", 10)), str(tmp_path / each), dtype="float32"
        )
        dataset = LatentCacheDataModule(tmp_path / each).dataset("train")
        found.append(torch.stack([dataset[i]["latent"] for i in range(len(dataset))]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # `64-true` scales in float64


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_the_error_of_rounding_is_said(make_module: MakeModule, tmp_path: Path, dtype: str, bits: int) -> None:
    photos, module = photos_in(tmp_path / "photos", 12), make_module()
    for name in ("float32", dtype):
        encode(module, folder_data(photos), tmp_path / name, dtype=name)
    exact, rounded = (
        torch.cat(
            [
                LatentShard(tmp_path / name / split / "000000.tar").tensors["latent"].double().flatten()
                for split in ("train", "val")
            ]
        )
        for name in ("float32", dtype)
    )
    said = json.loads((tmp_path / dtype / "manifest.json").read_text())["rounding_error"]
    error = (rounded - exact).abs()
    assert said["largest"] == pytest.approx(float(error.max()), rel=1e-6)
    assert said["relative"] == pytest.approx(float(error.square().sum().sqrt() / exact.square().sum().sqrt()), rel=1e-6)
    assert 0 < said["relative"] < 2**-bits  # half a unit of the last place at most


def test_crops_and_mirrored_ones_are_stored_and_drawn(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 24, side=(40, 16)), make_module()
    data = folder_data(photos, crop="random", horizontal_flip=True)
    encode(module, data, tmp_path / "cache", dtype="float32", crops=3)
    cached = LatentCacheDataModule(tmp_path / "cache", batch_size=4)
    shard = LatentShard(tmp_path / "cache" / "train" / "000000.tar")
    assert shard.tensors["latent"].shape[1] == 6
    model: Any = module.autoencoder.model
    for item in range(3):
        picture = load_rgb(str(photos / shard.item(item)["key"]))
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1
        lefts = shard.tensors["crop_top_left"][item, :, 1].tolist()
        assert len(set(lefts[::2])) > 1, "crops differ"
        for variant, left in enumerate(lefts):
            whole = pixels.flip(-1) if variant % 2 else pixels
            with torch.no_grad():
                mean = model.encode(whole[None, :, :, left : left + 16]).latent_dist.mean[0]
            torch.testing.assert_close(shard.tensors["latent"][item, variant], (mean - 0.1) * 0.5, rtol=1e-3, atol=1e-4)
        assert lefts[1::2] == [24 - left for left in lefts[::2]]
    val = LatentShard(tmp_path / "cache" / "val" / "000000.tar")
    assert val.tensors["latent"].shape[1] == 1
    options: dict[str, Any] = {"splits": ["train"], "crops": 3, "flips": False, "std": False}
    encode(module, data, tmp_path / "other", dtype="float32", seed=1, **options)
    other = LatentShard(tmp_path / "other" / "train" / "000000.tar").tensors
    assert "latent_std" not in other
    assert (other["crop_top_left"] != shard.tensors["crop_top_left"][:, ::2]).any(), "another seed crops otherwise"
    torch.manual_seed(0)
    loader = cached.train_dataloader()
    latents = shard.tensors["latent"]
    seen: set[tuple[int, int]] = set()
    for _ in range(12):
        for batch in loader:
            for latent in batch["latent"].flatten(1):
                places = (latents.flatten(2) == latent).all(dim=-1).nonzero().tolist()
                assert places
                seen |= set(map(tuple, places))  # two crops of an image may be one
    assert len({variant for _, variant in seen}) == 6
    assert len(seen) > 0.6 * latents.shape[0] * 6  # 12 of 6 draws each: 1 - (5/6)^12 = 0.89 of them


def test_a_draw_depends_on_seed_epoch_and_item_alone(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 20, side=(40, 16)), make_module()
    encode(module, folder_data(photos, crop="random"), tmp_path / "cache", crops=4, shard_size=5)

    def drawn(batch_size: int, workers: int = 0) -> list[set[bytes]]:
        torch.manual_seed(1)
        loader = LatentCacheDataModule(tmp_path / "cache", batch_size, workers).train_dataloader()
        return [{x.numpy().tobytes() for batch in loader for x in batch["latent"]} for _ in range(2)]

    assert drawn(4) == drawn(4, 1)
    few, many = drawn(2), drawn(8)
    assert many[0] <= few[0]
    assert few[0] != few[1]


SCRIPT = Path(__file__).with_name("encoding_run.py")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_encoding_that_goes_on_equals_one_never_killed(tmp_path: Path) -> None:
    """Byte for byte, killed three times; two processes write the same as one."""
    photos = photos_in(tmp_path / "photos", 60)
    (photos / "a" / "bad.png").write_bytes(b"no image")
    run_script(SCRIPT, 1, photos, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in expected) == 9
    out = tmp_path / "killed"
    for shards in (1, 4, 7):
        encoding = Script(SCRIPT, 1, photos, out)
        start = time.monotonic()
        while len(list(out.rglob("*.json"))) < shards + 1 and encoding.process.is_alive():
            assert time.monotonic() - start < 120
            time.sleep(0.001)
        encoding.process.kill()
        encoding.end()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert len(kept) >= 7
    (out / "train" / "000001.tar.0.unfinished").write_bytes(b"left behind")
    run_script(SCRIPT, 1, photos, out)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "finished shards are not made again"
    run_script(SCRIPT, 2, photos, tmp_path / "both")
    for folder in (out, tmp_path / "both"):
        found = content(folder)
        (report,) = (name for name in found if name.endswith("bad_data.jsonl"))
        assert set(read_faults(folder / report)) == {str(photos / "a" / "bad.png")}
        del found[report]
        assert found == {name: data for name, data in expected.items() if name != report}


def test_a_full_disk_ends_it_with_one_error_and_what_is_finished_stays(tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos", 20)
    done = Script(SCRIPT, 1, photos, tmp_path / "out", 6000).end()
    assert done.returncode != 0
    assert "000000.tar cannot be written" in done.stderr.splitlines()[-1]
    assert "make room, and call the same command again" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.unfinished"))
    run_script(SCRIPT, 1, photos, tmp_path / "out")
    assert LatentCacheDataModule(tmp_path / "out").dataset("train")


def test_other_settings_models_and_folders_are_refused(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 12), make_module()
    out = encode(module, folder_data(photos), tmp_path / "cache")
    encode(module, folder_data(photos), tmp_path / "cache")  # all is there
    shard = out / "train" / "000000.tar"
    before = shard.read_bytes()
    shard.unlink()
    encode(module, folder_data(photos), out)
    assert shard.read_bytes() == before
    with pytest.raises(ValueError, match=r'begun with other settings \(dtype "float16" there, "bfloat16" here'):
        encode(module, folder_data(photos), out, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"begun with other settings \(.*fingerprint"):
        encode(make_module(), folder_data(photos), out)
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("seed", {"seed": 1}, {}),
        ("std", {"std": False}, {}),
        ("shard_size", {"shard_size": 7}, {}),
        ("batch_size", {}, {"batch_size": 3}),
        (r"data\.train\.preparation\.crop", {}, {"crop": "random"}),
        (r"data\.val\.preparation\.resize", {}, {"interpolation": "bilinear"}),
    ]
    for name, options, of_data in changes:
        with pytest.raises(ValueError, match=rf"begun with other settings \(.*{name} "):
            encode(module, folder_data(photos, **of_data), out, **options)
    with pytest.raises(ValueError, match=r"begun with other settings \(image_size 16 there, 32 here\)"):
        encode(module, ImageFolderDataModule(photos, 32, batch_size=4, num_workers=0, val_fraction=0.2), out)
    coarse = make_module(autoencoder=Autoencoder(copy.deepcopy(module.autoencoder.model), dtype="bfloat16"))
    with pytest.raises(ValueError, match=r'autoencoder\.precision "torch.float32" there, "torch.bfloat16" here'):
        encode(coarse, folder_data(photos), out)
    with pytest.raises(ValueError, match=r"`splits` must name all that .* holds, val too"):
        encode(module, folder_data(photos), out, splits=["train"])
    photo, other = photos / "a" / "00.png", tmp_path / "new.png"
    Image.new("RGB", (21, 16)).save(other)
    shutil.copy(photo, tmp_path / "kept.png")
    shutil.copy(other, photo)  # of the same name
    with pytest.raises(ValueError, match=r"begun with other settings \(data\.train\.contents [^;]*\)"):
        encode(module, folder_data(photos), out)
    shutil.copy(tmp_path / "kept.png", photo)
    encode(module, folder_data(photos), out)
    shutil.move(other, photos / "a" / "new.png")
    with pytest.raises(ValueError, match=r"begun with other settings \(.*data\.train\.names"):
        encode(module, folder_data(photos), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"`out` must be a new folder.*notes\.txt"):
        encode(module, folder_data(photos), tmp_path / "full")
    for options, message in (
        ({"dtype": "int8"}, r"`dtype` must be one of float16, bfloat16, float32, got 'int8'"),
        ({"crops": 0}, r"`crops` must be 1 or more"),
        ({"crops": 2}, r"`crops`=2: the data crop in the centre, so that all would be the same"),
        ({"splits": []}, r"`splits` must be a list of one or more of train, val, test, got \[\]"),
        ({"splits": "train"}, r"`splits` must be a list .* got 'train'"),
        ({"splits": ["train", "valid"]}, r"`splits` must be a list .*valid"),
        ({"text": True}, r"`text`: the model goes by ClassTokens, not by Captions"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(module, folder_data(photos), tmp_path / "other", **options)
    with pytest.raises(ValueError, match=r"`flips`: ShapesDataModule does not mirror"):
        encode(module, ShapesDataModule(16, 8, 4, batch_size=4), tmp_path / "other", flips=True)
    with pytest.raises(ValueError, match=r"`data` must hold images, but LatentCacheDataModule holds latents"):
        encode(module, LatentCacheDataModule(out), tmp_path / "other")


def test_other_captions_are_refused(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 6), make_module()
    for path in photos.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    encode(module, folder_data(photos, captions="sidecar"), tmp_path / "cache")
    (photos / "a" / "00.txt").write_text("another")
    with pytest.raises(ValueError, match=r"begun with other settings \(data\.\w+\.contents [^;]*\)"):
        encode(module, folder_data(photos, captions="sidecar"), tmp_path / "cache")


def test_splits_are_added_and_training_needs_no_more_than_it_uses(make_module: MakeModule, tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos", 12)
    module = make_module(conditioner=ClassTokens(2, token_dim=8, pooled_dim=8))
    whole = encode(module, folder_data(photos), tmp_path / "whole")
    out = encode(module, folder_data(photos), tmp_path / "cache", splits=["train"])
    run = trainer(tmp_path, limit_val_batches=0, num_sanity_val_steps=0)
    run.fit(module, LatentCacheDataModule(out, batch_size=4))
    with pytest.raises(ValueError, match=r"holds no val images, only train: add them by `lpl encode --splits`"):
        trainer(tmp_path).fit(module, LatentCacheDataModule(out))
    written = (out / "train" / "000000.tar").stat().st_mtime_ns
    encode(module, folder_data(photos), out)
    assert content(out) == content(whole)
    assert (out / "train" / "000000.tar").stat().st_mtime_ns == written


def test_a_damaged_cache_is_mended_or_refused(make_module: MakeModule, tmp_path: Path) -> None:
    """Files beside shards as a crash of the machine may leave them, and a manifest that is none."""
    photos, module = photos_in(tmp_path / "photos", 12), make_module()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json.7.unfinished").touch()  # another process is about to write it
    out = encode(module, folder_data(photos), tmp_path / "cache", shard_size=4)
    expected = content(out)
    (out / "train" / "000000.json").write_bytes(b"")
    (out / "train" / "000001.json").write_text("{}")
    (out / "train" / "000002.tar").write_bytes(b"")
    encode(module, folder_data(photos), out, shard_size=4)
    assert content(out) == expected
    for damaged in ("", "[]", '{"settings": {}}', '{"settings": {"data": []}}'):
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"`out`: .*manifest\.json is damaged, or is no manifest"):
            encode(module, folder_data(photos), out, shard_size=4)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ValueError, match=r"`out`: .*file.* cannot be a folder to write into"):
            encode(module, folder_data(photos), place)


def test_images_that_are_left_out_are_counted_at_the_end(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 20), make_module()
    for number in (0, 2, 4):
        (photos / "a" / f"{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3 of 20 items cannot be read, more than `max_bad_share` .*00\.png"):
        encode(module, folder_data(photos), tmp_path / "cache")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tar")}
    with pytest.warns(UserWarning, match=r"Left out 3 of 20 images that cannot be read: .*bad_data\.jsonl names them"):
        out = encode(module, folder_data(photos, max_bad_share=0.2), tmp_path / "cache")
    assert kept == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert sum(json.loads((out / "manifest.json").read_text())["images"].values()) == 17


@pytest.mark.filterwarnings("ignore:Left out 1 of")
@pytest.mark.parametrize(
    "options", [{"buckets": {"divisor": 8, "max_aspect": 4.0}}, {"captions": "sidecar", "missing_captions": "skip"}]
)
def test_what_is_found_bad_beforehand_is_named_in_a_new_folder(
    make_module: MakeModule, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Before anything is encoded: an image without a header, and one without a caption."""
    photos, module = photos_in(tmp_path / "photos", 23), make_module()
    for path in photos.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    bad = photos / "a" / "bad.png"
    bad.write_bytes(b"no image")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"`out` must be a new folder.* holds notes\.txt"):
        encode(module, folder_data(photos, **options), tmp_path / "full")
    assert list(content(tmp_path / "full")) == ["notes.txt"]
    for _ in range(2):
        out = encode(module, folder_data(photos, **options), tmp_path / "cache")
        assert set(read_faults(out / "bad_data.jsonl")) == {str(bad)}
        assert sum(json.loads((out / "manifest.json").read_text())["images"].values()) == 23


def test_numbers_that_do_not_fit_are_refused(make_module: MakeModule, tmp_path: Path) -> None:
    """A posterior's width, and embeddings, as well as latents."""
    photos = photos_in(tmp_path / "photos", 6)
    for path in photos.rglob("*.png"):
        path.with_suffix(".txt").write_text(path.stem)
    data = folder_data(photos, captions="sidecar")
    letters = Letters(width=8, pooled=8, length=12)
    module = make_module(conditioner=Captions([letters]))
    with torch.no_grad():
        next(letters.parameters()).mul_(1e6)
    with pytest.raises(ValueError, match=r"does not fit torch\.float16: the largest number of `text_tokens` is .*e\+0"):
        encode(module, data, tmp_path / "text", text=True)
    for factor, name in ((1e6, "latent"), (2e3, "latent_std")):
        wide = tiny_kl(scaling_factor=factor)
        with torch.no_grad():
            wide.quant_conv.bias[4:] = 8.0 if name == "latent_std" else -30.0  # log variance
        with pytest.raises(ValueError, match=rf"`{name}` is .* Set `dtype` to bfloat16 or float32"):
            encode(make_module(autoencoder=Autoencoder(wide)), data, tmp_path / name)


def test_shards_that_would_be_too_large_are_refused_by_the_first_batch(
    make_module: MakeModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, module, options = photos_in(tmp_path / "photos", 30), make_module(), {"splits": ["train"], "flips": True}
    whole = encode(module, folder_data(photos), tmp_path / "whole", **options) / "train" / "000000.tar"
    count = len(LatentShard(whole))
    assert count > 20
    data = sum(tensor.numel() * tensor.element_size() for tensor in LatentShard(whole).tensors.values())
    monkeypatch.setattr("lpl_lightning.encoder.MOST_BYTES", data // 2)
    with pytest.raises(ValueError, match=rf"`shard_size`: train/000000\.tar would hold {count} images of") as refusal:
        encode(module, folder_data(photos), tmp_path / "cache", **options)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    said = re.search(r"Give (\d+) or fewer, and another `out`", str(refusal.value))
    assert said is not None
    assert int(said[1]) == pytest.approx(count / 2, abs=1)
    encode(module, folder_data(photos), tmp_path / "fits", shard_size=int(said[1]), **options)
    with pytest.raises(ValueError, match=r"`shard_size`"):
        encode(module, folder_data(photos), tmp_path / "over", shard_size=int(said[1]) + 1, **options)


def test_a_model_with_another_autoencoder_is_refused_before_training(make_module: MakeModule, tmp_path: Path) -> None:
    photos = photos_in(tmp_path / "photos", 12)
    module = make_module(conditioner=ClassTokens(2, token_dim=8, pooled_dim=8))
    out = encode(module, folder_data(photos), tmp_path / "cache")
    for other in (
        Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1)),
        Autoencoder(module.autoencoder.model, scaling_factor=0.6),
        Autoencoder(module.autoencoder.model, shift_factor=0.2),
    ):
        stranger = make_module(autoencoder=other, conditioner=module.conditioner)
        with pytest.raises(ValueError, match=r"`data`: what .* holds was made by another autoencoder than the model's"):
            trainer(tmp_path).fit(stranger, LatentCacheDataModule(out))
    trainer(tmp_path, callbacks=[LossByNoise([0.5])]).validate(module, LatentCacheDataModule(out), verbose=False)


def test_the_same_autoencoder_in_another_precision_is_no_other(make_module: MakeModule, tmp_path: Path) -> None:
    photos, module = photos_in(tmp_path / "photos", 6), make_module(autoencoder=Autoencoder(tiny_taesd()))
    model = module.autoencoder.model

    def in_precision(dtype: Any, by: float = 0.0) -> Autoencoder:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            next(copied.parameters()).flatten()[0] += by
        return Autoencoder(copied, dtype=dtype)

    def check(root: Path, autoencoder: Autoencoder) -> None:
        check_encoded(LatentCacheDataModule(root), autoencoder, module.conditioner)

    assert not torch.equal(next(in_precision("bfloat16").parameters()).float(), next(model.parameters()))
    out = encode(module, folder_data(photos), tmp_path / "cache")
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        check(out, in_precision(dtype))
        with pytest.raises(ValueError, match="was made by another autoencoder"):
            check(out, in_precision(dtype, by=0.1))
    coarse = make_module(autoencoder=in_precision("bfloat16"))
    out = encode(coarse, folder_data(photos), tmp_path / "coarse")
    for dtype in ("bfloat16", "float32"):
        check(out, in_precision(dtype))
    with pytest.raises(ValueError, match=r"weights, their precision, scale .*by the same `dtype`"):
        check(out, in_precision("float16"))


def test_shapes_and_an_autoencoder_without_a_posterior(make_module: MakeModule, tmp_path: Path) -> None:
    module = make_module(autoencoder=Autoencoder(tiny_taesd()))
    out = encode(module, ShapesDataModule(16, 9, 4, batch_size=4), tmp_path / "cache", splits=("train",))
    cached = LatentCacheDataModule(out, batch_size=3)
    batch = next(iter(cached.train_dataloader()))
    assert "latent_std" not in batch
    assert batch["latent"].dtype == torch.float16
    assert len(batch["caption"]) == 3
    with pytest.raises(ValueError, match=r"holds no val images, only train"):
        cached.val_dataloader()


@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_of_captions_are_those_that_training_would_make(
    make_module: MakeModule, tmp_path: Path, masked: bool
) -> None:
    """The same condition from the cache as from the captions, dropout live; each of several captions is kept."""
    photos = photos_in(tmp_path / "photos", 12)
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        path.with_suffix(".txt").write_text("\n".join(f"photo {number} {place}" for place in range(1 + number % 3)))
    data = folder_data(photos, captions="sidecar")
    torch.manual_seed(0)
    captions = Captions([Letters(width=8, pooled=8, length=12, masked=masked)], dropout=0.3)
    module = make_module(conditioner=captions)
    out = encode(module, data, tmp_path / "cache", dtype="float32", text=True, shard_size=5)
    cached = LatentCacheDataModule(out)
    dataset, texts = cached.dataset("train"), data.dataset("train")
    for index in range(len(dataset)):
        assert dataset.captions(index) == list(texts.captions_of(index))
    seen = set()
    for epoch in range(60):
        batch = dataset.batch(Request(0, epoch, [0, 1, 2]))
        assert "caption" not in batch
        drop = torch.tensor([False, True, False])
        condition = captions(batch, 3, drop)
        choices = []
        for row in range(3):
            found = []
            for place, text in enumerate(texts.captions_of(row)):
                lone = captions({"caption": [text]}, 1)
                if torch.equal(batch["text"]["tokens"][row], _there(lone.tokens)[0]):
                    found.append(place)
                    if not drop[row]:
                        torch.testing.assert_close(_there(condition.tokens)[row], _there(lone.tokens)[0])
                        torch.testing.assert_close(_there(condition.pooled)[row], _there(lone.pooled)[0])
                        assert not masked or torch.equal(_there(condition.mask)[row], _there(lone.mask)[0])
            (choice,) = found
            choices.append((row, choice))
        seen |= set(choices)
    assert len(seen) == sum(len(texts.captions_of(row)) for row in range(3))
    trainer(tmp_path, max_steps=3).fit(module, LatentCacheDataModule(out, batch_size=4))
    other = make_module(conditioner=Captions([Letters(width=8, pooled=8, length=12, masked=masked)]))
    other.autoencoder = module.autoencoder
    with pytest.raises(ValueError, match="was made by other text encoders than the model's"):
        trainer(tmp_path).fit(other, LatentCacheDataModule(out))


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    photos = photos_in(tmp_path / "photos", 12)
    tiny_taesd(latent_channels=16).save_pretrained(tmp_path / "taesd")
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[1] / "configs"
    model = ["-c", str(root / "folder.yaml"), f"--model.autoencoder.model={tmp_path / 'taesd'}"]
    model += ["--model.conditioner.num_classes=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    model += ["--model.autoencoder.downscale=8"]
    data = [f"--data.root={photos}", "--data.num_workers=0", "--data.image_size=64", "--data.batch_size=4"]
    main(["encode", *model, *data, "--out=cache"])
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as terminal:
        terminal.setattr(sys, "argv", ["lpl", "encode", *model, *data, "--out=full"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, most))  # as on a full disk
        try:
            with pytest.raises(SystemExit):
                main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    said = [line for line in capsys.readouterr().err.splitlines() if "full" in line]
    assert len(said) == 1
    assert said[0].startswith("lpl: error: `out`: ")
    shutil.rmtree(photos)
    few = [
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks=[]",
        "--trainer.limit_val_batches=1",
    ]
    cache = ["--data=lpl_lightning.data.LatentCacheDataModule", "--data.root=cache", "--data.batch_size=4"]
    main(["fit", *model, *cache, *few])
    cached = LatentCacheDataModule("cache")
    assert (cached.image_size, cached.class_names) == (64, ("a", "b"))
    assert list((tmp_path / "runs").rglob("metrics.csv")), "it has trained"


def test_buckets_are_cached_each_in_shards_of_its_own(make_module: MakeModule, tmp_path: Path) -> None:
    """The same batches as from the images: of the same items, and latents of what these are encoded to."""
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for i in range(40):
        side = [(16, 16), (9, 33), (40, 10)][i % 3]
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)).save(path)
    data = folder_data(root, buckets=AspectBuckets(divisor=8, max_aspect=4.0), batch_size=3)
    autoencoder = Autoencoder(tiny_kl(scaling_factor=0.5, shift_factor=0.1), sample_posterior=False)
    module = make_module(autoencoder=autoencoder, conditioner=ClassTokens(2, token_dim=8, pooled_dim=8))
    out = encode(module, data, tmp_path / "cache", dtype="float32", shard_size=4)
    cached = LatentCacheDataModule(out, batch_size=3)
    assert len(cached.image_sizes) == 3
    latents, images = cached.dataset("train"), folder_data(root, verify=False).dataset("train")
    names = [latents.shard(n).item(r)["key"] for n in range(len(latents.paths)) for r in range(len(latents.shard(n)))]
    assert sorted(names) == sorted(images.key(index) for index in range(len(images)))
    shapes = set()
    torch.manual_seed(0)
    for batch in cached.train_dataloader():
        assert len(batch["latent"]) == 3
        shapes.add(tuple(batch["latent"].shape[2:]))
        assert (batch["target_size"] == torch.tensor(batch["latent"].shape[2:]) * 4).all()
    assert len(shapes) == 3
    pixels = {tuple(batch["image"].shape[2:]): batch["image"] for batch in data.val_dataloader()}
    encoded = {tuple(batch["latent"].shape[2:]): batch["latent"] for batch in cached.val_dataloader()}
    assert len(pixels) == len(encoded)
    for (height, width), image in pixels.items():
        expected = autoencoder.encode(image)
        torch.testing.assert_close(encoded[height // 4, width // 4], expected, rtol=1e-3, atol=1e-4)
    state = copy.deepcopy(module.state_dict())
    of_images, _, _ = trained(module, data, tmp_path / "images")
    module.load_state_dict(state)
    of_latents, _, _ = trained(module, LatentCacheDataModule(out, batch_size=3), tmp_path / "latents")
    for one, other in zip(of_latents, of_images, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
