r"""Moving averages of the trained weights, with which models are evaluated, sampled and published.

.. math:: \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n) \theta_n, \quad \bar\theta_1 = \theta_1

after the n-th update, in float32 whatever the precision of the weights, by ``torch.optim.swa_utils``. An average is
kept of what is trained alone, by each process of its own shards. That of a weight that is trained later than the rest
begins with it; that of one that is trained no longer stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lpl_lightning.arguments import whole_at_least
from lpl_lightning.callbacks.counting import StepCount
from lpl_lightning.callbacks.kept_weights import KeptWeights
from lpl_lightning.callbacks.step_guard import last_step_skipped
from lpl_lightning.pretrained import AVERAGES, averaged_by, averages_of
from lpl_lightning.rebuilding import RebuiltModule, WeightsCallback
from lpl_lightning.sharding import as_shard, load_whole, local, shard_like, sharded_parameters, whole

__all__ = ["EMA", "averaged", "decay_in_place"]

Averages = dict[str, Tensor]
"""By names of parameters: what this process has of them, float32."""


class EMA(WeightsCallback):
    r"""Exponential moving averages :math:`\bar\theta \leftarrow d \bar\theta + (1 - d) \theta` of the trained weights.

    The average of ``decay``, or of ``evaluate``, is in place of the weights wherever they are looked at: in validation,
    in test and prediction from a checkpoint that holds it, in ``SampleGrid`` and ``Evaluation``, and from the end of
    training on, for export. Before its first update there is none. Checkpoints hold the weights as they were trained,
    whatever is in place, and all averages beside them: for ``weights_ema``, for ``--ema`` of ``lpl validate``,
    ``test``, ``predict``, ``sweep`` and ``export``, and for a run that goes on. Checkpoints of weights alone hold both
    too, where the module is one of this package. With another, ``ModelCheckpoint(save_weights_only=True)`` is refused,
    as Lightning asks no callback then, and ``save_checkpoint(weights_only=True)`` saves what is in place.

    Args:
        decay: d, for one optimizer step. The paper finds 0.99975 best with LPL and 0.9999 without (Berrada et al.,
            figure 10).
        every_n_steps: Optimizer steps n between updates, which then take :math:`d^n`.
        device: Where averages are kept, such as ``cpu``, which costs a copy of the weights at each update; by default
            with the model.
        also: Further decays. Each costs a float32 copy of the trained weights.
        warm_up: Begin with smaller decays, so that the first weights are soon forgotten: after n updates
            :math:`\min(d, (1 + n) / (10 + n))`, as TensorFlow's ``ExponentialMovingAverage`` has it (``num_updates``).
        evaluate: Which of the decays is put in place; by default ``decay``. ``trained`` leaves the weights as they are.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        every_n_steps: int = 1,
        device: str | None = None,
        also: Sequence[float] = (),
        warm_up: bool = False,
        evaluate: float | Literal["trained"] | None = None,
    ) -> None:
        for name, value in (("decay", decay), *(("also", value) for value in also)):
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie from 0 to below 1, got {value}.")
        if len({decay, *also}) <= len(also):
            raise ValueError(f"`also` must hold further decays, each once, beside {decay}, got {list(also)}.")
        whole_at_least(1, every_n_steps=every_n_steps)
        if evaluate not in (None, "trained", decay, *also):
            raise ValueError(f"`evaluate` must be one of {[decay, *also]} or 'trained', got {evaluate!r}.")
        self.decay, self.also, self.every_n_steps, self.warm_up = decay, tuple(also), every_n_steps, warm_up
        self.evaluate = evaluate
        self._device = None if device is None else torch.device(device)
        self._averages: dict[float, Averages] = {}
        self._updates: dict[float, int] = {}
        self._latest_step = 0
        self._count = StepCount()
        self._of_checkpoint = False  # whether they were loaded to be evaluated
        self._own: tuple[Any, ...] | None = None  # those of the last training, once a checkpoint was
        self._averages_of: ref[pl.LightningModule] | None = None  # the module that was trained
        self._stays = False  # whether one was in place before an evaluation
        self._kept = KeptWeights(self._device)  # the weights as they were trained, while an average is in place

    @property
    def in_place(self) -> float | None:
        """Decay of the average that is in place of the weights; None while they are as they were trained, or set."""
        return self._chosen if self._kept.in_place else None

    def decay_at(self, decay: float, updates: int) -> float:
        """Decay of an update of one of the averages after so many."""
        own = decay**self.every_n_steps
        return min(own, (1 + updates) / (10 + updates)) if self.warm_up else own

    @property
    def _chosen(self) -> float | None:
        return self.decay if self.evaluate is None else None if self.evaluate == "trained" else float(self.evaluate)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew where training begins, but not where a trainer goes on with it; weights set since stay."""
        self._kept.leave_what_was_set(pl_module)
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "EMA averages parameters, which FSDPStrategy makes one of: take lpl_lightning.FSDP2Strategy, or leave "
                "EMA out."
            )
        if stage == "fit":
            self._count.prepare()
            callbacks: list[Any] = trainer.checkpoint_callbacks
            alone = [type(one).__name__ for one in callbacks if getattr(one, "save_weights_only", False)]
            if alone and not isinstance(pl_module, RebuiltModule):
                raise ValueError(
                    f"{alone[0]} has `save_weights_only`, and Lightning asks no callback for its part of such "
                    f"checkpoints: those of a {type(pl_module).__name__} would lack the averages of EMA, and hold one "
                    "in the place of the weights once training has ended. Leave `save_weights_only` out."
                )
            self._kept.put_back(pl_module)
            if self._own is not None:
                self._averages, self._updates, self._latest_step = self._own
                self._own = None
            goes_on = trainer.global_step and self._averages_of is not None and self._averages_of() is pl_module
            if not goes_on:
                self._averages, self._updates, self._latest_step = {}, {}, 0
            self._averages_of = ref(pl_module)
            if not trainer.global_step:
                self._count.forget()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages after a step; after one that a ``StepGuard`` left out there is nothing new."""
        self._count.end_batch(trainer)
        if self.every_n_steps == 1 and last_step_skipped(trainer):
            return
        step, every = self._count.steps(trainer), self.every_n_steps
        if (step - 1) // every > (self._latest_step - 1) // every:
            self._latest_step = step
            self._update(pl_module)

    @torch.no_grad()
    def _update(self, pl_module: pl.LightningModule) -> None:
        weights = {
            name: self._placed(local(parameter.detach()), parameter) for name, parameter in _trained(pl_module).items()
        }
        for decay in (self.decay, *self.also):
            averages, updates = self._averages.setdefault(decay, {}), self._updates.get(decay, 0)
            # By name, since what is trained may change in a run, as where Lightning's BaseFinetuning unfreezes layers.
            known = [name for name in weights if name in averages]
            if known:
                update: Any = get_ema_multi_avg_fn(self.decay_at(decay, updates))
                update([averages[name] for name in known], [weights[name] for name in known], updates)
            averages |= {name: weight.clone() for name, weight in weights.items() if name not in averages}
            self._updates[decay] = updates + 1

    def _placed(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        return tensor.to(self._device or local(parameter).device, torch.float32)

    def _put(self, pl_module: pl.LightningModule) -> None:
        """Put an average in place, if there is one and none is yet."""
        chosen = self._chosen
        if self._kept.weights is not None or chosen is None or chosen not in self._averages:
            return
        self._settle(pl_module)
        self._kept.put(pl_module, self._averages[chosen])

    @contextmanager
    def put_in_place(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Put the average in place for a while, between two steps of training."""
        if self._kept.weights is not None:
            yield
            return
        self._put(pl_module)
        try:
            yield
        finally:
            self._kept.put_back(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring averages of a checkpoint to where they are kept."""
        self._count.start(trainer)
        self._settle(pl_module)

    def _settle(self, pl_module: pl.LightningModule) -> None:
        parameters = sharded_parameters(pl_module)
        for averages in self._averages.values():
            for name, average in averages.items():
                averages[name] = self._placed(average, parameters[name])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place."""
        self._stays = self._kept.weights is not None
        self._put(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        self._end(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" or not (self._stays or self._of_checkpoint):
            self._kept.put_back(pl_module)
        elif self._of_checkpoint:
            self._kept.put_back(pl_module)
            self._averages, self._of_checkpoint = {}, False  # another evaluation may be of other weights

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place, to stay."""
        self._put(pl_module)

    on_fit_end = on_train_end  # all that Lightning says where there was nothing left to train

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the weights back where training or an evaluation is interrupted."""
        self._kept.put_back(pl_module)
        self._averages, self._of_checkpoint = {} if self._of_checkpoint else self._averages, False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note that Lightning has moved the module."""
        self._kept.note_move(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How often, and after which step, averages were updated; they themselves are in the checkpoint beside it."""
        updates = {str(decay): count for decay, count in self._updates.items()}
        return {"updates": updates, "step": self._latest_step} | self._count.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; states of Lightning's callback, which this was once, say less."""
        if "updates" in state:
            self._updates = {float(decay): count for decay, count in state["updates"].items()}
        self._updates = {decay: self._updates.get(decay, 1) for decay in self._averages}
        self._latest_step = state.get("step", state.get("latest_update_step", 0))
        self._count.load_state_dict(state)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averages, and see to it that ``state_dict`` holds the weights as they were trained."""
        if trainer.state.finished:
            self._kept.leave_what_was_set(pl_module)
        parameters, names, saved = sharded_parameters(pl_module), _names(pl_module), checkpoint["state_dict"]
        in_shards = any(isinstance(tensor, DTensor) for tensor in saved.values())  # a folder of all processes' shards
        for name, weight in (self._kept.weights or {}).items():
            shard = as_shard(weight, parameters[name])
            kept = shard if in_shards else whole(shard)
            saved |= {one: kept.to(saved[one].device) for one in names[name] if one in saved}
        if self._averages:
            checkpoint[AVERAGES] = {str(decay): {} for decay in self._averages}
        for decay, averages in self._averages.items():
            for name, average in averages.items():
                full = whole(as_shard(average, parameters[name]))
                if trainer.is_global_zero:
                    others = [one for one in names[name] if one in saved]
                    checkpoint[AVERAGES][str(decay)] |= dict.fromkeys([name, *others], full.cpu())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what a checkpoint holds: to go on with, or the one that is to be evaluated."""
        self._kept.forget()  # what was in place is no more
        found = averages_of(checkpoint, unnamed=self.decay)
        if "current_model_state" in checkpoint:
            load_whole(pl_module, checkpoint["current_model_state"])
        chosen, names = self._chosen, sorted(found)
        if trainer.state.fn != "fit" and self._own is None:
            self._own = self._averages, self._updates, self._latest_step
        if trainer.state.fn == "fit":
            wanted = [decay for decay in (self.decay, *self.also) if decay in found]
            if begun := sorted({self.decay, *self.also} - set(found)):
                rank_zero_warn(
                    f"The checkpoint holds averages of decay {names}: those of {begun} begin with the next update."
                )
        elif chosen is None:
            return
        elif chosen in found:
            wanted, self._of_checkpoint = [chosen], True
        else:
            raise ValueError(
                f"EMA is to evaluate the average of decay {chosen}, but the checkpoint "
                + (f"holds those of {names}: choose one of them" if names else "holds none: leave EMA out")
                + ", or take `--ema trained` (EMA's `evaluate`) for the weights as they were trained."
            )
        self._averages, parameters, trained = {}, sharded_parameters(pl_module), _trained(pl_module)
        for decay in wanted:
            own = found[decay]
            if missing := sorted(set(trained) - set(own)):
                raise ValueError(
                    f"The checkpoint's average of decay {decay} lacks {len(missing)} weights that are trained here, "
                    f"such as {missing[0]!r}: give the `fine_tuning` that it was trained with."
                )
            # Of what is frozen here too, since more may have been trained there.
            self._averages[decay] = {
                name: local(shard_like(own[name], like, torch.float32)).clone()
                for name, like in parameters.items()
                if name in own
            }


def _trained(module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name, as shards where they are sharded."""
    return {name: parameter for name, parameter in sharded_parameters(module).items() if parameter.requires_grad}


def _names(module: pl.LightningModule) -> dict[str, list[str]]:
    """All names of each parameter by the first: a tied weight has several, and ``state_dict`` holds it under each."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {of_one[0]: of_one for of_one in names.values()}


def _callback(trainer: pl.Trainer) -> EMA | None:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, EMA)), None)


def decay_in_place(trainer: pl.Trainer, checkpoint: Mapping[str, Any] | None = None) -> float | None:
    """Decay of the average that is in place; None where weights are as they were trained.

    Args:
        trainer: Whose ``EMA`` callback may have put it there.
        checkpoint: What was loaded. Without such a callback, one of an earlier version was loaded as the average.
    """
    callback = _callback(trainer)
    if callback is None:
        return None if checkpoint is None else averaged_by(checkpoint)
    return callback.in_place


@contextmanager
def averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[float | None]:
    """Put the average that an ``EMA`` callback keeps in place for a while, between two steps of training.

    Yields:
        Its decay; None where there is no such callback or no average yet, and the weights stay as they are.
    """
    callback = _callback(trainer)
    if callback is None:
        yield None
        return
    with callback.put_in_place(pl_module):
        yield callback.in_place
