"""A run under FSDP2 that writes a folder of shards over another one, and reads it and one of a stranger."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from strangers import Runs
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.fsdp import fully_shard

from lpl_lightning.checkpoints import SafeCheckpointIO
from lpl_lightning.sharding import whole
from lpl_lightning.strategies import FSDP2Strategy


class Module(pl.LightningModule):
    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 1, bias=False)

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)


def trainer_of(in_folders: bool = True, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        strategy=FSDP2Strategy(save_distributed_checkpoint=in_folders),
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **options,
    )


def loader() -> Any:
    zeros: Any = torch.zeros(2, 2)
    return torch.utils.data.DataLoader(zeros)


def validate(module: Module, path: Path | None = None) -> pl.Trainer:
    trainer = trainer_of()
    trainer.validate(module, loader(), ckpt_path=path)
    return trainer


def fit(module: Module, steps: int, path: Path | None = None) -> pl.Trainer:
    trainer = trainer_of(max_steps=steps, limit_val_batches=0, limit_train_batches=1)
    trainer.fit(module, loader(), ckpt_path=path)
    return trainer


def main() -> None:
    folder = Path(sys.argv[1])
    stranger = folder / "stranger.ckpt"
    save: Any = vars(distributed_checkpoint)["save"]
    save({"state_dict": {"net.weight": Runs(folder / "ran")}}, checkpoint_id=stranger, no_dist=True)
    torch.save(
        {"pytorch-lightning_version": version("lightning"), "global_step": 0, "state_dict": {}}, stranger / "meta.pt"
    )
    try:
        validate(Module(), stranger)
    except ValueError as error:
        print(error)

    first = Module(Path("somewhere"))
    trainer = validate(first)
    own = folder / "own.ckpt"
    for value in (1.0, 2.0):
        nn.init.constant_(first.net.weight, value)
        trainer.save_checkpoint(own)
    second = Module()
    validate(second, own)
    kept = torch.load(own / "meta.pt", weights_only=True)["hyper_parameters"]
    print(whole(second.net.weight).tolist(), dict(kept), sorted(path.name for path in folder.glob("own*")))

    trained = fit(Module(), 1)
    for name, alone in (("alone.ckpt", True), ("all.ckpt", False)):
        trained.save_checkpoint(folder / name, weights_only=alone)
        validate(Module(), folder / name)
        try:
            print(name, fit(Module(), 2, folder / name).global_step)
        except ValueError as error:
            print(name, error)

    # A file takes the place of a folder, which is there until then.
    rename, moved = os.replace, []

    def replace(one: Path, other: Path) -> None:
        moved.append(one.is_dir())
        rename(one, other)

    vars(os)["replace"] = replace
    files = trainer_of(in_folders=False, plugins=[SafeCheckpointIO()])
    files.validate(Module(), loader(), ckpt_path=folder / "all.ckpt")
    files.save_checkpoint(folder / "all.ckpt")
    print("moved", moved, (folder / "all.ckpt").is_file())


if __name__ == "__main__":
    main()
