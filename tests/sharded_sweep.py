"""A sweep over the averages of a checkpoint, under FSDP2 and without, whose images are the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_kl, tiny_sd3
from evaluations import Weights, data, evaluation
from test_sweep import trainer

from lpl_lightning import EMA, Autoencoder, ClassTokens, FlowMatching, FSDP2Strategy, LatentDiffusionModule, Sampler


def module() -> LatentDiffusionModule:
    torch.manual_seed(0)
    return LatentDiffusionModule(
        Autoencoder(tiny_kl(scaling_factor=0.5)),
        FlowMatching(),
        tiny_sd3(),
        ClassTokens(8, token_dim=8, pooled_dim=8),
        sampler=Sampler(num_steps=2, guidance_scale=1.5),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    run = trainer(folder, max_steps=4, callbacks=[EMA(decay=0.5, also=[0.9]), Weights()], limit_val_batches=0)
    run.fit(module(), data())
    path = folder / "last.ckpt"
    run.save_checkpoint(path)
    sharded: Any = {"strategy": FSDP2Strategy(process_group_backend="gloo"), "devices": 1}
    for name, options in (("plain", {}), ("sharded", sharded)):
        swept = trainer(folder / name, callbacks=[evaluation()], **options)
        found = swept.sweep(module(), data(), str(path), ema=[None, 0.5, 0.9])
        print(name, *[report.images["hash"] for report in found.reports])


if __name__ == "__main__":
    main()
