"""Trains through kills and faults, and says whether the end equals that of a run that was left alone.

    python tests/soak.py FOLDER --kills 20 --steps 4000

The quickstart's model trains on a folder of images: LPL with a calibrated and ramped weight, two averages, accumulated
gradients, random crops, loader processes. One run is left alone. Another is killed by ``SIGKILL``, or now and then
stopped by ``SIGTERM`` to it and its loader processes, after a random number of steps; before it goes on, a fault may be
made: the newest checkpoint is deleted or cut off, the disk is full for the next checkpoint, images that cannot be read
appear. FOLDER gets the files of both, ``record.jsonl``, a line for each thing that was done, and ``verdict.json``. It
exits with 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("nothing", "deleted", "cut off", "full disk", "corrupt images")


class Losses(Callback):
    """Appends the loss of each batch, and of each validation, to a file, as an exact hexadecimal number.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append it."""
        self._append("batch", trainer, outputs["loss"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append it."""
        if not trainer.sanity_checking:
            self._append("validation", trainer, trainer.callback_metrics["val_loss"])

    def _append(self, kind: str, trainer: pl.Trainer, loss: torch.Tensor) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({kind: trainer.fit_loop.total_batch_idx + 1, "loss": float(loss).hex()}) + "\n")


def made_photos(folder: Path, count: int, side: int = 72) -> None:
    """Images of smooth colour and noise, in eight classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 8}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        noise = rng.integers(-20, 20, (side, side, 3))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) + noise
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:04d}.png")


def corrupt_photos(folder: Path, number: int) -> None:
    """New files that look like images and are none."""
    whole = next(folder.glob("class0/*.png")).read_bytes()
    for name, content in (("empty.png", b""), ("cut.png", whole[: len(whole) // 3]), ("text.jpg", b"no image")):
        (folder / "class1" / f"bad{number}-{name}").write_bytes(content)


def arguments(photos: Path, run: Path, steps: int, every: int, batch_size: int) -> list[str]:
    """Of ``lpl fit``; the same each time."""
    saving = {"every_n_train_steps": every, "monitor": "step", "mode": "max", "save_top_k": 3, "save_last": False}
    perceptual = {"weight": "auto", "calibration_steps": 4, "start_step": 3, "ramp_steps": 20}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
        {"class_path": "lpl_lightning.EMA", "init_args": {"decay": 0.99, "also": [0.9]}},
        {"class_path": "lpl_lightning.LPLCallback", "init_args": perceptual},
        {"class_path": "soak.Losses", "init_args": {"path": str(run / "losses.jsonl")}},
    ]
    given: Mapping[str, Any] = {
        "trainer.max_steps": steps,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 4 * every,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 5,
        "trainer.enable_progress_bar": "false",
        "trainer.logger.init_args.save_dir": run,
        "trainer.logger.init_args.name": "soak",
        "trainer.callbacks": json.dumps(callbacks),
        "model.init_args.lr_scheduler.init_args.T_max": steps,
        "data": "lpl_lightning.data.ImageFolderDataModule",
        "data.root": photos,
        "data.image_size": 64,
        "data.val_fraction": 0.1,
        "data.crop": "random",
        "data.horizontal_flip": "true",
        "data.batch_size": batch_size,
        "data.num_workers": 2,
        "data.verify": "true",
        "data.max_bad_share": 0.9,
        "validation.num_images": 0,
        "model.init_args.conditioner.init_args.num_classes": 8,
        "ckpt_path": "last",
    }
    options = [f"--{key}={value}" for key, value in given.items()]
    return ["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), *options]


def start(args: Sequence[str], log: Path, largest_file: int | None = None) -> int:
    """Run ``lpl`` in a process of its own; what takes long to import is there already. Returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        from lpl_lightning.cli import main

        sys.argv = ["lpl", *args]
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(child: int) -> int | None:
    """The exit status of a process, negative a signal's number; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def losses(run: Path, kind: str = "batch") -> dict[int, str]:
    """What each batch's loss was, or each validation's, the last time that it came; as exact hexadecimal numbers."""
    path = run / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line[kind]: line["loss"] for line in found if kind in line}


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted(run.glob("soak/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two checkpoints are not the same, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        missing = [f"{place}/{key}" for key in keys if (key in one) != (key in other)]
        both = [key for key in keys if key in one and key in other]
        return missing + [found for key in both for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [place]
        return [f for i, pair in enumerate(zip(one, other, strict=True)) for f in differences(*pair, f"{place}/{i}")]
    return [] if one == other else [place]


def state(path: Path) -> dict[str, Any]:
    """What a run goes on from, without where and when it was run."""
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # Their paths, and their best so far, say where the run was.
    found["callbacks"] = {k: v for k, v in found["callbacks"].items() if not k.startswith("ModelCheckpoint")}
    # Nor its loops, in which Lightning counts how often it was started.
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch")
    return {key: value for key, value in found.items() if key in kept or "model_state" in key or "averages" in key}


def soak(folder: Path, kills: int, steps: int, every: int, seed: int, photos: int, batch_size: int) -> dict[str, Any]:
    """Train both, and compare."""
    folder.mkdir(parents=True)
    record = (folder / "record.jsonl").open("w")
    began = time.monotonic()

    def note(**what: Any) -> None:
        print(json.dumps({"seconds": round(time.monotonic() - began, 1), **what}), file=record, flush=True)

    images, alone, killed = folder / "photos", folder / "alone", folder / "killed"
    made_photos(images, photos)
    for run in (alone, killed):
        run.mkdir()
    shutil.copytree(images, folder / "photos_alone")
    child = start(arguments(folder / "photos_alone", alone, steps, every, batch_size), folder / "alone.log")
    while (status := ended(child)) is None:
        time.sleep(0.05)
    note(run="alone", status=status)
    if status:
        return {"equal": False, "why": f"the run that is left alone ended with {status}"}

    choose, args = random.Random(seed), arguments(images, killed, steps, every, batch_size)
    counts = {"SIGKILL": 0, "SIGTERM": 0} | dict.fromkeys(FAULTS, 0)
    faults = list((FAULTS * kills)[:kills])
    choose.shuffle(faults)
    batches = 2 * steps
    while True:
        done = counts["SIGKILL"] + counts["SIGTERM"]
        fault = faults[done - 1] if done else "nothing"
        limit = None
        if done:
            counts[fault] += 1
            found = checkpoints(killed)
            if fault == "deleted" and found:
                found[-1].unlink()
            elif fault == "cut off" and found:
                os.truncate(found[-1], choose.randrange(found[-1].stat().st_size))
            elif fault == "corrupt images":
                corrupt_photos(images, done)
            elif fault == "full disk" and found:
                limit = found[-1].stat().st_size // 2
            note(fault=fault, checkpoints=len(found))
        at = max(losses(killed), default=0)
        child = start(args, folder / "killed.log", limit)
        ahead = (batches - at) / max(1, kills - done)
        to = at + 1 + int(choose.uniform(0, 2 * ahead)) if done < kills else batches + 1
        signum = signal.SIGTERM if choose.random() < 0.25 else signal.SIGKILL
        while (status := ended(child)) is None:
            now = losses(killed)
            if limit is None and len(now) and max(now) >= min(to, batches - 1) and done < kills:
                (os.killpg if signum == signal.SIGTERM else os.kill)(child, signum)
                while (status := ended(child)) is None:
                    time.sleep(0.01)
                break
            time.sleep(0.05)
        note(killed_by=signum.name if status and limit is None else None, status=status, batch=max(losses(killed)))
        if limit is not None:
            if status != 1:
                return {"equal": False, "why": f"a full disk ended with {status}, not with an error", **counts}
            faults[done - 1] = "nothing"  # there is room again
            continue
        if status == 0:
            break
        if status not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            return {"equal": False, "why": f"a run ended with {status}", **counts}
        counts[signum.name] += 1
    one, other = (state(checkpoints(run)[-1]) for run in (alone, killed))
    unequal = differences(one, other)
    verdict: dict[str, Any] = {"equal": not unequal, "where": unequal[:20]}
    for kind in ("batch", "validation"):
        first, second = losses(alone, kind), losses(killed, kind)
        if kind == "validation" and batches not in second:
            first.pop(batches, None)  # after a kill behind the last step there is nothing to go on with
        unlike = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
        verdict["equal"] &= not unlike
        verdict |= {f"{kind} losses": len(first), f"unequal {kind} losses": unlike[:20]}
    verdict |= {"seconds": round(time.monotonic() - began, 1), **counts}
    (folder / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n")
    return verdict


def main() -> None:
    """Run it, and exit with 1 if the two are not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of two batches")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=8)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import lpl_lightning.cli  # noqa: F401  once, for all runs

    found = soak(**vars(given))
    print(json.dumps(found))
    raise SystemExit(0 if found["equal"] else 1)


if __name__ == "__main__":
    main()
