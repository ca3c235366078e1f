"""Which checkpoint a command of ``lpl`` takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpl_lightning.base_weights import BaseWeights
from lpl_lightning.checkpoints import check_checkpoint, checkpoint_folders, newest_checkpoint, notes_of
from lpl_lightning.module import LatentDiffusionModule

__all__ = ["check_inherited", "find_checkpoint"]


def check_inherited(command: str, given: str | None, configs: Iterable[Path]) -> bool:
    """Refuse to look at the checkpoint that a run went on from, which the run's own config names.

    Args:
        command: The command.
        given: What the configs say.
        configs: Their files. That of a run has the run's checkpoints beside it.

    Returns:
        Whether it is a run's own config that says so.

    Raises:
        ValueError: It is such.
    """
    inherited = False
    for path in configs:
        own = path.with_name("checkpoints")
        if given is None or not own.is_dir() or (yaml.safe_load(path.read_text()) or {}).get("ckpt_path") != given:
            continue
        inherited = True
        if given != "last" and Path(given).absolute().parent != own.absolute():
            raise ValueError(
                f"`ckpt_path`: {path} names {given}, from which its run went on: give `lpl {command}` the checkpoint "
                f"to look at by `--ckpt_path`, such as one of {own}, or last."
            )
    return inherited


def find_checkpoint(
    trainer: pl.Trainer, module: pl.LightningModule, command: str, given: str | None, of_run: bool = False
) -> str | None:
    """Find what ``last`` means, the newest whole checkpoint of this configuration, and look through a folder.

    Training goes on with runs that began from the same weights alone, and what a run's own config calls the last is of
    these. Lightning would read a distributed checkpoint's index, a pickle, and go on without the last one there is not.

    Args:
        trainer: The trainer.
        module: The model.
        command: The command.
        given: A checkpoint, ``last`` or None.
        of_run: Whether a run's own config says so.

    Returns:
        The checkpoint; None where training starts anew, or none is given.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: There is no last one to look at, the folder is not whole, or the best is asked for, which Lightning
            knows of a training in the same process alone.
    """
    if given == "best":
        raise ValueError(
            "`ckpt_path` must be a checkpoint or last, got best: give that by its path, which a run says at its end."
        )
    found = given
    if given == "last":
        to_train = command == "fit"
        is_other = _Others(module) if (to_train or of_run) and isinstance(module, LatentDiffusionModule) else None
        newest = newest_checkpoint(trainer, to_train, is_other)
        if newest is None:
            where = ", ".join(map(str, checkpoint_folders(trainer))) or "any folder"
            if not to_train:
                raise ValueError(
                    f"`ckpt_path` is last, and there is no checkpoint in {where}: give `lpl {command}` one by its "
                    "path, or leave it out by `--ckpt_path null`."
                )
            rank_zero_info(f"No checkpoint to go on with in {where}: training starts anew.")
        found = None if newest is None else str(newest)
    if found and Path(found).is_dir():
        check_checkpoint(Path(found))
    if found and command == "fit":
        _say_if_done(trainer, Path(found))
    return found


class _Others:
    """Tells checkpoints of runs that began from other weights than a model, of which each kind is named once."""

    def __init__(self, module: LatentDiffusionModule) -> None:
        self.begun = module.begun
        self.named: list[BaseWeights] = []

    def __call__(self, path: Path) -> bool:
        notes = notes_of(path)
        begun = None if notes is None else BaseWeights.begun_by(notes)
        if begun is None or begun.are(self.begun):
            return False
        if begun not in self.named:
            self.named.append(begun)
            rank_zero_warn(
                f"{path} is passed over, and so are others like it: its run began from {begun}, this one begins from "
                f"{self.begun}. To take it all the same, give its path as `ckpt_path`."
            )
        return True


def _say_if_done(trainer: pl.Trainer, path: Path) -> None:
    step = (notes_of(path) or {}).get("global_step", 0)
    if 0 <= trainer.max_steps <= step:
        rank_zero_info(
            f"`trainer.max_steps` is {trainer.max_steps}, and {path} is of step {step}: nothing is left to do."
        )
