"""Autoencoders from files: a folder that diffusers wrote, a single .safetensors file, or a Hugging Face hub id.

A single file holds weights under diffusers' names or under those of the original release (such as
``first_stage_model.decoder.up.0.block.0.conv1.weight``), which diffusers converts for the classes it can.
Nothing that may run code when it is read, as pickled weights may, is ever read.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lpl_lightning.model_loading import load_model, named_family
from lpl_lightning.pretrained import check_fit, is_untrained, locate

__all__ = ["load_autoencoder"]

# Attention under the names of diffusers before 0.12, as many published files still have it.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_ORIGINAL_PREFIXES = ("first_stage_model.", "vae.")  # of the autoencoder in a file that holds a whole pipeline


def load_autoencoder(source: str, subfolder: str | None, config: str | None, dtype: torch.dtype) -> nn.Module:
    """Load an autoencoder of the class that its config names.

    Args:
        source: A folder that ``save_pretrained`` wrote, a .safetensors file, a hub id, or ``embedded:NAME``; a folder
            or hub id behind ``random:`` gives its config alone, with random weights.
        subfolder: Subfolder of the folder or hub repository; of ``config``'s with a single file.
        config: For a single file: a folder with config.json, a JSON file or a hub id. By default config.json beside
            the file; without that, diffusers guesses the model by its weights and fetches its config from the hub.
        dtype: Precision wanted; weights stored in a lower one are raised to it.

    Returns:
        The model, its weights checked to fit.

    Raises:
        FileNotFoundError: The source, or a file that belongs to it, is not there.
        ValueError: The file is of a format that is not read, or its weights are not of its config's model.
    """
    found = locate(is_untrained(source)[1], "model")
    # Weights are read in float32 at least, so that the numbers made from them, such as running means, are not rounded.
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(found, Path) and found.is_file():
        return _load_file(found, subfolder, config, dtype)
    if config is not None:
        raise ValueError(
            f"`config`={config!r} is for a single .safetensors file, got `model`={source!r}, which holds its own. "
            "Leave `config` out."
        )
    return load_model(source, subfolder, dtype, "model")


def _load_file(path: Path, subfolder: str | None, config: str | None, dtype: torch.dtype) -> nn.Module:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`model`={str(path)!r} must be a .safetensors file or a folder, got {path.suffix or 'no suffix'}. Pickled "
            "files such as .ckpt, .pth and .bin can run code when they are read: convert it with "
            "safetensors.torch.save_file."
        )
    settings = _read_config(path, subfolder, config)
    family = named_family(settings, str(path), "model", "AutoencoderKL")
    state = _read_weights(path)
    model = family.from_config(settings).to(dtype)
    own = model.state_dict()
    renamed = {_renamed(name): tensor for name, tensor in state.items()}
    if 2 * len(own.keys() & renamed.keys()) < len(own) and hasattr(family, "from_single_file"):
        return _converted(family, settings, state, str(path), dtype)
    check_fit(own, renamed, str(path))
    model.load_state_dict(renamed)
    return cast(nn.Module, model)


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if ".attentions." in name:
            name = name.replace(old, new)
    return name


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The file's weights; of a whole pipeline, which may be gigabytes, only those of its autoencoder."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prefix = next((p for p in _ORIGINAL_PREFIXES if any(name.startswith(p) for name in names)), "")
            return {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except SafetensorError as error:
        raise ValueError(f"`model`={str(path)!r} cannot be read as safetensors: {error}") from error


def _read_config(path: Path, subfolder: str | None, config: str | None) -> dict[str, Any]:
    """The config given, or that beside the file, or one that fits from the hub."""
    if config is None:
        beside = path.with_name("config.json")
        return cast(dict[str, Any], AutoencoderKL.load_config(str(beside))) if beside.is_file() else _guess_config(path)
    found = locate(config, "config")
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder and not Path(found).is_file() else {}
    try:
        return cast(dict[str, Any], AutoencoderKL.load_config(str(found), **where))
    except OSError as error:
        raise FileNotFoundError(
            f"`config`={config!r} holds no config of an autoencoder: expected a folder with config.json"
            + (f" in its subfolder {subfolder!r}" if subfolder else "")
            + f", a JSON file or a hub id. diffusers said: {error}"
        ) from error


def _converted(
    family: Any, settings: dict[str, Any], state: dict[str, Tensor], source: str, dtype: torch.dtype
) -> nn.Module:
    """Let diffusers convert the names of the original release, and see that it found every weight."""

    def load(state: dict[str, Tensor]) -> nn.Module:
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(settings))
            options = {"torch_dtype": dtype, "local_files_only": True, "low_cpu_mem_usage": False}
            return cast(nn.Module, family.from_single_file(state, config=folder, **options))

    try:
        # from_single_file leaves what it does not find as it was made; loaded from nothing but nan, that shows.
        marked = load({name: torch.full_like(w, torch.nan) for name, w in state.items() if w.is_floating_point()})
        model = load(state)
    except Exception as error:  # whatever goes wrong in a conversion, the file is not what its config says
        raise ValueError(
            f"The weights in {source} are of another model: diffusers cannot convert them to {family.__name__} with "
            f"this config ({error}). Give the config of the model that they were trained with."
        ) from error
    found = {name: tensor for name, tensor in marked.state_dict().items() if bool(tensor.isnan().all())}
    check_fit(marked.state_dict(), found, source)
    return model


def _guess_config(path: Path) -> dict[str, Any]:
    """Let diffusers tell the model by its weights and take its config from the hub."""
    try:
        return dict(AutoencoderKL.from_single_file(str(path), low_cpu_mem_usage=False).config)
    except Exception as error:  # network, cache, conversion: the remedy is the same
        raise ValueError(
            f"`model`={str(path)!r} has no config.json beside it, and diffusers could not find one that fits on the "
            f"hub ({error}). Give `config`: a folder with config.json, a JSON file, or a hub id such as "
            "'stabilityai/sdxl-vae'."
        ) from error
