"""Models of diffusers from a folder that ``save_pretrained`` wrote or from the Hugging Face hub.

The class is the one that the model's config names. Only safetensors are read: pickled weights can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.utils import is_accelerate_available
from torch import nn

from lpl_lightning.file_names import check_indices
from lpl_lightning.pretrained import check_fit, is_untrained, locate

__all__ = ["PRECISIONS", "load_model", "named_family"]

PRECISIONS: dict[str | None, torch.dtype | None] = {
    None: None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Precisions by the names that configs give them; None leaves a model as it is."""


def load_model(
    source: str, subfolder: str | None, dtype: torch.dtype, argument: str, unnamed: str = "AutoencoderKL"
) -> nn.Module:
    """Load a model.

    Args:
        source: A folder, a hub id or ``embedded:NAME``; behind ``random:`` its config is taken alone and the weights
            are drawn anew.
        subfolder: Subfolder of the folder or hub repository, such as ``transformer`` in that of a pipeline.
        dtype: Precision of the weights.
        argument: Name of the argument that ``source`` came by, for the errors.
        unnamed: The class where the config names none.

    Returns:
        The model, its weights checked to fit.

    Raises:
        FileNotFoundError: The source, or a file that belongs to it, is not there.
        ValueError: Its class is unknown, or its weights are of another model.
    """
    untrained, name = is_untrained(source)
    found = locate(name, argument)
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if isinstance(found, Path):
        where["local_files_only"] = True
        if not (found / (subfolder or "") / "config.json").is_file():
            raise FileNotFoundError(
                f"`{argument}`={source!r} holds no config.json: expected a folder that save_pretrained wrote"
                + (f", in its subfolder {subfolder!r}." if subfolder else "; is it in a subfolder (`subfolder`)?")
            )
        check_indices(found / (subfolder or ""))
    try:
        config = AutoencoderKL.load_config(str(found), **where)
    except OSError as error:
        raise FileNotFoundError(_cannot_be_loaded(source, subfolder, argument, error, found)) from error
    family = named_family(config, source, argument, unnamed)
    if untrained:
        # nn.Module's own `to`: that of diffusers' models warns of float32 parts even where there are none.
        return cast(nn.Module, nn.Module.to(family.from_config(config), dtype))
    # Without accelerate, which nothing else here needs, weights are held twice while they are read.
    options = {"low_cpu_mem_usage": is_accelerate_available(), "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = family.from_pretrained(str(found), torch_dtype=dtype, **options, **where)
    except OSError as error:
        raise FileNotFoundError(_cannot_be_loaded(source, subfolder, argument, error, found)) from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(_cannot_be_loaded(source, subfolder, argument, error, found)) from error
    if info["missing_keys"]:
        own = model.state_dict()
        check_fit(own, {name: own[name] for name in own if name not in info["missing_keys"]}, source)
    return cast(nn.Module, model)


def _cannot_be_loaded(source: str, subfolder: str | None, argument: str, error: Exception, found: object) -> str:
    gone = ""
    if isinstance(error, OSError) and not isinstance(found, Path):
        gone = "there is no such folder, and the hub did not give it (is there a network, and such a model?); "
    return (
        f"`{argument}`={source!r} cannot be loaded: {gone}expected config.json and safetensors weights that fit it"
        + (f" in {subfolder!r}" if subfolder else "")
        + f". Pickled weights (.bin) are not read: save them with safe_serialization=True. diffusers said: {error}"
    )


def named_family(config: Mapping[str, Any], source: str, argument: str, unnamed: str) -> Any:
    """The class of diffusers that a config names.

    Args:
        config: The model's config.
        source: Where it is from, for the error.
        argument: Name of the argument that ``source`` came by.
        unnamed: The class where the config names none.

    Raises:
        ValueError: The installed diffusers has no such model.
    """
    name = config.get("_class_name", unnamed)
    family = getattr(diffusers, name, None)
    if not (isinstance(family, type) and issubclass(family, nn.Module)):
        raise ValueError(
            f"`{argument}`={source!r} is a {name!r}, which is no model in the installed diffusers. Upgrade it, or give "
            "another config."
        )
    return family
