"""How a frozen decoder runs: what it costs, never what it computes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from lpl_lightning.arguments import at_least, read_settings
from lpl_lightning.folded_convolution import FoldedWeights
from lpl_lightning.frozen_operations import FrozenOperations
from lpl_lightning.stages import Stage

__all__ = ["Execution", "StageRunner"]

Choice = bool | Literal["auto"]

_copies = itertools.count()


@dataclass(frozen=True)
class Execution:
    """How the decoder's features, and their gradient, are computed. Nothing of it changes them beyond rounding.

    Attributes:
        streamed: Whether the gradient is taken a chunk of samples at a time, together with the value, so that
            activations of one chunk are held at most, and without what a decoder that is not trained needs not hold.
            Otherwise those of the whole batch are, until the backward pass, which can then be differentiated again.
        chunk_size: Most samples in a chunk. ``auto`` measures what a sample's activations take, and makes chunks of up
            to 256 MB of them, on a GPU up to 4 GB but no more than a quarter of the free memory; at least a sample. No
            chunk is larger than the batch.
        channels_last: Whether feature maps, and the weights of convolutions, lie in memory with channels last.
            ``auto``: on a CPU.
        fold_upsampling: Whether convolutions of twofold enlarged maps are folded, see ``folded_convolution``. ``auto``:
            on a CPU. In float32 and float64 only, as sums of weights would be rounded in less; of 128 channels or more,
            and if ``streamed``.
        compile: Whether each stage is compiled by ``torch.compile``, which takes a minute or more at the first step,
            and again for chunks of another size unless ``static_shapes``.
        checkpoint: Whether activations inside a stage are computed again in the backward pass instead of held: a third
            more time, for single samples too large for memory.
        static_shapes: Whether every chunk is filled up to the same size with copies that count for nothing. Then also
            nothing waits for noise-to-signal ratios that lie on a GPU: all samples are decoded. With ``compile`` each
            stage is compiled for each shape of latents.
    """

    streamed: bool = True
    chunk_size: int | Literal["auto"] = "auto"
    channels_last: Choice = "auto"
    fold_upsampling: Choice = "auto"
    compile: bool = False
    checkpoint: bool = False
    static_shapes: bool = False

    @classmethod
    def of(cls, value: object) -> Execution:
        """Read settings: by name or as they are; None for the defaults.

        Raises:
            ValueError: An unknown name, or a value out of its range.
        """
        found = read_settings(cls, "execution", value)
        found.check()
        return found

    # Not in __post_init__: a config's parser would take the error for another type's and say something else.
    def check(self) -> None:
        """Refuse values out of their range."""
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name == "chunk_size":
                if given != "auto" and (isinstance(given, bool) or not isinstance(given, int)):
                    raise ValueError(f"`chunk_size` must be a number of samples or 'auto', got {given!r}.")
            elif not isinstance(given, bool) and (given != "auto" or field.type != "Choice"):
                also = " or 'auto'" if field.type == "Choice" else ""
                raise ValueError(f"`{field.name}` must be true or false{also}, got {given!r}.")
        if self.chunk_size != "auto":
            at_least(1, chunk_size=self.chunk_size)


class StageRunner:
    """Runs a frozen model's stages as an ``Execution`` says. Parts of a copy are made anew.

    Args:
        execution: How.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._folded = FoldedWeights()
        self._compiled: dict[tuple[Any, ...], Callable[[Any], Any]] = {}
        self._checkpointing: list[nn.Module] = []
        self._run_again: dict[str, bool] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._laid_out = False

    def prepare(self, z: Tensor, model: nn.Module) -> Tensor:
        """Lay a latent and, once, the model's weights out in memory as they are to be."""
        if self._model is None or self._model() is not model:
            self._model, self._laid_out = weakref.ref(model), False
            self._folded, self._compiled = FoldedWeights(), {}
        elif self._folded.check():
            self._compiled = {}
        checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        if checkpointing != self._checkpointing:
            self._checkpointing, self._run_again, self._compiled = checkpointing, {}, {}
        if z.ndim != 4 or not _chosen(self.execution.channels_last, z.device):
            return z
        if not self._laid_out:
            # Weights made in inference mode, as of a validation that comes first, could take part in no graph.
            with torch.inference_mode(False):
                for name, parameter in model.named_parameters():
                    # Not of the encoder: its latents would be rounded otherwise from then on, and a run that goes on
                    # in another process would not be the same.
                    if parameter.ndim == 4 and not {"encoder", "quant_conv"} & set(name.split(".")):
                        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            self._laid_out = True
        return z.contiguous(memory_format=torch.channels_last)

    def operations(self, device: torch.device, plain: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which the operations of a frozen model on this device keep and do no more than they must.

        Args:
            device: The device.
            plain: Whether they run as they are instead: blocks that run again in the backward pass must find the
                operations that they ran with. By default where the model has such blocks.
        """
        if not self.execution.streamed or (bool(self._checkpointing) if plain is None else plain):
            return nullcontext()
        return FrozenOperations(self._folded if _chosen(self.execution.fold_upsampling, device) else None)

    def __call__(self, stage: Stage, current: Any, z: Tensor) -> Any:
        """Run a stage.

        Args:
            stage: The stage.
            current: What it takes.
            z: The latent, on whose device it runs.
        """
        self._look_into(stage, current)
        if self.execution.compile:
            # Kept by name: a stage is another function each time it is listed, and would be compiled each time. With
            # static shapes by these too: torch.compile keeps few versions of one function, and then compiles no more.
            shapes = tuple(x.shape for x in tree_leaves(current) if isinstance(x, Tensor))
            key = (stage.name, *(shapes if self.execution.static_shapes else ()))
            if key not in self._compiled:
                # Folds weights, which compiled code would be made anew for; on copies, since what is of inference mode
                # does not say how often it was written to, nor could what is made of it be in a graph.
                with torch.inference_mode(False), torch.no_grad():
                    self._frozen(stage, z.device)(_copied(current))
                dynamic = False if self.execution.static_shapes else None
                self._compiled[key] = torch.compile(_own_code(self._frozen(stage, z.device)), dynamic=dynamic)
            run = self._compiled[key]
        else:
            run = self._frozen(stage, z.device)
        if self.execution.checkpoint and torch.is_grad_enabled():
            return checkpoint(run, current, use_reentrant=False, preserve_rng_state=False)
        return run(current)

    def _look_into(self, stage: Stage, current: Any) -> None:
        """See whether a stage runs blocks that run again, once, by running it without a gradient.

        Where the decoder's own ``forward`` is what runs its blocks again, stages that call the blocks do not.
        """
        looked = stage.name in self._run_again or not (self._checkpointing and self.execution.streamed)
        if looked or torch.compiler.is_compiling():
            return
        ran: list[nn.Module] = []
        handles = [module.register_forward_pre_hook(lambda m, _: ran.append(m)) for module in self._checkpointing]
        try:
            with torch.inference_mode(False), torch.no_grad():
                stage.run(_copied(current))
        finally:
            for handle in handles:
                handle.remove()
        self._run_again[stage.name] = bool(ran)

    def _frozen(self, stage: Stage, device: torch.device) -> Callable[[Any], Any]:
        plain = self._run_again.get(stage.name, bool(self._checkpointing))

        def run(current: Any) -> Any:
            with self.operations(device, plain):
                return stage.run(current)

        return run

    def __deepcopy__(self, memo: dict[int, Any]) -> StageRunner:
        return StageRunner(self.execution)

    def __reduce__(self) -> tuple[type[StageRunner], tuple[Execution]]:
        return StageRunner, (self.execution,)


def _chosen(choice: Choice, device: torch.device) -> bool:
    return device.type == "cpu" if choice == "auto" else choice


def _copied(current: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, current)


def _own_code(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A copy that is compiled by itself.

    torch.compile counts what it has compiled by code, and gives up early. Where it has seen code of one name and line
    with other shapes, as another stage's are, it takes them for ones that change, at which some decoders fail.
    """
    copied = cast(FunctionType, function)
    code = copied.__code__.replace(co_name=f"{copied.__name__}_{next(_copies)}")
    return FunctionType(code, copied.__globals__, copied.__name__, None, copied.__closure__)
