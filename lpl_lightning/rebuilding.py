"""What a checkpoint may have built, when a module is made of the config that it holds.

That config names classes, functions and modules by their paths, and what it names is imported and called: without a
single pickle in it, a checkpoint could have any program run. Those of strangers therefore get the parts of this package
and of diffusers alone.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, Self, get_type_hints

import diffusers
import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.checkpoints import is_plain
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.denoiser import Denoiser
from lpl_lightning.fine_tuning import FineTuning
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.pretrained import read_checkpoint
from lpl_lightning.sampling import Sampler
from lpl_lightning.text_encoders import TextEncoder
from lpl_lightning.times import TimeDistribution

__all__ = ["INSTANTIATORS", "RebuiltModule", "WeightsCallback", "check_config"]

INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
"""What the command line's checkpoints say that they are built by."""

_PARTS = (
    Autoencoder,
    Conditioner,
    Denoiser,
    FineTuning,
    NoiseProcess,
    Sampler,
    TextEncoder,
    TimeDistribution,
    diffusers.ModelMixin,
    diffusers.SchedulerMixin,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)
_CLASS_PATHS = ("class_path", "_class_path")
_PACKAGES = ("lpl_lightning", "diffusers", "torch.optim")
_LONGEST = 2**20
"""Bytes of a config."""
_PATH = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)+")


class WeightsCallback(Callback):
    """A callback whose part of a checkpoint belongs to the weights, also to weights that are saved alone.

    Lightning asks no callback then (``save_weights_only``), but always the module: a ``RebuiltModule`` asks these.
    """


class RebuiltModule(pl.LightningModule, ABC):
    """A LightningModule that runs nothing that a checkpoint's config names, when it is made of one.

    Checkpoints of its weights alone hold the parts of ``WeightsCallback``, which have them back when they are loaded.
    """

    @abstractmethod
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step of training."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have those callbacks add their parts that Lightning does not ask, and leave objects out.

        Of a module that was built by hand: of a subclass's arguments, Lightning collects all.
        """
        given = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_instantiator" not in given:
            for name in [name for name, value in given.items() if not is_plain(value)]:
                given.pop(name)
        for callback in self._unasked(checkpoint):
            callback.on_save_checkpoint(self.trainer, self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let those callbacks have their parts that Lightning does not give them."""
        for callback in self._unasked(checkpoint):
            callback.on_load_checkpoint(self.trainer, self, checkpoint)

    def _unasked(self, checkpoint: Mapping[str, Any]) -> list[WeightsCallback]:
        # Where Lightning asks callbacks, it has written down their states by then.
        if self._trainer is None or "callbacks" in checkpoint:
            return []
        callbacks: list[Any] = getattr(self.trainer, "callbacks", [])
        return [callback for callback in callbacks if isinstance(callback, WeightsCallback)]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        trusted: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Make a module of a checkpoint, with the weights as they were trained.

        Args:
            checkpoint_path: A file, or a folder of shards.
            map_location: Where its tensors are put; by default where they were.
            hparams_file: Lightning's, and for trusted ones alone.
            strict: Whether all weights must be there, and no others.
            weights_only: Lightning's; what ``trusted`` does not say, True.
            trusted: Whether anything that its config names may be imported and built, as it is for parts of your own.
            kwargs: Arguments of the module in the place of those that the checkpoint holds.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else, or its config names what is no part of a model.
        """
        if not trusted:
            if hparams_file is not None or not weights_only or not isinstance(checkpoint_path, str | Path):
                raise ValueError(
                    "`checkpoint_path` must be a file, and `weights_only` and `hparams_file` left alone. Set `trusted` "
                    "to true if you trust whoever made the checkpoint."
                )
            found = read_checkpoint(str(checkpoint_path), "checkpoint_path", weights=False)
            parameters = found.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
            own = {name: value for name, value in parameters.items() if name not in kwargs}
            check_config(own, cls, f"`checkpoint_path`={str(checkpoint_path)!r}")
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_dir():
            held = io.BytesIO()  # Lightning reads files alone
            torch.save(read_checkpoint(str(checkpoint_path), "checkpoint_path"), held)
            held.seek(0)
            checkpoint_path = held
        where: dict[str, Any] = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict}
        return super().load_from_checkpoint(checkpoint_path, weights_only=weights_only, **where, **kwargs)


def check_config(parameters: Mapping[str, Any], module: type[nn.Module], source: str) -> None:
    """Refuse a checkpoint whose config would build more than parts of a model.

    Args:
        parameters: Its hyperparameters.
        module: What is to be built of them.
        source: What to call the checkpoint in the error.

    Raises:
        ValueError: It is such.
    """
    if "_instantiator" not in parameters:  # its parts are given by the caller
        return
    if parameters["_instantiator"] not in INSTANTIATORS:
        raise _refused(source, parameters["_instantiator"])
    # At `weights` stands text, which no parser takes for a class, and a file's name can be like a class's path.
    is_file = str(parameters.get("weights")).endswith((".ckpt", ".safetensors"))
    for path in _named({name: value for name, value in parameters.items() if name != "weights" or not is_file}):
        if not _is_part(path, module):
            raise _refused(source, path)


def _refused(source: str, what: object) -> ValueError:
    return ValueError(
        f"{source} would run {str(what)!r}: its config names that, which is no part of a model that this package or "
        "diffusers has. Set `trusted` to true if you trust whoever made it."
    )


def _named(value: Any, folder: Path = Path(), files: frozenset[Path] = frozenset()) -> Iterator[str]:
    """All that a config has imported: what stands at ``class_path``, and strings that a parser could take for such.

    A parser also takes text for the config that it holds, and the name of a file for the config in there.

    Args:
        value: The config, or a part of it.
        folder: Where names of files are looked for.
        files: Those that were read on the way here.
    """
    for key, leaf in _leaves(value):
        if key in _CLASS_PATHS:
            yield str(leaf)
        elif isinstance(leaf, str):
            yield from _named_by(leaf, folder, files)


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """What is in a config that holds no more, and what it stands at; of parts that stand in several places, once.

    A few lines of aliases name as many parts as one likes.
    """
    queue: list[tuple[Any, Any]] = [(None, value)]
    seen: set[int] = set()
    while queue:
        key, part = queue.pop()
        if key == "_instantiator":
            continue
        if not isinstance(part, Mapping | list | tuple):
            yield key, part
        elif key in _CLASS_PATHS:
            yield key, f"a {type(part).__name__}"
        elif id(part) not in seen:
            seen.add(id(part))
            inner = part.items() if isinstance(part, Mapping) else ((None, one) for one in part)
            queue += reversed([*inner])


def _named_by(text: str, folder: Path, files: frozenset[Path]) -> Iterator[str]:
    """What a text has imported: itself, what it holds, or what is in the file that it names."""
    if (found := _PATH.fullmatch(text)) and _is_module(found[1]):
        yield text
    for config in _parsed(text):
        yield from _named(config, folder, files)
    path = folder / text
    if path in files:
        return
    try:
        said = _text(path)
    except _NotRead:
        yield text
        return
    for config in _parsed(said or ""):
        yield from _named(config, path.parent, files | {path})


def _parsed(text: str) -> Iterator[Any]:
    """What a text holds, as JSON and as YAML, where that is more than a plain value."""
    for read, error in ((json.loads, ValueError), (yaml.safe_load, yaml.YAMLError)):
        with suppress(error, RecursionError):
            found = read(text)
            if isinstance(found, Mapping | list):
                yield found


class _NotRead(Exception):
    """A parser could take a file for a config, and it is none that is looked through: a device, a pipe, a long text."""


def _text(path: Path) -> str | None:
    """What a file says; None where there is none, or it holds other bytes, as weights do.

    Raises:
        _NotRead: It is such.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):
            raise _NotRead
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        text = codecs.getincrementaldecoder("utf-8")().decode(content)
    except (OSError, ValueError):
        return None
    if "\0" in text:  # which no config may hold
        return None
    if len(content) > _LONGEST:
        raise _NotRead
    return text


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # of a module that is running
        return True


def _is_part(path: str, module: type[nn.Module]) -> bool:
    """Whether a path leads to the class of a part; nothing outside of the packages is imported to see."""
    if not any(path.startswith(f"{package}.") for package in _PACKAGES):
        return False
    names = path.split(".")
    for length in range(len(names) - 1, 0, -1):
        try:
            found = reduce(getattr, names[length:], import_module(".".join(names[:length])))
        except (ImportError, AttributeError):
            continue
        made_here = str(getattr(found, "__module__", "")).startswith("lpl_lightning.")
        if made_here and isinstance(found, FunctionType):  # one that makes a part
            found = get_type_hints(found).get("return")
        return isinstance(found, type) and issubclass(found, (*_PARTS, module))
    return False
