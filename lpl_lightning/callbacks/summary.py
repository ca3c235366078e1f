"""What a run is, said when it starts, and where everything is, said when it ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpl_lightning.callbacks.lpl import LPLCallback
from lpl_lightning.callbacks.run_config import SaveRunConfig
from lpl_lightning.losses import LatentPerceptualLoss
from lpl_lightning.losses.gate import equivalents
from lpl_lightning.losses.subset import Subset
from lpl_lightning.mixin import LPLMixin
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.multiply_adds import TOKENS, of_decoder, of_denoiser, of_encoder
from lpl_lightning.noise import NoiseProcess
from lpl_lightning.run_folder import run_folder

__all__ = ["RunSummary"]

TERM = "run_summary"
CONFIG = "config.yaml"
FILES = (
    CONFIG,
    "metrics.csv",
    "samples",
    "validation",
    "evaluation",
    "weights.safetensors",
    "diffusers",
    "autoencoder",
)
"""What callbacks of this package leave in a run's folder, in the order in which it is named."""
UNITS = {
    "nsr": "sigma / alpha",
    "snr": "SNR",
    "log_snr": "log SNR",
    "ddpm_timestep": "DDPM step",
    "flow_t": "flow t",
}
"""What the units of ``Threshold`` are called."""
DRAWS = 1000
"""Training times, evenly over their distribution, by which the share past the gate is found."""


class RunSummary(Callback):
    """Says in the log what is trained and what LPL costs, and at the end where it all is and what to run next.

    At the start: trainable and frozen parameters by part, the latents' shape, LPL's weight and its threshold in every
    unit, the share of training samples past it, and an estimate of what LPL costs. The estimate is a count of
    multiply-adds of encoder, denoiser and decoder, made without computing any; ``lpl profile`` measures. Of a
    module with ``LPLMixin`` alone only LPL is known, which is then said after the first batch.

    At the end of training: the files of the run, and commands with their paths.

    Args:
        start: Whether to say the first; by default where the trainer has a model summary, so not with
            ``enable_model_summary: false``.
        end: Whether to say the second.
    """

    def __init__(self, start: bool | None = None, end: bool = True) -> None:
        self.start = start
        self.end = end
        self._denoiser: int | None = None
        self._seen: tuple[tuple[int, ...], Tensor | None] | None = None

    def _starts(self, trainer: pl.Trainer) -> bool:
        callbacks: list[Any] = cast(Any, trainer).callbacks
        return any(isinstance(callback, ModelSummary) for callback in callbacks) if self.start is None else self.start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count the denoiser, before its weights are shared out between processes."""
        self._denoiser = self._seen = None
        if stage != "fit" or not trainer.is_global_zero or not self._starts(trainer):
            return
        if isinstance(pl_module, LatentDiffusionModule) and (shape := _latents(pl_module)) is not None:
            self._denoiser = of_denoiser(pl_module.denoiser, shape, pl_module.conditioner)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is trained."""
        if not self._starts(trainer):
            return
        lines = [f"Run: {' '.join(_names(pl_module))}", *_parameters(pl_module)]
        if isinstance(pl_module, LatentDiffusionModule):
            shape = _latents(pl_module)
            if shape is not None and trainer.is_global_zero:
                side = shape[2] * pl_module.autoencoder.downscale
                lines.append(_line("latents", f"{' x '.join(map(str, shape[1:]))}, of images of {side} x {side}"))
                for callback in _lpl(trainer):
                    lines += self._of_lpl(callback, shape, pl_module.noise, _ratios(pl_module.noise), pl_module)
        elif isinstance(pl_module, LPLMixin) and TERM not in pl_module.loss_terms and any(_lpl(trainer)):
            pl_module.add_loss_term(TERM, self._look)
        rank_zero_info("\n".join(lines))

    def _look(self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None) -> Tensor:
        """Nothing to add to the loss."""
        if self._seen is None:
            self._seen = (1, *z0.shape[1:]), None if noise_to_signal is None else noise_to_signal.detach().cpu()
        return z0.new_zeros(())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say of LPL what only a batch could tell."""
        if self._seen is None or not isinstance(pl_module, LPLMixin):
            return
        pl_module.remove_loss_term(TERM)
        (shape, ratios), self._seen = self._seen, None
        lines = [_line("latents", " x ".join(map(str, shape[1:])))]
        for callback in _lpl(trainer):
            lines += self._of_lpl(callback, shape, None, ratios, None)
        rank_zero_info("\n".join(["Run, as of its first batch:", *lines]))

    def _of_lpl(
        self,
        callback: LPLCallback,
        shape: tuple[int, ...],
        noise: NoiseProcess | None,
        ratios: Tensor | None,
        module: LatentDiffusionModule | None,
    ) -> Iterator[str]:
        loss = callback.loss
        if loss is None:
            return
        z = torch.empty(shape, device="meta")
        tau = loss.tau(z)
        weight = "auto" if callback.weight is None else f"{callback.weight:g}"
        floor = f", variances with relative_eps {found:g}" if (found := loss.options.floor) else ""
        yield _line("LPL", f"weight {weight}, comparing {', '.join(loss.compared) or 'nothing'}{floor}")
        said = [f"{UNITS[name]} {value:.4g}" for name, value in equivalents(tau, loss.ddpm).items()]
        if noise is not None:
            own = noise.time_at(torch.tensor([tau])).item() if tau < float("inf") else float("inf")
            said.append(f"t of {type(noise).__name__} {own:.4g}")
        yield _line("threshold", ", ".join(said))
        loss.announced = True  # which it would do with its first batch
        share = 1.0 if ratios is None else loss.passes(ratios, z).float().mean().item()
        of = "training samples, as their times are drawn" if noise is not None else "the samples of the first batch"
        yield _line("past the gate", f"{share:.0%} of {of}")
        yield from self._cost(callback, loss, shape, share, module)

    def _cost(
        self,
        callback: LPLCallback,
        loss: LatentPerceptualLoss,
        shape: tuple[int, ...],
        share: float,
        module: LatentDiffusionModule | None,
    ) -> Iterator[str]:
        decoder = of_decoder(loss.autoencoder, shape, loss.compared)
        if decoder is None:
            yield _line("estimated cost", "unknown: this decoder cannot be counted. `lpl profile` measures it")
            return
        # Of the clean latent and of the estimate, and the gradient of the latter's input, which is as many again.
        passes = 3 * decoder
        lpl = share * passes / callback.every_n_steps
        each = f"{_giga(passes)} for each sample past the gate, in three partial passes of the decoder"
        less = "" if loss.subset == Subset() else ", without `subset`"
        less += "" if callback.budget.share is None else ", before `budget` has been looked at"
        if module is None or self._denoiser is None:
            yield _line("estimated cost", f"LPL {_giga(lpl)} multiply-adds a sample{less}: {each}")
        else:
            rest = self._rest(module, self._denoiser, shape[2])
            part = lpl / max(1, lpl + rest)
            text = f"LPL {part:.0%} of a step's multiply-adds{less}: {_giga(lpl)} beside {_giga(rest)} a sample"
            yield _line("estimated cost", text)
            captions = module.conditioner.num_classes is None
            yield _line(
                "", f"{each}{f'; captions of {TOKENS} tokens, not counting their encoders' if captions else ''}"
            )
        yield _line("", "counted and not measured; `lpl profile` measures")

    def _rest(self, module: LatentDiffusionModule, denoiser: int, side: int) -> int:
        """Multiply-adds of a step without LPL, for a sample: encoding it, and training on it."""
        data = getattr(module.trainer, "datamodule", None)
        pixels = side * module.autoencoder.downscale
        encoder = of_encoder(module.autoencoder, (1, 3, pixels, pixels)) if getattr(data, "has_images", True) else 0
        # A forward pass, one for the gradient of activations, and one for that of the weights that are trained.
        return (encoder or 0) + round((2 + _trained(module.denoiser)) * denoiser)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say where everything is, after all that is written at the end."""
        if isinstance(pl_module, LPLMixin):
            pl_module.remove_loss_term(TERM)
        folder = run_folder(trainer) if stage == "fit" else None  # all processes must ask
        if folder is not None and self.end and trainer.is_global_zero:
            rank_zero_info("\n".join(_end(trainer, pl_module, folder)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind in the module."""
        if isinstance(pl_module, LPLMixin):
            pl_module.remove_loss_term(TERM)


def _end(trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> Iterator[str]:
    yield f"Run ended at step {trainer.global_step}: {folder}"
    checkpoint = _checkpoint(trainer)
    if checkpoint is not None:
        yield _line("checkpoint", str(checkpoint))
    callbacks: list[Any] = cast(Any, trainer).callbacks
    config = next((one.path for one in callbacks if isinstance(one, SaveRunConfig)), None)
    for name in FILES:
        # A config that lies there may be of another run.
        if (folder / name).exists() and (config is not None or name != CONFIG):
            yield _line(name, str(folder / name))
    if checkpoint is None or not isinstance(module, LatentDiffusionModule):
        return
    yield "Next:"
    if config is not None:
        given = ["-c", str(folder / CONFIG), "--ckpt_path", str(checkpoint)]
        yield _line("measure it", _command("test", *given))
        yield _line("draw from it", _command("predict", *given, "--writer.dirname", str(folder / "generated")))
    yield _line("export it", _command("export", "--ckpt", str(checkpoint), "--out", str(folder / "exported")))
    if (other := _evaluated(folder)) is not None:
        yield _line("then compare it", _command("compare", str(other), str(folder)))


def _command(*words: str) -> str:
    return shlex.join(["lpl", *words])


def _checkpoint(trainer: pl.Trainer) -> Path | None:
    """The checkpoint to go on with: the best where one is chosen, or else the last."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            last, best = callback.last_model_path, callback.best_model_path
            for path in (best, last) if callback.monitor else (last, best):
                if path and Path(path).exists():
                    return Path(path)
    return None


def _evaluated(folder: Path) -> Path | None:
    """The newest other run of the same name that was evaluated."""
    found = [path for path in folder.parent.glob("*/evaluation") if path.parent != folder]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _names(module: pl.LightningModule) -> Iterator[str]:
    yield type(module).__name__
    if isinstance(module, LatentDiffusionModule):
        parts = (module.denoiser, module.noise, module.conditioner, module.autoencoder.model)
        yield f"of {', '.join(type(part).__name__ for part in parts)}"


def _parameters(module: pl.LightningModule) -> Iterator[str]:
    """Trainable and frozen ones, by part."""
    for title, trained in (("trainable", True), ("frozen", False)):
        counts = {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad is trained)
            for name, part in module.named_children()
        }
        total = sum(p.numel() for p in module.parameters() if p.requires_grad is trained)
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        yield _line(f"{title} parameters", f"{total:,}" + (f" ({parts})" if parts else ""))


def _trained(module: nn.Module) -> float:
    """Share of a module's parameters that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, trained in sizes if trained) / max(1, sum(size for size, _ in sizes))


def _latents(module: LatentDiffusionModule) -> tuple[int, ...] | None:
    """Shape (1, C, h, w) of a latent; None where it is not known before there is one."""
    try:
        side = module.latent_size
        return (1, module.autoencoder.latent_channels, side, side)
    except ValueError:
        return None


def _ratios(noise: NoiseProcess) -> Tensor:
    """Noise-to-signal ratios (N,) of training times, evenly over their distribution."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    alpha, sigma = noise.alpha_sigma(noise.times(u))
    return sigma / alpha


def _lpl(trainer: pl.Trainer) -> Sequence[LPLCallback]:
    callbacks: list[Any] = cast(Any, trainer).callbacks
    return [callback for callback in callbacks if isinstance(callback, LPLCallback)]


def _line(name: str, text: str) -> str:
    return f"  {name:<21}{text}"


def _giga(count: float) -> str:
    return f"{count / 1e9:.3g} G"
