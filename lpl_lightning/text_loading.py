"""Text encoders and tokenizers of transformers and open_clip, from folders and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from lpl_lightning.file_names import check_indices
from lpl_lightning.pretrained import is_untrained, locate

__all__ = ["create_open_clip", "find_tokenizer", "load_text_encoder", "optional", "said_of"]

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def optional(library: str) -> Any:
    """Import a library that not everyone has.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise ModuleNotFoundError(f'Run pip install "lpl-lightning[text]": {error}', name=library) from error


def said_of(error: Exception) -> str:
    """What a library said, without its advice to run code."""
    text = str(error)
    return "it needs code of its own, which is not run" if "trust_remote_code" in text else text


def load_text_encoder(source: nn.Module | str, subfolder: str | None, dtype: torch.dtype) -> nn.Module:
    """Load the text encoder that a config names.

    Args:
        source: A folder that ``save_pretrained`` wrote, a hub id or ``embedded:NAME``; behind ``random:`` its config is
            taken alone and the weights are drawn anew. A module is taken as it is.
        subfolder: Subfolder of the folder or hub repository.
        dtype: Precision of the weights.

    Returns:
        The model, of the class that its config names, its weights checked to fit.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: Its class is unknown, or its weights are of another model.
    """
    if isinstance(source, nn.Module):
        return source.to(dtype)
    transformers, (untrained, name) = optional("transformers"), is_untrained(source)
    found = locate(name, "model")
    where: dict[str, Any] = {"subfolder": subfolder or "", "local_files_only": isinstance(found, Path)}
    missing = (
        f"The text encoder `model`={source!r}, `subfolder`={subfolder!r} is not there: expected config.json and "
        "safetensors weights (no .bin) as save_pretrained writes them. Download it, or mend `model` and `subfolder`."
    )
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(str(found), **where)
        if not settings:
            raise FileNotFoundError("there is no config.json")
        architecture = next(iter(settings.get("architectures") or ()), "none")
        family: Any = getattr(transformers, str(architecture), None)
        if not _is_model(family):
            raise ValueError(
                f"`model`={source!r} is of the class {architecture!r}, which transformers does not have, or not as a "
                "model."
            )
        if isinstance(found, Path):
            check_indices(found / (subfolder or ""))
        if untrained:
            return cast(nn.Module, family(family.config_class.from_dict(settings)).to(dtype))
        where |= {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
        model, info = family.from_pretrained(str(found), **where)
    except OSError as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"The weights in {source!r} are of another model than its config says: {error}") from error
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{len(lacking)} weights of its {architecture} are not in {source!r}, such as {lacking[0]!r}.")
    return cast(nn.Module, model)


def _is_model(family: Any) -> bool:
    return isinstance(family, type) and issubclass(family, optional("transformers").PreTrainedModel)


def create_open_clip(model_name: str, pretrained: str | None, **options: Any) -> Any:
    """Make a model of open_clip's, on the CPU, unless that is to run code.

    Args:
        model_name: Its name, as open_clip takes it.
        pretrained: A tag of open_clip's, or a file of weights.
        options: Those of ``open_clip.create_model``.

    Raises:
        ValueError: Its config asks for code to be run, or its weights could run some.
        Exception: What open_clip says of names and weights.
    """
    open_clip = optional("open_clip")
    config = open_clip.get_model_config(model_name)
    text = config.get("text_cfg") if isinstance(config, dict) else None
    of_tokenizer = text.get("tokenizer_kwargs") if isinstance(text, dict) else None
    if isinstance(of_tokenizer, dict) and of_tokenizer.get("trust_remote_code"):
        raise ValueError(
            "its config has `trust_remote_code` among `tokenizer_kwargs`, which runs what lies beside it. Take it out "
            "there, if the tokenizer needs no code."
        )
    try:
        return open_clip.create_model(model_name, pretrained, device="cpu", **options)
    except (UnpicklingError, SafetensorError) as error:
        raise ValueError(
            "its weights cannot be read: a pickle that could run code, or no weights. Take those in safetensors."
        ) from error


def find_tokenizer(places: Sequence[tuple[str, str]]) -> Any:
    """Load a tokenizer.

    Args:
        places: Sources and their subfolders, of which the first that has one is taken.

    Raises:
        FileNotFoundError: None has one.
    """
    found_wrong, transformers = "", optional("transformers")
    for source, subfolder in places:
        found = locate(is_untrained(source)[1], "tokenizer")
        # transformers makes an empty tokenizer of a folder without a vocabulary.
        if isinstance(found, Path) and not any((found / subfolder / name).is_file() for name in _VOCABULARIES):
            continue
        where: dict[str, Any] = {"subfolder": subfolder, "local_files_only": isinstance(found, Path)}
        where["trust_remote_code"] = False  # unless that is said, transformers asks on the terminal
        try:
            return transformers.AutoTokenizer.from_pretrained(str(found), padding_side="right", **where)
        except (OSError, ValueError, ImportError) as error:
            found_wrong = f" transformers said: {said_of(error)}"
    tried = " or ".join(repr("/".join(filter(None, place))) for place in places)
    what = f"There is no tokenizer in {tried}: expected tokenizer.json, or tokenizer_config.json with a vocabulary"
    raise FileNotFoundError(f"{what}. Give `tokenizer`, and `tokenizer_subfolder` where it is in one.{found_wrong}")
