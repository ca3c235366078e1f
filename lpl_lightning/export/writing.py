"""What was trained, as files that diffusers' own pipelines load."""

from __future__ import annotations

import inspect
import shutil
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import diffusers
import torch
from diffusers.utils import logging
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file, save_model

from lpl_lightning.agreement import MEANING
from lpl_lightning.arguments import refusal
from lpl_lightning.backbones import FluxDenoiser
from lpl_lightning.captions import Captions
from lpl_lightning.conditioning import ClassTokens
from lpl_lightning.export.parts import Target, autoencoder_part, converted, copied, scheduler_part, target_of
from lpl_lightning.export.provenance import note, provenance
from lpl_lightning.export.text import text_parts
from lpl_lightning.fine_tuning import LoRA
from lpl_lightning.metrics.tensor_files import open_to_others
from lpl_lightning.model_loading import PRECISIONS
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.own_files import find_own_modules
from lpl_lightning.pretrained import chosen_state, read_checkpoint

__all__ = ["ExportPrecision", "export_checkpoint", "export_diffusers"]

ExportPrecision = Literal["float32", "float16", "bfloat16"]
CLASSES = "class_embeddings.safetensors"
_NULL_OF_DIT = 1000


def export_diffusers(
    module: LatentDiffusionModule,
    folder: str | Path,
    dtype: ExportPrecision | None = None,
    *,
    replace: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a module as a diffusers pipeline or, where it was trained by LoRA, what a pipeline loads as one.

    A pipeline's folder holds the backbone, the autoencoder, the scheduler and, for captions, the text encoders and
    tokenizers. Trained embeddings of classes are in ``class_embeddings.safetensors``, to be given as ``prompt_embeds``:
    ``tokens`` (N + 1, L, D) and ``pooled`` (N + 1, P), the last row for the null condition. For a ``Denoiser`` of
    another kind there is the backbone alone, in ``backbone/``.

    Args:
        module: What to write. It is left as it is.
        folder: Where to; nothing is there until all of it is.
        dtype: Precision of all weights; None leaves them in their own.
        replace: Whether what is in ``folder`` already is replaced.
        metadata: What the safetensors files of trained weights say of them; by default what ``provenance`` knows.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: The pipeline needs a library of an extra.
        ValueError: ``folder`` is not empty, or ``dtype`` is unknown.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"`dtype` must be one of {tuple(PRECISIONS)}, got {dtype!r}.")
    folder = Path(folder).expanduser().resolve()
    if not replace:
        _check_empty(folder, "folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_empty = folder.exists() and not replace  # such as a volume, beside which another file system lies
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder if is_empty else folder.parent) as beside:
        partial = Path(beside) / folder.name
        partial.mkdir()
        try:
            said = _write(module, partial, PRECISIONS[dtype], folder)
        except ModuleNotFoundError:
            raise
        except ImportError as error:  # which diffusers has raised in the place of classes that need a library
            words = " ".join(str(error).split())
            raise ModuleNotFoundError(f'Run pip install "lpl-lightning[text]": {words}') from error
        said_of_weights = dict(provenance(module) if metadata is None else metadata)
        for part in ("", "backbone", "transformer", "unet"):
            note(partial / part, said_of_weights)
        open_to_others(partial)
        if is_empty:
            for path in partial.iterdir():
                path.rename(folder / path.name)
        else:
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    for line in said:
        rank_zero_info(f"Export: {line}")
    return folder


def export_checkpoint(
    ckpt: str, out: str, ema: float | None = None, dtype: ExportPrecision = "float32", trusted: bool = False
) -> Path:
    """Write the model of a checkpoint for diffusers' pipelines.

    Args:
        ckpt: A checkpoint (.ckpt) that ``lpl fit`` wrote.
        out: Folder to write, which is not there yet or empty.
        ema: Decay of the moving average to take; by default the weights as they were trained.
        dtype: Precision of the weights.
        trusted: Whether anything that the checkpoint's config names may be imported and built, as it must be for parts
            of your own, which may lie in files of the working directory; without it, the parts of this package and of
            diffusers alone.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint, or what its config names is gone.
        ValueError: It is of another model or no checkpoint, holds no such average, or ``out`` is not empty.
    """
    _check_empty(Path(out).expanduser(), "out")
    if not Path(ckpt).expanduser().exists():
        raise FileNotFoundError(f"`ckpt`={ckpt!r} must be a checkpoint that `lpl fit` wrote; there is none.")
    checkpoint = read_checkpoint(ckpt, "ckpt")
    parameters: Mapping[str, Any] = checkpoint.get(LatentDiffusionModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if MEANING not in checkpoint:
        raise ValueError(
            f"`ckpt`={ckpt!r} must be of a LatentDiffusionModule, got one of "
            f"{parameters.get('_class_path', 'another module')}. An AutoencoderModule leaves its model as diffusers "
            "has it by lpl_lightning.SaveAutoencoder."
        )
    state = chosen_state(checkpoint, ckpt, ema)
    if "_instantiator" not in parameters:
        raise ValueError(
            f"`ckpt`={ckpt!r} does not say what its model is built of: it was trained from Python, not by `lpl fit`. "
            "Build the module, load the checkpoint, and call lpl_lightning.export_diffusers(module, folder)."
        )
    try:
        kind_of_module: type[LatentDiffusionModule] = LatentDiffusionModule
        if trusted:
            find_own_modules([str(parameters)])
            kind_of_module = _own_class(str(parameters.get("_class_path", "")))
        given: dict[str, Any] = {"optimizer": torch.optim.AdamW, "lr_scheduler": None}  # there is nothing to train
        module = kind_of_module.load_from_checkpoint(ckpt, map_location="cpu", trusted=trusted, **given)
    except (ArgumentError, FileNotFoundError, ImportError, TypeError, ValueError) as error:
        # What a part refuses is the error, and not the parser's list of all that it tried, nor the config.
        cause = refusal(error)
        kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else ValueError
        said = str(cause).split("\n  Given value", 1)[0]
        raise kind(f"`ckpt`={ckpt!r}: its model cannot be built again. {said}") from error
    module.load_state_dict(state)
    metadata = provenance(module, checkpoint.get("global_step"), checkpoint.get("epoch"), ema, parameters)
    return export_diffusers(module, out, dtype, metadata=metadata)


def _own_class(path: str) -> type[LatentDiffusionModule]:
    """The class of a module that a checkpoint names, which may be a user's own."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else LatentDiffusionModule
    if not (isinstance(found, type) and issubclass(found, LatentDiffusionModule)):
        raise ValueError(f"{path} is no LatentDiffusionModule.")
    return found


def _check_empty(folder: Path, argument: str) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`{argument}`={str(folder)!r} is there already and not empty. Choose another, or remove it.")


def _write(module: LatentDiffusionModule, folder: Path, dtype: torch.dtype | None, named: Path) -> list[str]:
    """Write all files, and say what is to be known of them."""
    denoiser, conditioner, target = module.denoiser, module.conditioner, target_of(module.denoiser)
    said: list[str] = []
    if isinstance(conditioner, ClassTokens):
        tables = {"tokens": conditioner.tokens.weight.unflatten(-1, (-1, conditioner.token_dim))}
        if conditioner.pooled is not None:
            tables["pooled"] = conditioner.pooled.weight
        save_file({name: converted(tensor, dtype) for name, tensor in tables.items()}, folder / CLASSES)
        said.append(f"{CLASSES} holds what to give as prompt_embeds and pooled_prompt_embeds, last the null condition")
    if isinstance(module.fine_tuning, LoRA):
        loaded = _write_lora(denoiser.backbone, target, folder, dtype, named)
        if target is not None:
            # Trained by another noise process than its base, a LoRA samples noise by the base's.
            scheduler = scheduler_part(module, target, said)
            scheduler.save_pretrained(folder / "scheduler")
            kind = f"diffusers.{type(scheduler).__name__}"
            said.insert(0, f"sample by its scheduler, {kind}.from_pretrained({str(named)!r}, subfolder='scheduler')")
        return [loaded, *said]
    if target is None:
        backbone = copied(denoiser.backbone, dtype)
        if hasattr(backbone, "save_pretrained"):
            backbone.save_pretrained(folder / "backbone")
        else:
            save_model(backbone, str(folder / "backbone.safetensors"))
        return [f"{named} holds the backbone alone: no pipeline is known for a {type(denoiser).__name__}", *said]
    parts = dict.fromkeys(_parts(target))
    parts[target.part] = copied(denoiser.backbone, dtype)
    parts["vae"] = autoencoder_part(module, target, dtype, said)
    parts["scheduler"] = scheduler_part(module, target, said)
    if isinstance(conditioner, Captions):
        parts |= text_parts(conditioner, target, dtype, said)
    if target.pipeline is diffusers.DiTPipeline and conditioner.num_classes != _NULL_OF_DIT:
        said.append(
            f"DiTPipeline takes {_NULL_OF_DIT} for the null class, here it is {conditioner.num_classes}: without "
            "guidance_scale=1 its images are none of this model"
        )
    if isinstance(denoiser, FluxDenoiser):
        if denoiser.backbone.config.guidance_embeds:
            said.append(f"give guidance_scale={denoiser.guidance:g}, which the model was trained with")
        if module.sampler.guidance_scale != 1:
            said.append("what `sampler.guidance_scale` is here, FluxPipeline calls true_cfg_scale")
    settings: dict[str, Any] = {}
    if target.pipeline is diffusers.StableDiffusionPipeline:
        settings["requires_safety_checker"] = False
    elif target.pipeline is diffusers.StableDiffusionXLPipeline:
        settings["force_zeros_for_empty_prompt"] = getattr(conditioner, "null_is_zero", False)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers would warn of each part that is null
    try:
        target.pipeline(**parts, **settings).save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
    # Of parts that are null, diffusers wants those to be named that a pipeline does not call optional.
    null = [name for name, part in parts.items() if part is None and name not in target.pipeline._optional_components]
    load = ", ".join([repr(str(named)), *(f"{name}=None" for name in null)])
    return [f"load it by diffusers.{target.pipeline.__name__}.from_pretrained({load})", *said]


def _parts(target: Target) -> Iterator[str]:
    """Names of a pipeline's parts: of its arguments, all but switches and tables."""
    for name, parameter in inspect.signature(target.pipeline.__init__).parameters.items():
        if name != "self" and (parameter.default is parameter.empty or name in target.pipeline._optional_components):
            yield name


def _write_lora(backbone: Any, target: Target | None, folder: Path, dtype: torch.dtype | None, named: Path) -> str:
    from peft.utils import get_peft_model_state_dict

    config = backbone.peft_config["default"]
    layers = {name: converted(tensor, dtype) for name, tensor in get_peft_model_state_dict(backbone).items()}
    if target is None or not hasattr(target.pipeline, "save_lora_weights"):
        # Neither these pipelines nor their models read any: peft does, around the model.
        save_file({f"base_model.model.{name}": layers[name] for name in layers}, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))
        return f"load it by peft.PeftModel.from_pretrained(model, {str(named)!r}) around a {type(backbone).__name__}"
    arguments = {f"{target.part}_lora_layers": layers, f"{target.part}_lora_adapter_metadata": config.to_dict()}
    target.pipeline.save_lora_weights(folder, **arguments)
    return f"load it by load_lora_weights({str(named)!r}) of a {target.pipeline.__name__} with the base's weights"
