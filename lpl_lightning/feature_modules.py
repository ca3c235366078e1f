"""Features of any decoder, of any spatial rank, by the names of its modules: it runs as it is, with forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any, cast

from torch import Tensor, nn

__all__ = ["check_feature_modules", "run_to_modules"]


class _Reached(BaseException):
    """The last module asked for has run. No Exception, so that no model catches it on its way."""


def check_feature_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that are not modules of the model.

    Args:
        model: An autoencoder or decoder.
        names: As in ``model.named_modules()``, such as "decoder.blocks.3".

    Raises:
        ValueError: No names, the same one twice, or one that the model does not have.
    """
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


def run_to_modules(model: nn.Module, names: Sequence[str], wanted: Collection[str], z: Tensor) -> list[Tensor]:
    """Decode and keep what the named modules put out, no further than the last one wanted.

    Args:
        model: Its ``decode`` is run or, where it has none, the model itself.
        names: Modules, in the order they run.
        wanted: Which of ``names`` to give back; "image" is the output of the whole decoder.
        z: Unscaled latents (B, C, ...).

    Returns:
        Outputs in the order they ran, the image last. Tokens (B, N, C) come as (B, C, N) where latents are maps.

    Raises:
        ValueError: A module did not run, ran more than once or before one named earlier, or put out no tensor.
    """
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
            outputs[name] = _map(_tensor(output, f"module {name!r}"), z)
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
