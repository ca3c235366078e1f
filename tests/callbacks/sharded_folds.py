"""Runs one after the other under FSDP2 with one ``EMA``: what each begins with, beside what the last ended with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lpl_lightning import EMA, FSDP2Strategy
from lpl_lightning.sharding import is_sharded, whole


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        self.begins: list[Tensor] = []

    def configure_model(self) -> None:
        if not is_sharded(self):
            assert self.device_mesh is not None
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).sum()
        return loss

    def weight(self) -> Tensor:
        return whole(self.net.weight.detach()).clone()

    def on_train_start(self) -> None:
        self.begins.append(self.weight())


def main() -> None:
    module, ema = Module(), EMA(decay=0.5)
    trained: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            trained.append(module.weight())

    for name in ("first", "again", "set", "moved", "moved and set"):
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=FSDP2Strategy(process_group_backend="gloo"),
            devices=1,
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            callbacks=[ema, Keep()],
            default_root_dir=Path(sys.argv[1]),
        )
        if "moved" in name:  # as Lightning does from a GPU, before it calls teardown
            module.double().float()
            ema.teardown(trainer, module, "fit")
        if "set" in name:
            nn.init.constant_(module.net.weight, 5.0)
        last = trained[-1] if trained else module.weight()
        ones: Any = torch.ones(4, 2)
        trainer.fit(module, DataLoader(ones))
        begin = module.begins[-1]
        print(name, "trained" if torch.equal(begin, last) else begin.tolist())


if __name__ == "__main__":
    main()
