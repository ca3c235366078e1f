"""Where trained weights are from, as the metadata of their safetensors files say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from safetensors import SafetensorError, safe_open

from lpl_lightning.metrics.tensor_files import add_metadata
from lpl_lightning.module import LatentDiffusionModule

__all__ = ["check_replaceable", "note", "provenance"]

_LIBRARIES = ("lpl-lightning", "torch", "lightning", "diffusers", "peft")


def provenance(
    module: pl.LightningModule,
    step: int | None = None,
    epoch: int | None = None,
    decay: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What the files of a module's weights say of them.

    ``versions``; ``step`` and ``epoch``, where they are known; ``weights``, whether they are an average; ``base``, what
    they were trained from, where that was something; as JSON, ``model``, what the weights mean, and ``config``, all
    that the model is built of, where the command line built it. It names folders as the config does.

    Args:
        module: The module.
        step: Optimizer steps that it was trained for.
        epoch: Epochs that it has begun.
        decay: Decay of the moving average that its weights are; None for weights as they were trained.
        config: What the command line built it of; by default what the module knows of that.
    """
    found = {"versions": ", ".join(_versions())}
    for name, value in (("step", step), ("epoch", epoch)):
        if value is not None:
            found[name] = str(value)
    found["weights"] = "as they were trained" if decay is None else f"moving average of decay {decay:g}"
    parameters = dict(module.hparams if config is None else config)
    if isinstance(module, LatentDiffusionModule):
        own = getattr(module.denoiser.backbone, "config", {})
        if base := module.base or (own.get("_name_or_path") if hasattr(own, "get") else None):
            found["base"] = str(base)
        parts = {name: type(getattr(module, name)).__name__ for name in ("denoiser", "noise", "autoencoder")}
        found["model"] = json.dumps({"module": type(module).__name__, **parts, **module.meaning()})
    if parameters.pop("_instantiator", None) is not None:
        found["config"] = json.dumps(parameters, default=str)
    return found


def note(folder: Path, metadata: dict[str, str]) -> None:
    """Say in each safetensors file of a folder where it is from, beside what it says already."""
    for path in sorted(folder.glob("*.safetensors")):
        add_metadata(path, metadata)


def check_replaceable(target: Path, run: Path, argument: str) -> None:
    """Refuse to write over what no run has left.

    Args:
        target: File or folder that is to be written.
        run: Folder of the run, in which it must lie.
        argument: What named the target.

    Raises:
        ValueError: The target is outside the run's folder, or holds something else than weights that were noted.
    """
    if run.resolve() not in target.resolve().parents:
        raise ValueError(f"`{argument}` must lie in the run's folder, {run}, got {target}. Give a name in it.")
    known = [target] if target.is_file() else [*target.glob("*.safetensors"), *target.glob("*/*.safetensors")]
    if (target.is_file() or any(target.glob("*"))) and not any(map(_is_noted, known)):
        raise ValueError(
            f"`{argument}`: {target} is there already, and nothing in it says that a run has left it. Give another "
            "name, move what is there, or give the trainer a logger, so that each run has a folder of its own."
        )


def _is_noted(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return {"versions", "weights"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def _versions() -> list[str]:
    found = []
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:  # run from a checkout, or not installed
            continue
    return found
