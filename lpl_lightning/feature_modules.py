"""Features of any decoder, of any spatial rank, by the names of its modules: it runs as it is, with forward hooks.

A decoder in the layout of CompVis's latent diffusion (Rombach et al., 2022), which many projects have a class of their
own for, is found by the names of its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any, cast

from diffusers import ConsistencyDecoderVAE
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpl_lightning.latents import LatentSpace, config_of

__all__ = ["check_feature_modules", "compvis_modules", "note_unknown_scale", "run_to_modules"]


class _Reached(BaseException):
    """The last module asked for has run. No Exception, so that no model catches it on its way."""


def compvis_modules(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the feature maps of a decoder that is laid out as that of CompVis's latent diffusion.

    That is ``mid.block_1``, ``mid.attn_1``, ``mid.block_2``, then the levels of ``up`` from the last to the first, each
    with ``block``, ``attn`` and, but for the first, ``upsample``. The maps are what diffusers' AutoencoderKL, which has
    its weights by other names, calls mid, up_0, up_1 and so on.

    Args:
        model: An autoencoder with a ``decoder``, or a decoder itself.

    Returns:
        The last module of the middle and of each level, in the order they run; None for another layout.
    """
    prefix = "decoder." if isinstance(getattr(model, "decoder", None), nn.Module) else ""
    decoder = model.decoder if prefix else model
    mid, levels = getattr(decoder, "mid", None), getattr(decoder, "up", None)
    if not (isinstance(mid, nn.Module) and hasattr(mid, "block_2") and isinstance(levels, nn.ModuleList)):
        return None
    names = [f"{prefix}mid.block_2"]
    for i, level in reversed(list(enumerate(levels))):
        children = dict(level.named_children())
        lists = [name for name in ("attn", "block") if isinstance(children.get(name), nn.ModuleList)]
        filled = next((name for name in lists if len(cast(Any, children[name]))), None)
        if "upsample" in children:
            names.append(f"{prefix}up.{i}.upsample")
        elif filled is not None:
            names.append(f"{prefix}up.{i}.{filled}.{len(cast(Any, children[filled])) - 1}")
        else:
            return None
    return tuple(names)


def note_unknown_scale(model: nn.Module, space: LatentSpace, given: object) -> None:
    """Log that neither the user (``given`` is None) nor a model, which has no config, says how latents are scaled."""
    if given is None and not config_of(model) and space.scale == (1.0,):
        rank_zero_info(
            f"{type(model).__name__} does not say how its latents are scaled, so they are taken as they are. If the "
            "diffusion model sees them multiplied by a number, give Autoencoder that number as `scaling_factor`."
        )


def check_feature_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that are not modules of the model.

    Args:
        model: An autoencoder or decoder.
        names: As in ``model.named_modules()``, such as "decoder.blocks.3".

    Raises:
        ValueError: No names, the same one twice, or one that the model does not have; or a decoder that draws noise.
    """
    if isinstance(model, ConsistencyDecoderVAE):
        raise ValueError(
            "`model`: a ConsistencyDecoderVAE decodes by sampling, with other noise each time, so that its features "
            "are no function of the latents. Take the AutoencoderKL whose latents it decodes."
        )
    if isinstance(names, str) or not names:
        raise ValueError(
            f"`feature_modules` must be a list of one or more names of modules, got {names!r}. They are those of "
            "`model.named_modules()`, such as 'decoder.blocks.3'."
        )
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"`feature_modules` must name each module once, got {twice} more than once.")
    known = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
            raise ValueError(
                f"`feature_modules` names {name!r}, which {type(model).__name__} does not have. Names near it: {near}."
            )
        if name == "image":
            raise ValueError(
                "`feature_modules` names 'image', which stands for the decoder's output here. Name a module in it."
            )


def run_to_modules(
    model: nn.Module, names: Sequence[str], wanted: Collection[str], z: Tensor, skip: Collection[str] = ()
) -> list[Tensor]:
    """Decode and keep what the named modules put out, no further than the last one wanted.

    Args:
        model: Its ``decode`` is run or, where it has none, the model itself.
        names: Modules, in the order they run.
        wanted: Which of ``names`` to give back; "image" is the output of the whole decoder.
        z: Unscaled latents (B, C, ...).
        skip: Modules to leave out, which is not possible here.

    Returns:
        Outputs in the order they ran, the image last. Tokens (B, N, C) come as (B, C, N) where latents are maps.

    Raises:
        ValueError: A module did not run, ran more than once or before one named earlier, or put out no tensor; or the
            model has one that is to be left out.
    """
    bypassed = [name for name in skip if getattr(model, name, None) is not None]
    if bypassed:
        raise ValueError(
            f"`skip`: {bypassed} cannot be left out with `feature_modules`; drop one of the two (of "
            "LatentPerceptualLoss it is `post_quant_conv`: set it true)."
        )
    if getattr(model, "use_tiling", False):
        raise ValueError(
            "`model` decodes in tiles, so that a module in `feature_modules` sees one tile at a time. Turn that off "
            "(`disable_tiling`)."
        )
    outputs: dict[str, Tensor] = {}
    last = None if "image" in wanted else [name for name in names if name in wanted][-1]

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in outputs:
                raise ValueError(
                    f"`feature_modules` names {name!r}, which runs more than once in a decode, so that its output is "
                    "not one feature map. Name a module that runs once."
                )
            expected = names[len(outputs)]
            if name != expected:
                raise ValueError(
                    f"`feature_modules` must be in the order they run: expected {expected!r} next, but {name!r} ran "
                    f"first. Put it further ahead, or leave {expected!r} out if it does not run."
                )
            found = _map(_tensor(output, f"module {name!r}"), z)
            # A copy: an activation that runs next may write over it.
            outputs[name] = found.clone() if name in wanted and name != last else found
            if len(outputs[name]) != len(z):
                raise ValueError(
                    f"`feature_modules`: {name!r} put out {len(outputs[name])} samples for {len(z)} latents. Does the "
                    "model decode in slices? Turn that off (`disable_slicing`), or name another module."
                )
            if name == last:
                raise _Reached

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        decode = getattr(model, "decode", model)
        outputs["image"] = _image(decode(z))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise ValueError(f"`feature_modules` names {missing}, which did not run during decode. Leave them out.")
    return [outputs[name] for name in (*names, "image") if name in wanted]


def _tensor(output: Any, source: str) -> Tensor:
    """A tensor, or the first tensor of a tuple."""
    items = output if isinstance(output, tuple | list) else (output,)
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise ValueError(
        f"`feature_modules`: {source} must put out a tensor or a tuple with one, got {type(output).__name__}. "
        "Name another module."
    )


def _map(output: Tensor, z: Tensor) -> Tensor:
    """Tokens (B, N, C) as (B, C, N), positions last, as in every other feature map."""
    return output.transpose(1, 2) if output.ndim == 3 and z.ndim >= 4 else output


def _image(decoded: Any) -> Tensor:
    return _tensor(cast(Any, decoded).sample if hasattr(decoded, "sample") else decoded, "the decoder")
