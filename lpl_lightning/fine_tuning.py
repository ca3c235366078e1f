"""Which of a denoiser's weights are trained: all, some layers, or low-rank updates of them (LoRA; Hu et al., 2022)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from lpl_lightning.arguments import at_least
from lpl_lightning.denoiser import Denoiser

__all__ = ["FineTuning", "Freeze", "LoRA"]


class FineTuning(ABC):
    """Base: prepares a denoiser once its weights are loaded."""

    saves_all: bool = True
    """Whether checkpoints hold all of the denoiser's weights, and not only those that are trained."""

    def made(self, names: Iterable[str]) -> bool:
        """Whether weights of these names are of a denoiser that was prepared so, to be loaded into one that is."""
        return False

    @abstractmethod
    def prepare(self, denoiser: Denoiser) -> None:
        """Freeze, add, or both.

        Raises:
            ValueError: What is asked for is not in this backbone.
        """


class Freeze(FineTuning):
    """Trains all but some layers. Checkpoints hold the frozen ones as well.

    Args:
        layers: Names of the backbone's parameters to freeze, with the wildcards of a shell, such as ``pos_embed*`` or
            ``transformer_blocks.[0-9].*``.
        but: Names among those that are trained all the same.
    """

    def __init__(self, layers: list[str], but: list[str] | None = None) -> None:
        if not layers:
            raise ValueError(
                "`layers` must name what to freeze, such as ['transformer_blocks.0.*'], got an empty list."
            )
        self.layers = layers
        self.but = but or []

    def prepare(self, denoiser: Denoiser) -> None:
        """Freeze."""
        parameters: dict[str, nn.Parameter] = dict(denoiser.backbone.named_parameters())
        for argument, patterns in (("layers", self.layers), ("but", self.but)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in parameters):
                    raise ValueError(
                        f"`{argument}`: no parameter of {type(denoiser.backbone).__name__} is called {pattern!r}; "
                        f"there are {_some(parameters)}."
                    )
        for name, parameter in parameters.items():
            if _matches(name, self.layers) and not _matches(name, self.but):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(f"`layers`={self.layers} freezes the whole backbone: nothing would be trained.")


class LoRA(FineTuning):
    r"""Trains low-rank updates :math:`W + \frac{\alpha}{r} B A` of some layers, and freezes the rest.

    Checkpoints hold A and B alone; ``lpl export`` writes them so that ``load_lora_weights`` of a diffusers pipeline
    reads them, or peft where the pipeline has no such method (DiT, PixArt). Needs ``peft``.

    Args:
        rank: r, the rank of the updates.
        alpha: Scale of the updates; by default the rank, so that it is 1.
        targets: Names of the layers, as the ends of their names (``to_q``), or one regular expression for whole names.
        dropout: Dropout in front of A.

    Raises:
        ValueError: A number is out of range, or ``targets`` is no regular expression.
    """

    saves_all = False

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        targets: list[str] | str = ["to_q", "to_k", "to_v", "to_out.0"],  # noqa: B006  shown by --help, never changed
        dropout: float = 0.0,
    ) -> None:
        at_least(1, rank=rank)
        if alpha is not None and not alpha > 0:
            raise ValueError(f"`alpha` must be more than 0, got {alpha}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be 0 or more and less than 1, got {dropout}.")
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"`targets`={targets!r} is no regular expression: {error}.") from error
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.targets = targets
        self.dropout = dropout

    def made(self, names: Iterable[str]) -> bool:
        """Whether there are updates among the weights."""
        return any(".lora_A." in name for name in names)

    def prepare(self, denoiser: Denoiser) -> None:
        """Add the updates, in float32, and freeze the rest."""
        backbone = denoiser.backbone
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('LoRA needs peft: pip install "lpl-lightning[lora]".') from error
        layers = [name for name, module in backbone.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        if not isinstance(self.targets, str):
            for target in self.targets:
                if not any(f".{name}".endswith(f".{target}") for name in layers):
                    raise ValueError(
                        f"`targets`: no layer of {type(backbone).__name__} ends in {target!r}. Its layers end in "
                        f"{_some({name.rsplit('.', 1)[-1] for name in layers if not name[-1].isdigit()})}."
                    )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=self.targets,
        )
        try:
            if hasattr(backbone, "add_adapter"):
                backbone.add_adapter(config)
            else:  # DiT and PixArt lack diffusers' method, which does no more
                inject_adapter_in_model(config, backbone)
        except ValueError as error:
            raise ValueError(
                f"`targets`={self.targets!r} fits no layer of {type(backbone).__name__}: {error}"
            ) from error
        trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # What a denoiser of a user's own has beside the backbone is in no base model.
        own = {name for name in denoiser.state_dict() if not name.startswith("backbone.")}
        _save_only(denoiser, trained | own)


def _save_only(denoiser: Denoiser, trained: set[str]) -> None:
    """Keep all but some parameters out of the state dict, and let a strict load do without the others."""
    denoiser.saved_names = frozenset(trained)
    cast(Any, denoiser).register_state_dict_post_hook(_drop_the_rest)
    cast(Any, denoiser).register_load_state_dict_pre_hook(_offer_the_rest)


# Functions of the module that they get, so that a copy of a denoiser (an average of weights) works on itself.
def _drop_the_rest(denoiser: Denoiser, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in denoiser.saved_names:
            del state[name]


def _offer_the_rest(denoiser: Denoiser, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, tensor in denoiser.backbone.state_dict(prefix="backbone.").items():
        if name not in denoiser.saved_names:
            state.setdefault(prefix + name, tensor)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str], shown: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
