"""What something was made with, as JSON holds it: settings that can be compared, and put into a file's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lpl_lightning.captions import Captions
from lpl_lightning.fine_tuning import LoRA
from lpl_lightning.frozen import weights_hash
from lpl_lightning.latents import config_of
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.sharding import original_class, whole

__all__ = ["as_json", "attributes", "described", "differing", "digest", "model_settings", "tensors_hash"]

_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def as_json(settings: Any) -> Any:
    """Settings as they come back from a file, where tuples are lists."""
    return json.loads(json.dumps(settings, default=str))


def digest(settings: Any, size: int = 4) -> str:
    """Settings as ``2 * size`` hexadecimal digits, for names."""
    return blake2b(json.dumps(as_json(settings), sort_keys=True).encode(), digest_size=size).hexdigest()


def attributes(part: object) -> dict[str, Any]:
    """Class and public attributes of an object: plain values, dataclasses, and the hash of what has one.

    Modules and tensors are no part of it, since a hash of weights says what they are.
    """
    found: dict[str, Any] = {"class": original_class(part).__name__}
    for name, value in vars(part).items():
        if name.startswith("_") or name == "training":
            continue
        if is_dataclass(value) and isinstance(known := getattr(value, "hash", None), str):
            found[name] = known
        elif is_dataclass(value) and not isinstance(value, type):
            found[name] = {"class": type(value).__name__, **asdict(value)}
        elif isinstance(value, _PLAIN):
            found[name] = value
    return found


def described(part: Any) -> dict[str, Any]:
    """Class and config of a part of diffusers, without its private keys, whose order differs between processes."""
    public = {key: value for key, value in config_of(part).items() if not key.startswith("_")}
    return {"class": original_class(part).__name__, **public}


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A blake2b hash of names, dtypes, shapes and values. All processes must call it where they share the tensors."""
    found = blake2b(digest_size=16)
    for name, tensor in tensors:
        values = whole(tensor.detach())
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        # A copy: memory that NumPy was given cannot be freed, as that of gathered shards is to be.
        copy = values.to("cpu", copy=True).contiguous()
        found.update(copy.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def model_settings(module: LatentDiffusionModule, autoencoder: str | None = None) -> dict[str, Any]:
    """All that a model is: its weights, frozen ones too, which a state dict may leave out, and what is not in them.

    Args:
        module: The model.
        autoencoder: ``weights_hash`` of its autoencoder's model, where it is known.
    """
    denoiser, conditioner, decoding = module.denoiser, module.conditioner, module.autoencoder
    weights = (*denoiser.named_parameters(), *denoiser.named_buffers(), *conditioner.state_dict().items())
    own = attributes(denoiser)
    own.pop("is_pretrained", None)  # where they were loaded from
    settings: dict[str, Any] = {
        "weights_blake2b": tensors_hash(weights),
        "denoiser": {**own, "backbone": described(denoiser.backbone)},
        "autoencoder": {
            **described(decoding.model),
            "weights": weights_hash(decoding.model) if autoencoder is None else autoencoder,
            "latent_shift": decoding.shift.tolist(),
            "latent_scale": decoding.scale.tolist(),
            "decoded_in": str(decoding.dtype),
            "autocast": decoding.autocast,
        },
    }
    if isinstance(conditioner, Captions):
        settings["text"] = conditioner.fingerprint()
    if isinstance(module.fine_tuning, LoRA):
        settings["lora"] = {"rank": module.fine_tuning.rank, "alpha": module.fine_tuning.alpha}
    found: dict[str, Any] = as_json(settings)
    return found


def differing(known: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names of the settings that differ; empty where none does."""
    return ", ".join(sorted(key for key in {**known, **settings} if known.get(key) != settings.get(key)))
