from __future__ import annotations

import json
import logging
import pickle
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load
from strangers import refused
from torch import Tensor

from lpl_lightning.data import CachedLatents, LatentCacheDataModule
from lpl_lightning.data.batches import Request
from lpl_lightning.data.faults import read_faults
from lpl_lightning.data.latent_cache import FORMAT
from lpl_lightning.data.latent_shards import LatentShard, shard_hash, write_shard


def shard_of(first: int, count: int, variants: int = 2, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Latents that say which item and variant they are."""
    items = torch.arange(first, first + count)
    latent = (items[:, None] + torch.arange(variants) / 8).view(count, variants, 1, 1, 1).expand(-1, -1, 4, 2, 3)
    return {
        "latent": latent.to(dtype),
        "latent_std": (latent * 2).to(dtype),
        "label": items % 3,
        "original_size": items[:, None, None].expand(-1, variants, 2) + torch.arange(variants)[:, None],
        "crop_top_left": torch.zeros(count, variants, 2, dtype=torch.long),
        "target_size": torch.tensor([16, 24]).expand(count, 2),
    }


def captions_of(item: int) -> list[str]:
    return [f"{item} é {number}" for number in range(1 + item % 3)]


def cache_of(root: Path, counts: tuple[int, ...] = (5, 1, 7), with_text: bool = False, **changes: Any) -> Path:
    shards, first = [], 0
    for number, count in enumerate(counts):
        path = root / "train" / f"{number:06d}.tar"
        tensors = shard_of(first, count)
        texts = [captions_of(first + row) for row in range(count)]
        if with_text:
            flat = [float(f"{first + row}.{place}") for row in range(count) for place in range(len(texts[row]))]
            tensors["text_pooled"] = torch.tensor(flat)[:, None].half()
            tensors["caption_start"] = torch.tensor([0, *map(len, texts)]).cumsum(0)
        write_shard(path, tensors, [{"key": str(first + row), "captions": texts[row]} for row in range(count)])
        size = path.stat().st_size
        shards.append({"file": f"train/{path.name}", "items": count, "bytes": size, "hash": shard_hash(path)})
        first += count
    manifest = {
        "format": FORMAT,
        "finished": True,
        "autoencoder": {"fingerprint": "of the autoencoder"},
        "text": {"fingerprint": "of the text"} if with_text else None,
        "image_size": 16,
        "class_names": ["a", "b", "c"],
        "has_captions": True,
        "shards": {"train": shards, "val": shards[:1]},
    }
    (root / "manifest.json").write_text(json.dumps(manifest | changes))
    return root


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_shard_is_what_other_libraries_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**shard_of(0, 3, dtype=dtype), "text_mask": torch.tensor([[True, False], [False, True]])}
    items = [{"key": f"cat/ä{i}.jpg", "captions": ["a\ncat", "ein Kätzchen"]} for i in range(3)]
    write_shard(tmp_path / "deep" / "0.tar", tensors, items)
    shard = LatentShard(tmp_path / "deep" / "0.tar")
    assert [shard.item(i) for i in range(3)] == items
    with tarfile.open(tmp_path / "deep" / "0.tar") as tar:
        content, lines = (tar.extractfile(name) for name in ("tensors.safetensors", "items.jsonl"))
        assert content is not None
        assert lines is not None
        found = load(content.read())
        assert [json.loads(line) for line in lines] == items
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(shard.tensors[name], tensor)
        assert shard.tensors[name].dtype == tensor.dtype
    assert len(shard) == 3
    shard.tensors["latent"].zero_()  # a private copy
    assert torch.equal(LatentShard(tmp_path / "deep" / "0.tar").tensors["latent"], tensors["latent"])


def header(layout: Literal[0, 1, 2], size: int) -> bytes:
    member = tarfile.TarInfo("tensors.safetensors")
    member.size = size
    return member.tobuf(layout)


def test_a_shard_too_large_for_plain_headers_is_read_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"key": str(i), "captions": ["a cat"]} for i in range(3)]
    for name, most in (("plain", 8 * 2**30 - 1), ("large", 200)):
        monkeypatch.setattr("lpl_lightning.data.latent_shards.MOST_BYTES", most)
        write_shard(tmp_path / name, shard_of(0, 3), items)
    with pytest.raises(ValueError, match="overflow"):  # what would come at the end of a shard otherwise
        header(tarfile.USTAR_FORMAT, 2**33)
    assert tarfile.TarInfo.frombuf(header(tarfile.GNU_FORMAT, 2**33), "utf-8", "strict").size == 2**33
    one, other = ((tmp_path / name).read_bytes() for name in ("plain", "large"))
    assert (one[257:265], other[257:265]) == (b"ustar\x0000", b"ustar  \0"), "POSIX and GNU"
    shard = LatentShard(tmp_path / "large")
    assert torch.equal(shard.tensors["latent"], shard_of(0, 3)["latent"])
    assert [shard.item(i) for i in range(3)] == items


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    keys = ["a\udcff.png", "é.png", "b.png"]
    write_shard(tmp_path / "0.tar", shard_of(0, 3), [{"key": key, "captions": ["ü"]} for key in keys])
    shard = LatentShard(tmp_path / "0.tar")
    assert [shard.item(row)["key"] for row in range(3)] == keys


def test_batches_are_the_items_asked_for_in_their_order(tmp_path: Path) -> None:
    data = LatentCacheDataModule(cache_of(tmp_path))
    dataset = data.dataset("train")
    assert len(dataset) == 13
    indices = [12, 0, 5, 4, 6, 0, 11]
    before = torch.get_rng_state()
    batch = dataset.batch(Request(1, 2, indices))
    assert torch.equal(torch.get_rng_state(), before), "so it may be made beside a training step"
    latents = batch["latent"][:, 0, 0, 0].float()
    assert latents.long().tolist() == indices
    variants = ((latents - latents.long()) * 8).long()
    assert torch.equal(batch["latent"] * 2, batch["latent_std"])
    assert batch["label"].tolist() == [index % 3 for index in indices]
    assert batch["original_size"].tolist() == [[i + v, i + v] for i, v in zip(indices, variants.tolist(), strict=True)]
    assert batch["target_size"].tolist() == [[16, 24]] * 7
    assert all(text in captions_of(index) for text, index in zip(batch["caption"], indices, strict=True))
    assert batch["latent"].shape == (7, 4, 2, 3)
    assert variants[1] == variants[5], "an item draws the same in an epoch"
    # As an item: the first variant and caption.
    for index in range(13):
        item = dataset[index]
        assert item["latent"].shape == (4, 2, 3)
        assert float(item["latent"][0, 0, 0]) == index
        assert item["caption"] == captions_of(index)[0]
    with pytest.raises(IndexError):
        dataset[13]


@pytest.mark.parametrize("with_text", [False, True])
def test_variants_and_captions_are_drawn_evenly_and_apart(tmp_path: Path, with_text: bool) -> None:
    dataset = LatentCacheDataModule(cache_of(tmp_path, with_text=with_text)).dataset("train")
    pairs = []
    for epoch in range(3000):
        batch = dataset.batch(Request(0, epoch, [5, 8]))  # of two variants each, and of three captions
        latents = batch["latent"][:, 0, 0, 0].float()
        variants = ((latents - latents.long()) * 8).long().tolist()
        if with_text:
            assert "caption" not in batch
            captions = (batch["text"]["pooled"][:, 0].float() * 10).round().long() % 10
        else:
            captions = torch.tensor([int(text[-1]) for text in batch["caption"]])
        pairs.append((*variants, *captions.tolist()))
    table = torch.zeros(2, 2, 3, 3)
    for place in pairs:
        table[place] += 1
    expected = 3000 / 36
    # Chi square of 35 degrees of freedom: above 66.6 once in a thousand.
    assert float(((table - expected) ** 2 / expected).sum()) < 66.6


def test_batches_are_made_beside_a_training_step(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for batch in LatentCacheDataModule(cache_of(tmp_path), batch_size=2).train_dataloader():
        assert batch["latent"].shape == (2, 4, 2, 3)
        assert set(threading.enumerate()) - before
        break


def test_draws_come_from_the_seed_too_and_are_apart_where_they_are_of_as_many(tmp_path: Path) -> None:
    """Of two variants and two captions all four pairs, as often; another seed draws otherwise."""
    dataset = LatentCacheDataModule(cache_of(tmp_path)).dataset("train")
    counts = torch.zeros(2, 2)
    for epoch in range(400):
        batch = dataset.batch(Request(0, epoch, [4]))
        counts[int(float(batch["latent"][0, 0, 0, 0]) % 1 * 8), int(batch["caption"][0][-1])] += 1
    assert float(((counts - 100) ** 2 / 100).sum()) < 16.3  # 3 degrees of freedom: above once in a thousand
    one, other = (dataset.batch(Request(seed, 0, list(range(13)))) for seed in (0, 1))
    assert not torch.equal(one["latent"], other["latent"])
    assert one["caption"] != other["caption"]


def test_loader_processes_map_files_of_their_own(tmp_path: Path) -> None:
    dataset = LatentCacheDataModule(cache_of(tmp_path)).dataset("train")
    dataset.shard(0)
    copy: CachedLatents = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 2000
    assert torch.equal(copy[12]["latent"], dataset[12]["latent"])


def test_captions_and_classes(tmp_path: Path) -> None:
    data = LatentCacheDataModule(cache_of(tmp_path), batch_size=4, num_generate=7)
    assert data.class_names == ("a", "b", "c")
    assert data.sample_captions(6) == [captions_of(index % 5)[0] for index in range(6)]
    (requests, _) = data.predict_dataloader()
    assert requests["caption"] == data.sample_captions(4)
    assert data.encoded_by == {"autoencoder": "of the autoencoder", "text": None}
    assert len(data.test_dataloader().dataset) == 5  # type: ignore[arg-type]
    assert [len(batch["latent"]) for batch in data.val_dataloader()] == [4, 1]


def test_sizes_with_fewer_images_than_a_batch_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = cache_of(tmp_path, counts=(5, 3, 9))
    manifest = json.loads((root / "manifest.json").read_text())
    for shard, size in zip(manifest["shards"]["train"], ([16, 24], [24, 16], [16, 24]), strict=True):
        shard["size"] = size
    (root / "manifest.json").write_text(json.dumps(manifest))

    def seen(data: LatentCacheDataModule) -> set[int]:
        loader = data.train_dataloader()
        return {int(x) for _ in range(30) for batch in loader for x in batch["latent"][:, 0, 0, 0].float()}

    said = r"3 of 17 images of .* are never trained on: of their sizes there are fewer than 4, .*`--data\.batch_size 4`"
    with pytest.warns(UserWarning, match=said), caplog.at_level(logging.INFO):
        assert seen(LatentCacheDataModule(root, batch_size=4)) == {*range(5), *range(8, 17)}
    (line,) = (record.message for record in caplog.records if "in buckets" in record.message)
    assert "In an epoch of 3 batches of 4, 2 images are left out, others each time" in line
    assert "3 are in no epoch: their sizes have fewer images than a batch." in line
    assert seen(LatentCacheDataModule(root, batch_size=3)) == {*range(17)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "missing": (lambda path: path.unlink(), "it does not exist", False),
    "cut": (cut, "it has .* bytes, not", False),
    "changed": (changed, "its content is not what was written", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards(tmp_path: Path, damage: str) -> None:
    root = cache_of(tmp_path / "cache")
    spoil, reason, verify = DAMAGES[damage]
    spoil(root / "train" / "000001.tar")
    data = LatentCacheDataModule(root, verify=verify)
    with pytest.raises(
        ValueError, match=rf"1 of 3 shards cannot be used: .*000001\.tar \({reason}.*`lpl encode` again"
    ):
        data.setup("fit")
    report = tmp_path / "bad.jsonl"
    data = LatentCacheDataModule(root, verify=verify, on_error="skip", report=report)
    with pytest.warns(UserWarning, match=r"Left out 1 of 13 images, in 1 shards"):
        data.setup("fit")
    assert list(read_faults(report)) == ["train/000001.tar"]
    dataset = data.dataset("train")
    assert [float(dataset[index]["latent"][0, 0, 0]) for index in range(12)] == [0, 1, 2, 3, 4, *range(6, 13)]
    spoil(root / "train" / "000002.tar")
    with pytest.raises(ValueError, match=r"8 of 13 items cannot be read, more than `max_bad_share`"):
        LatentCacheDataModule(root, verify=verify, on_error="skip").setup("fit")


@pytest.mark.parametrize("keep", [0, 100, 512, 600, 2000, 6000])
def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "0.tar"
    write_shard(path, shard_of(0, 40), [{"key": str(i), "captions": []} for i in range(40)])
    assert path.stat().st_size > 8000
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"0\.tar is no shard of latents, or is damaged"):
        LatentShard(path)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`root` must be a folder that `lpl encode --out .* has written"):
        LatentCacheDataModule(tmp_path)
    bare = json.dumps({"format": FORMAT, "finished": True})
    for content in ("", "[]", "{}", '{"format": "another"}', bare):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="is no manifest of a latent cache"):
            LatentCacheDataModule(tmp_path)
    with pytest.raises(ValueError, match="is not finished: call the `lpl encode` that began it again"):
        LatentCacheDataModule(cache_of(tmp_path, finished=False))


def test_a_manifest_of_latents_that_leads_elsewhere(tmp_path: Path, ran: Path) -> None:
    root = cache_of(tmp_path / "cache")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "train" / "000000.tar").rename(tmp_path / "secret.tar")
    for name in ("../secret.tar", str(tmp_path / "secret.tar")):
        manifest["shards"]["train"][0]["file"] = name
        (root / "manifest.json").write_text(json.dumps(manifest))
        refused(ran, f"it names '{name}', which does not lie in", lambda: LatentCacheDataModule(root))
    (root / "manifest.json").write_text("[" * 100_000)
    refused(ran, "is no manifest of a latent cache", lambda: LatentCacheDataModule(root))
