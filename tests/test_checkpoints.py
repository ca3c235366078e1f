from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import resource
import signal
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import tiny_kl, tiny_sd3
from forked import FORKED, run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.utils.data import DataLoader

from lpl_lightning import (
    EMA,
    Autoencoder,
    FlowMatching,
    Freeze,
    LatentDiffusionModule,
    LoRA,
    LPLCallback,
)
from lpl_lightning.captions import Captions
from lpl_lightning.checkpoint_files import draft_of, fault_of, put_folder
from lpl_lightning.checkpoints import SafeCheckpointIO, check_settings, newest_checkpoint
from lpl_lightning.optimization import check_optimizer
from lpl_lightning.text_encoders import TransformersText


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 kB, as on a disk that is all but full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[0][1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
    signal.signal(signal.SIGXFSZ, before[1])


def checkpoint(value: float = 1.0, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((size,), value)}, "epoch": 2, "name": "a", "list": [1, 2.5, None]}


def test_what_is_written_is_read_by_torch_and_by_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a[1].ckpt"
    SafeCheckpointIO().save_checkpoint(checkpoint(), path)
    for found in (torch.load(path, weights_only=True), SafeCheckpointIO().load_checkpoint(path)):
        assert torch.equal(found["state_dict"].pop("weight"), torch.ones(1000))
        assert found == {"state_dict": {}, "epoch": 2, "name": "a", "list": [1, 2.5, None]}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert fault_of(path) is None


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "a.ckpt"
    SafeCheckpointIO().save_checkpoint(checkpoint(1.0), path)
    with pytest.raises(OSError, match=r"a\.ckpt cannot be written \(.*File too large\)\. Those before it stay"):
        SafeCheckpointIO().save_checkpoint(checkpoint(2.0, size=100_000), path)
    assert SafeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"][0] == 1
    assert list(tmp_path.iterdir()) == [path]


def write_forever(path: Path, written: Connection) -> None:
    for number in itertools.count(1):
        SafeCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.full((500_000,), float(number))}}, path)
        written.send(number)


def test_a_kill_while_writing_leaves_a_whole_one(tmp_path: Path) -> None:
    """Of a real process, at moments that are anywhere in the writing; the next one tidies up."""
    path = tmp_path / "a.ckpt"
    for delay in (0.0, 0.003, 0.011):
        read, write = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=write_forever, args=(path, write))
        process.start()
        write.close()
        seen = [read.recv() for _ in range(3)]
        time.sleep(delay)
        process.kill()
        with suppress(EOFError):
            while True:
                seen.append(read.recv())
        process.join()
        weight = SafeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"]
        assert (weight == weight[0]).all()
        assert weight[0] >= seen[-1]
    SafeCheckpointIO().save_checkpoint(checkpoint(), path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(ValueError, match=r"it holds io\.open, which could run code\. Keep .*\(ignore="):
        SafeCheckpointIO().save_checkpoint(checkpoint() | {"hyper_parameters": {"a": Runs(tmp_path / "ran")}}, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_malicious_file_does_not_run(tmp_path: Path, kind: str) -> None:
    path, ran = tmp_path / "a.ckpt", tmp_path / "ran"
    if kind == "zip":
        torch.save(checkpoint() | {"bad": Runs(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(checkpoint() | {"bad": Runs(ran)}))
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be (read as a checkpoint|used)"):
        SafeCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match="`weights_only`=False would run"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not ran.exists()
    if kind == "zip":  # and it would have
        torch.load(path, weights_only=False)["bad"].close()
        assert ran.exists()


def damaged(content: bytes, damage: str) -> bytes:
    if damage == "empty":
        return b""
    if damage == "cut off":
        return content[: len(content) * 2 // 3]
    if damage == "text":
        return b"no checkpoint"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (weights,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
    place = weights.header_offset + 2000  # within its bytes
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {"empty": "it is empty", "cut off": "cut off", "text": "no checkpoint", "bit": "not what was written"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.ckpt"
    SafeCheckpointIO().save_checkpoint(checkpoint(), path)
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert DAMAGES[damage] in str(fault_of(path))
    with pytest.raises(ValueError, match=f"{DAMAGES[damage]}.*`--ckpt_path last`"):
        SafeCheckpointIO().load_checkpoint(path)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*b\.ckpt"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")


def trainer_of(tmp_path: Path, dirpath: Path | None = None) -> pl.Trainer:
    callback = ModelCheckpoint(dirpath)
    return pl.Trainer(logger=CSVLogger(tmp_path, "name"), callbacks=[callback], accelerator="cpu")


@pytest.mark.parametrize("has_dirpath", [False, True])
def test_the_newest_whole_one_of_all_runs_is_found(
    tmp_path: Path, has_dirpath: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / "name" / f"version_{number}" / "checkpoints" for number in (0, 1, 10)]
    if has_dirpath:
        folders = [tmp_path / "own"] * 3
    trainer = trainer_of(tmp_path, folders[0] if has_dirpath else None)
    assert newest_checkpoint(trainer) is None
    paths = [folder / f"{number}.ckpt" for number, folder in enumerate(folders)]
    for number, path in enumerate(paths):
        SafeCheckpointIO().save_checkpoint(checkpoint(), path)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    (folders[0] / "linked.ckpt").symlink_to(paths[1])
    (folders[0] / "no.ckpt").symlink_to(tmp_path / "deleted")
    assert newest_checkpoint(trainer) == paths[2]
    os.truncate(paths[2], 700)
    with pytest.warns(UserWarning, match=r"2\.ckpt is passed over for an older checkpoint: it is cut off"):
        assert newest_checkpoint(trainer) == paths[1]
    paths[1].unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert newest_checkpoint(trainer) == paths[0]
    SafeCheckpointIO().save_checkpoint({**checkpoint(), "optimizer_states": []}, paths[0])
    SafeCheckpointIO().save_checkpoint(checkpoint(), paths[2])
    assert newest_checkpoint(trainer) == paths[2]
    with pytest.warns(UserWarning, match="passed over for an older checkpoint: it holds weights alone"):
        assert newest_checkpoint(trainer, to_train=True) == paths[0]


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A distributed checkpoint as torch and Lightning write it."""
    return sharded(tmp_path / "a.ckpt")


def sharded(path: Path, weights_alone: bool = False) -> Path:
    weights = {"weight": torch.ones(10, dtype=torch.bfloat16), "norm": torch.ones(3)}
    states = {"state": {"weight": {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    save: Any = vars(distributed_checkpoint)["save"]
    save({"state_dict": weights} | ({} if weights_alone else {"optimizer_0": states}), checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3}, path / "meta.pt")
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_distributed_checkpoint_is_looked_through(distributed: Path) -> None:
    assert fault_of(distributed) is None
    (shard,) = distributed.glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert fault_of(distributed) == f"it is cut off: {shard.name} is missing or short"
    shard.write_bytes(whole)
    index = distributed / ".metadata"
    content = index.read_bytes()
    for bad, message in (
        (content[:-20], "damaged"),
        (content.replace(shard.name.encode(), b"/" + shard.name.encode()[1:]), "outside of it"),
    ):
        index.write_bytes(bad)
        assert message in str(fault_of(distributed))
    index.unlink()
    assert "no .metadata" in str(fault_of(distributed))
    index.write_bytes(content)
    notes = distributed / "meta.pt"
    os.truncate(notes, 100)
    assert str(fault_of(distributed)).startswith("meta.pt: it is cut off")
    notes.unlink()
    assert fault_of(distributed) == "it is cut off: meta.pt is missing"


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_training_does_not_go_on_from_a_folder_of_weights_alone(distributed: Path) -> None:
    trainer = trainer_of(distributed.parent, distributed.parent)
    alone = sharded(distributed.with_name("b.ckpt"), weights_alone=True)
    os.utime(distributed, ns=(0, 0))
    assert newest_checkpoint(trainer) == alone
    with pytest.warns(UserWarning, match=r"b\.ckpt is passed over for an older checkpoint: it holds weights alone"):
        assert newest_checkpoint(trainer, to_train=True) == distributed


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_replaces_another_as_a_whole(distributed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment is there none that ``last`` could take; what a kill left behind is removed by the next."""
    trainer = trainer_of(distributed.parent, distributed.parent)
    (distributed / "of_more_processes.distcp").touch()
    (draft_of(distributed)).mkdir()
    moments = []

    def replace(one: Path, other: Path) -> None:
        moments.append(newest_checkpoint(trainer))
        rename(one, other)
        moments.append(newest_checkpoint(trainer))

    rename = os.replace
    monkeypatch.setattr(os, "replace", replace)
    put_folder(sharded(draft_of(distributed)), distributed)
    assert moments[0] == moments[-1] == distributed
    assert None not in moments
    assert [path.name for path in distributed.parent.iterdir()] == ["a.ckpt"]
    assert fault_of(distributed) is None
    assert not (distributed / "of_more_processes.distcp").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_file_replaces_a_folder_as_a_whole(distributed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder does, also after a kill in between; a folder of something else stays, and it is no matter of room."""
    trainer = trainer_of(distributed.parent, distributed.parent)
    rename, ends_after = os.replace, [0, 1, 2]

    def replace(one: Path, other: Path) -> None:
        assert newest_checkpoint(trainer) is not None
        if not ends:
            raise KeyboardInterrupt
        ends.pop()
        rename(one, other)
        assert newest_checkpoint(trainer) is not None

    monkeypatch.setattr(os, "replace", replace)
    for count in ends_after:
        ends = [None] * count
        if count == 2:
            SafeCheckpointIO().save_checkpoint(checkpoint(), distributed)
        else:
            with pytest.raises(KeyboardInterrupt):
                SafeCheckpointIO().save_checkpoint(checkpoint(), distributed)
    assert [path.name for path in distributed.parent.iterdir()] == ["a.ckpt"]
    assert SafeCheckpointIO().load_checkpoint(distributed)["state_dict"]["weight"][0] == 1
    monkeypatch.setattr(os, "replace", rename)
    other = distributed.with_name("b.ckpt")
    (other / "kept").mkdir(parents=True)
    with pytest.raises(OSError, match=r"Is a directory.* stay: mend that, and go on"):
        SafeCheckpointIO().save_checkpoint(checkpoint(), other)
    assert (other / "kept").is_dir()


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EACCES, "mend that")])
def test_room_is_asked_for_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=f"stay: {remedy}, and go on by"):
        SafeCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "a.ckpt")


def test_a_folder_runs_no_code_where_it_is_gone_on_with(tmp_path: Path) -> None:
    """Torch unpickles what an index says is no tensor; a file of it may say that of any weight."""
    said = run_script(Path(__file__).with_name("sharded_run.py"), tmp_path).stdout
    assert f"{tmp_path / 'stranger.ckpt'} cannot be used: it holds what could run code." in said
    assert not (tmp_path / "ran").exists()
    assert "[[2.0, 2.0]] {'path': 'somewhere'} ['own.ckpt']\n" in said, "one written over another, and read"
    with pytest.raises(ValueError, match="holds weights alone") as of_file:
        check_optimizer(None, {"pytorch-lightning_version": "2.6", "state_dict": {}})
    assert f"\nalone.ckpt {of_file.value}\n" in said
    assert "\nall.ckpt 2\n" in said
    assert "\nmoved [True, False] True\n" in said


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_that_only_fsdp2_goes_on_with_is_refused_by_others(distributed: Path) -> None:
    with pytest.raises(ValueError, match="a.ckpt is a folder of shards, which `lpl_lightning.FSDP2Strategy` alone"):
        SafeCheckpointIO().load_checkpoint(distributed)


@pytest.mark.parametrize("what", [b"cbuiltins\neval\n", b"cos\nsystem\n", b"ctorch\nload\n", b"cpathlib\nos\n"])
def test_the_index_of_a_folder_runs_no_code(tmp_path: Path, what: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(what + b"(S'open(\"" + str(tmp_path / "ran").encode() + b'", "w")\'\ntR.')
    assert "could run code" in str(fault_of(tmp_path))
    assert not (tmp_path / "ran").exists()


class Kind(Enum):
    SMALL = "small"


class Other:
    """No plain value."""


class Settings(LatentDiffusionModule):
    """A module that someone builds with settings of many types, as one gets them from a config file of one's own."""

    def __init__(self, path: Path, kind: Kind, many: Any, odd: Any = None, **parts: Any) -> None:
        super().__init__(**parts)
        self.save_hyperparameters("path", "kind", "many", "odd")


def test_hyperparameters_are_plain_in_checkpoints(make_module: Callable[..., Any], tmp_path: Path) -> None:
    module = make_module()
    parts = {name: getattr(module, name) for name in ("autoencoder", "noise", "denoiser", "conditioner")}
    many = {"lr": np.float32(0.5), "sizes": (np.int64(3), [Path("a")]), "array": np.arange(2), "dtype": torch.bfloat16}
    module = Settings(tmp_path / "data", Kind.SMALL, many, **parts)
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=0, plugins=[SafeCheckpointIO()])
    check_settings(module, "model")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert found["path"] == str(tmp_path / "data")
    assert type(found["path"]) is str
    assert found["kind"] == "small"
    assert found["many"] == {"lr": 0.5, "sizes": (3, ["a"]), "array": [0, 1], "dtype": torch.bfloat16}
    assert {type(found["many"]["lr"]), type(found["many"]["sizes"][0])} == {float, int}
    again = Settings.load_from_checkpoint(tmp_path / "a.ckpt", **parts)
    assert again.hparams["path"] == str(tmp_path / "data")
    assert module.hparams["kind"] is Kind.SMALL, "the module keeps its own"
    odd = Settings(tmp_path, Kind.SMALL, 1, odd=Other(), **parts)
    with pytest.raises(ValueError, match=r"`model`: the hyperparameter 'odd' is a Other, .*\(ignore=\['odd'\]\)"):
        check_settings(odd, "model")


@pytest.mark.parametrize("tuning", ["all", "lora", "freeze"])
def test_no_frozen_part_is_in_a_checkpoint(tuning: str, tmp_path: Path) -> None:
    """Neither autoencoder nor text encoders, nor networks of callbacks, nor what is not trained of the backbone."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    encoder = TransformersText("random:embedded:tiny/sd3", "text_encoder", max_length=8, pooled=True)
    widths = {"joint_attention_dim": encoder.token_dim, "pooled_projection_dim": encoder.pooled_dim}
    module = LatentDiffusionModule(
        Autoencoder(tiny_kl()),
        FlowMatching(),
        tiny_sd3(**widths),
        Captions([encoder]),
        fine_tuning={"all": None, "lora": LoRA(rank=2), "freeze": Freeze(["transformer_blocks.0.*"])}[tuning],
    )
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1, "caption": ["a cat", "a dog"]}
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        max_steps=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        callbacks=[LPLCallback(), EMA(0.5), ModelCheckpoint(tmp_path, filename="a")],
        plugins=[SafeCheckpointIO()],
    )
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = set(found["state_dict"])
    assert not [name for name in names if name.startswith(("autoencoder.", "conditioner."))]
    buffers = {name for name in names if "pos_embed" in name}
    if tuning == "lora":
        assert names == set(trained)
        assert all("lora_" in name for name in names)
    elif tuning == "all":
        assert names == set(trained) | buffers
    assert set(found["lpl_lightning_averages"]["0.5"]) == set(trained)
    size = sum(parameter.numel() for parameter in trained.values())
    whole = sum(found["state_dict"][name].numel() for name in names)
    assert count(found) <= whole + 3 * size + 10_000, "weights, averages and two moments of what is trained"


def count(value: Any) -> int:
    """Numbers in all tensors of a checkpoint."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Mapping):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list | tuple) else 0
