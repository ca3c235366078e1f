"""Turn the Latent Perceptual Loss on in any LightningModule, by one entry under ``trainer.callbacks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lpl_lightning.agreement import check_match
from lpl_lightning.arguments import at_least, whole_at_least
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.callbacks.budget import Budget
from lpl_lightning.callbacks.calibration import WeightCalibration
from lpl_lightning.callbacks.counting import StepCount
from lpl_lightning.callbacks.gradients import GradientRatio
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.diagnostics import count_of, scalars_of
from lpl_lightning.mixin import LPLMixin
from lpl_lightning.noise import DDPM
from lpl_lightning.processes import counted, process_means, process_sums

__all__ = ["LPLCallback"]


class LPLCallback(Callback):
    """Adds ``weight * LPL`` to the loss of a module with ``LPLMixin``.

    The term is attached at setup and detached at teardown. It logs ``loss_lpl`` (before the weight; the sum of several
    in one step), ``gate_share`` (share of the batch that passed the gate) and ``lpl_weight``; in validation
    ``val_loss_lpl``, in test ``test_loss_lpl``. At the last step before each log entry it also logs, of its last batch
    in all processes, what ``Diagnostics.scalars`` names, and, if the module gives ``auxiliary_loss`` its prediction,
    ``lpl_gradient_ratio``: the norm of the term's gradient at the prediction over that of all else. At other steps none
    of it is computed.

    Args:
        weight: Weight w of the loss; the paper's best is about 3, where LPL is about a fifth of the total. ``auto``
            finds it: LPL is measured on the first ``calibration_steps`` batches from ``start_step`` on, whatever
            ``every_n_steps`` is, without being trained on, and the weight that makes it ``target_share`` of the total
            is then kept to the end, checkpoints included. Where ``training_step`` calls ``auxiliary_loss`` more than
            once, the sum of what that gives counts. Until then ``val_loss`` is without LPL: where a checkpoint or a
            schedule looks at a loss, let it be ``val_loss_diffusion``.
        start_step: Optimizer step at which it starts.
        ramp_steps: Steps over which its weight then rises from 0 to ``weight``, linearly; after the calibration if
            there is one.
        every_n_steps: Compute it at every n-th optimizer step only, with n times the weight, so that the gradient
            summed over steps stays the same in expectation.
        loss: Makes the loss of an autoencoder: ``LatentPerceptualLoss`` with the options that a config gives it.
        autoencoder: The autoencoder whose decoder is looked into; by default the module's ``autoencoder``.
        target_share: Share of the total loss that ``auto`` aims at.
        calibration_steps: Batches that ``auto`` measures; of a run that ends before, the log says so.
        budget: Share of the time of a training step that LPL may take, loading included, above 0 and below 1. Some
            fourteen steps with LPL train with the exact loss and are timed; if it takes more, each of its maps is
            then computed for a random part of the samples only, with the expectation of the loss kept (``Subset``).
            What that takes is timed over the next 40 to 400 steps, and the part corrected, twice if need be; the log
            says what was found. Steps in which something else takes its time now and then, such as a grid of
            samples or saving, are left out of the times. None: no limit.
    """

    def __init__(
        self,
        weight: float | Literal["auto"] = 3.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        every_n_steps: int = 1,
        loss: Callable[[Autoencoder], LatentPerceptualLoss] = LatentPerceptualLoss,
        autoencoder: Autoencoder | None = None,
        target_share: float = 0.2,
        calibration_steps: int = 100,
        budget: float | None = None,
    ) -> None:
        if weight != "auto" and (isinstance(weight, bool | str) or not isinstance(weight, int | float)):
            raise ValueError(f"`weight` must be a number or 'auto', got {weight!r}.")
        whole_at_least(0, start_step=start_step, ramp_steps=ramp_steps)
        whole_at_least(1, every_n_steps=every_n_steps)
        if not isinstance(weight, str):
            at_least(0, weight=weight)
        if isinstance(loss, nn.Module):
            raise ValueError(
                f"`loss` must make the loss of an autoencoder, got a {type(loss).__name__} that is made already. Give "
                "what makes it, such as functools.partial(LatentPerceptualLoss, depth=4)."
            )
        if budget is not None and every_n_steps > 1:
            raise ValueError(
                f"`budget` and `every_n_steps` both thin LPL out, got {budget} and {every_n_steps}. Leave one of them "
                "out; for the same time the first has the smaller variance."
            )
        self.budget = Budget(budget)
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.every_n_steps = every_n_steps
        self._weight = None if isinstance(weight, str) else weight
        self._calibration = WeightCalibration(target_share, calibration_steps)
        self._calibrated_at: int | None = None
        self._count = StepCount()
        self.make_loss = loss
        self.autoencoder = autoencoder
        self._gradients = GradientRatio()
        self._value: Tensor | float = 0.0
        self._passed: list[Tensor] = []
        self._step_ended = False
        self._loss: LatentPerceptualLoss | None = None
        self._fitting = False
        self._own: dict[str, Any] | None = None  # of the last training, once a checkpoint was loaded to be evaluated

    @property
    def weight(self) -> float | None:
        """The full weight; None while ``auto`` has not found it."""
        return self._weight if self._weight is not None else self._calibration.weight

    @property
    def loss(self) -> LatentPerceptualLoss | None:
        """The loss, while it is attached."""
        return self._loss

    @property
    def calibrating(self) -> bool:
        """Whether the weight is still to be found."""
        return self.weight is None

    def weight_at(self, step: int) -> float:
        """Weight at an optimizer step, counted from 0; 0 where the loss is not computed."""
        if self.weight is None or not self._due(step):
            return 0.0
        since = step - max(self.start_step, self._calibrated_at or 0)
        ramp = min(1.0, (since + 1) / (self.ramp_steps + 1))
        return self.weight * self.every_n_steps * ramp

    def _due(self, step: int) -> bool:
        since = step - max(self.start_step, self._calibrated_at or 0)
        return since >= 0 and since % self.every_n_steps == 0

    def _shows(self, trainer: pl.Trainer) -> bool:
        """Whether this step, of those with the loss, is the last one before the logger takes what was logged."""
        every: int = cast(Any, trainer).log_every_n_steps
        if not trainer.loggers or every < 1 or trainer.fit_loop._should_accumulate():
            return False
        step = self._count.steps(trainer)
        next_logged = step + (-(step + 1)) % every
        return step + (1 if self.calibrating else self.every_n_steps) > next_logged

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach the term."""
        self._fitting = stage == "fit"
        if stage == "predict":
            return
        if self._fitting:
            self._count.prepare()
        self._take_up(self._own or {})
        self._own = None
        self._waited: int | None = 0  # batches without a call for the loss; None once there was one
        if stage == "fit" and not trainer.global_step:
            # Another training than the one before, if there was one; a checkpoint's state comes after this.
            self._calibration.forget()
            self._calibrated_at = None
            self._count.forget()
            self.budget.forget()
        if not isinstance(pl_module, LPLMixin):
            raise ValueError(
                f"LPLCallback needs a module with LPLMixin, got {type(pl_module).__name__}. Make it a subclass of "
                "lpl_lightning.LPLMixin and add self.auxiliary_loss(z0_hat, z0, noise_to_signal) to its loss."
            )
        if self.autoencoder is not None and not isinstance(self.autoencoder, Autoencoder):
            kind = type(self.autoencoder).__name__
            raise ValueError(
                f"`autoencoder` must be an lpl_lightning.Autoencoder, got {kind}. Make it one: Autoencoder(your_vae)."
            )
        autoencoder = self.autoencoder or getattr(pl_module, "autoencoder", None)
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(
                f"LPLCallback found no lpl_lightning.Autoencoder: {type(pl_module).__name__}.autoencoder is "
                f"{type(autoencoder).__name__}. Give it one by `autoencoder`, such as Autoencoder(your_vae)."
            )
        check_match(autoencoder, getattr(pl_module, "autoencoder", None))
        self._loss = loss = self.make_loss(autoencoder)
        self.budget.apply(loss)
        noise = getattr(pl_module, "noise", None)
        loss.ddpm = noise if isinstance(noise, DDPM) else None
        pl_module.add_loss_term("lpl", lambda *latents: self._term(trainer, pl_module, loss, *latents))

    def _term(
        self,
        trainer: pl.Trainer,
        pl_module: Any,  # has LPLMixin, and is of lightning or of pytorch_lightning, whose classes are not the same
        loss: LatentPerceptualLoss,
        z0_hat: Tensor,
        z0: Tensor,
        noise_to_signal: Tensor | None,
    ) -> Tensor:
        """The weighted loss of a batch, a scalar."""
        self._waited = None if trainer.training else self._waited
        loss.announce(z0)
        # Not the module's mode: Lightning trains one that was left in eval mode as it is.
        training, step = trainer.training, self._count.steps(trainer)
        measuring = training and self.calibrating and step >= self.start_step
        weight = self.weight_at(step) if training else (self.weight or 0.0)
        if training and weight == 0 and not measuring:
            return z0.new_zeros(())
        if training and self._step_ended:
            self._begin_step()
        if loss.autoencoder.scale.device != z0.device:
            loss.autoencoder.to(z0.device)
        loss.train(training)
        timing = training and not measuring and self.budget.measuring
        if timing:
            self.budget.start_term(z0.device)
        diagnose = training and self._shows(trainer)
        prediction = pl_module.lpl_prediction if diagnose and not measuring else None
        if prediction is not None and prediction.requires_grad:
            z0_hat = self._gradients.watch(z0_hat, prediction)
        loss.draws = pl_module.lpl_draws
        with torch.set_grad_enabled(torch.is_grad_enabled() and not measuring):
            losses, diagnostics = loss.evaluate(z0_hat, z0, noise_to_signal, diagnose)
            loss.draws = None
            # None are left of a batch that fills up a process's share.
            value: Tensor = losses.sum() / max(1, losses.numel())
        if timing:
            passed = None if noise_to_signal is None else loss.passes(noise_to_signal.detach(), z0)
            self.budget.end_term(z0_hat, z0, passed)
        if training:
            self._value = self._value + value.detach()
            means = {"loss_lpl": self._value}
            if noise_to_signal is not None:
                self._passed.append(loss.passes(noise_to_signal, z0).float())
                means["gate_share"] = torch.cat(self._passed).mean()
            for name, scalar in process_means(means, z0.device).items():
                pl_module.log(name, scalar, prog_bar=True, batch_size=len(z0))
            # A tensor on the CPU: a number would be copied to the accelerator, and the step would wait for it.
            logs = {"lpl_weight": torch.tensor(weight, dtype=torch.float32)}
            if diagnose:
                # All processes add up theirs, also those none of whose samples were decoded.
                sums = z0.new_zeros(count_of(loss.compared)) if diagnostics is None else diagnostics.sums()
                logs |= scalars_of(loss.compared, process_sums(sums), by_noise=noise_to_signal is not None)
            for name, scalar in logs.items():
                pl_module.log(name, scalar, batch_size=len(z0))
        else:
            name = "test_loss_lpl" if trainer.testing else "val_loss_lpl"
            pl_module.log(name, value.detach(), batch_size=counted(len(z0)), sync_dist=True)
        if measuring:
            self._calibration.measure(value)
            return z0.new_zeros(())
        return value * weight

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here."""
        self._count.start(trainer)
        self._begin_step()

    def _begin_step(self) -> None:
        """A training step begins, whose terms are added up; an optimizer may ask for several of one batch."""
        self._step_ended = False
        self._value, self._passed = 0.0, []
        self._calibration.begin_step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The loss of a training step is whole."""
        self._step_ended = pl_module.automatic_optimization

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the backward pass told."""
        ratio = self._gradients.pop()
        if ratio is not None:
            pl_module.log("lpl_gradient_ratio", ratio)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the calibration see the loss of the batch, and the budget its time."""
        self._step_ended = True
        self._wait(last=False)
        self._count.end_batch(trainer)
        if self.budget.measuring and not self.calibrating and self._loss is not None:
            self.budget.end_batch(trainer, pl_module.device, self._loss)
        if self.calibrating:
            self._calibration.finish_batch(outputs, trainer)
            if not self.calibrating:
                # The next whole step: one whose batches are being accumulated goes on without.
                accumulating = trainer.fit_loop._should_accumulate()
                self._calibrated_at = self._count.steps(trainer) + int(accumulating)

    def _wait(self, last: bool) -> None:
        """Say so where no batch has asked for the loss, once: after twenty, or at the end of fewer."""
        if self._waited is not None:
            self._waited += not last
            if (0 < self._waited < 20) if last else self._waited == 20:
                rank_zero_warn(
                    f"LPL has no part in training: in {self._waited} batches `training_step` never called "
                    "`self.auxiliary_loss(z0_hat, z0, noise_to_signal)`, whose value is to be added to its loss."
                )

    def state_dict(self) -> dict[str, Any]:
        """What ``auto`` and ``budget`` found, and how far several optimizers are; nothing without them."""
        state = self._count.state_dict()
        if self.budget.share is not None:
            state["budget"] = self.budget.state_dict()
        if self._weight is None:
            state |= self._calibration.state_dict() | {"calibrated_at": self._calibrated_at}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``auto`` and ``budget`` had found; of a checkpoint that is evaluated, until training goes on."""
        if not self._fitting and self._own is None:
            self._own = self.state_dict()
        self._count.load_state_dict(state_dict)
        self._take_up(state_dict)

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        if self.budget.share is not None and "budget" in state_dict:
            self.budget.load_state_dict(state_dict["budget"])
            if self._loss is not None:
                self.budget.apply(self._loss)
        if self._weight is None and "calibrated_at" in state_dict:
            self._calibrated_at = state_dict["calibrated_at"]
            self._calibration.load_state_dict(state_dict)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave what comes between epochs, and between runs, out of the time."""
        self.budget.interrupt()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave validation out of the time."""
        self.budget.interrupt()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise what the loss of the last step was still to raise, before the mean over all batches is logged."""
        if self._loss is not None:
            self._loss.flush()

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise what the loss of the last step was still to raise, and say if ``auto`` has found no weight."""
        self.on_validation_epoch_end(trainer, pl_module)
        self._wait(last=True)
        if self.calibrating:
            self._calibration.end(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach the term."""
        self._loss = None
        if isinstance(pl_module, LPLMixin):
            pl_module.remove_loss_term("lpl")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach the term, so that a run that was interrupted in a notebook can be started again."""
        self.teardown(trainer, pl_module, "fit")
