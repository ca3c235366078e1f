"""Trains on buckets with two CPU processes, of which this is one, and writes what it was given.

``LOCAL_RANK=RANK MASTER_PORT=PORT python bucket_ranks.py PHOTOS FOLDER`` stops after three steps and goes on from the
checkpoint; FOLDER/RANK.json has the batches of both runs.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from rectangles import Mean, Seen, photos

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(sys.argv[2])
    runs = []
    for steps, ckpt_path in ((3, None), (9, folder / "last.ckpt")):
        seen = Seen()
        torch.manual_seed(0)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            callbacks=[seen, ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=3,
            check_val_every_n_epoch=None,
        )
        options: dict[str, Any] = {} if ckpt_path is None else {"ckpt_path": str(ckpt_path), "weights_only": True}
        mean = Mean()
        trainer.fit(mean, photos(Path(sys.argv[1]), batch_size=2), **options)
        runs.append({"train": seen.train, "val": seen.val, "weight": float(mean.line.weight)})
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(runs))
