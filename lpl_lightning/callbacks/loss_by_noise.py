"""Validation loss at fixed noise levels, on noise that is the same each time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpl_lightning.arguments import above
from lpl_lightning.callbacks.ema import decay_in_place
from lpl_lightning.callbacks.lpl import LPLCallback
from lpl_lightning.evaluation.evaluator import posterior_mean
from lpl_lightning.evaluation.gathering import Rows
from lpl_lightning.evaluation.generated import to_uint8
from lpl_lightning.evaluation.report import VALIDATION, formatted, write_whole
from lpl_lightning.evaluation.settings import as_json, attributes, digest, model_settings
from lpl_lightning.evaluation.suite import versions
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.pretrained import read_checkpoint
from lpl_lightning.run_folder import loaded_run_folder, log_picture

__all__ = ["LossByNoise", "read_loss_by_noise"]

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise-to-signal ratios sigma / alpha by default."""

_FORMAT = "lpl_lightning loss by noise 1"

_Level = dict[str, Any]
"""Place, means and standard errors of a level, by name; None for what is not there."""


class LossByNoise(Callback):
    r"""Validation losses by noise level, each image at each level, in ``lpl validate``.

    Levels are ratios :math:`\sigma / \alpha`, which mean the same for every noise process and so compare between them;
    a DDPM takes its nearest step. An image's noise comes from a seed and its own pixels: it is one at all levels, and
    neither batches, processes nor the order of loading change it. An image that comes twice, as where processes fill up
    their shares, counts once. Latents are the mean of the autoencoder's posterior.

    Per level there are ``loss_diffusion`` (weighted as in training), ``prediction_mse`` (not weighted),
    ``estimate_mse`` (mean square of z0_hat - z0, in scaled latents) and, with an ``LPLCallback``, ``loss_lpl``
    (without its weight; 0 where gated), as means over images with their standard errors, of which one image has none.
    They are logged as ``val_NAME_at_RATIO``, and written to ``validation/loss_by_noise_CHECKPOINT-HASH`` of the run's
    folder, or of the checkpoint's run, as .json, .csv and, with matplotlib, .png. The hash is of model, autoencoder,
    images and settings; in training, where the step tells the weights, it leaves them out.

    Args:
        noise_to_signal: The levels.
        seed: Of the noise.
        in_training: Whether to do so in the validations of training too, each as many passes of the denoiser as levels.
    """

    def __init__(self, noise_to_signal: Sequence[float] = LEVELS, seed: int = 0, in_training: bool = False) -> None:
        above(0, **{f"noise_to_signal[{i}]": level for i, level in enumerate(noise_to_signal)})
        if not noise_to_signal or len(set(noise_to_signal)) < len(noise_to_signal):
            raise ValueError(f"`noise_to_signal` must hold one level or more, each once, got {noise_to_signal}.")
        self.levels, self.seed, self.in_training = sorted(noise_to_signal), seed, in_training
        self._rows: Rows | None = None
        self._names: list[str] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._rows = None
        is_asked = trainer.state.fn == "validate" or (self.in_training and not trainer.sanity_checking)
        if not is_asked or not isinstance(pl_module, LatentDiffusionModule):
            return
        has_lpl = _lpl_of(trainer) is not None
        self._names = ["loss_diffusion", "prediction_mse", "estimate_mse", *(["loss_lpl"] if has_lpl else [])]
        self._rows = Rows(len(self._names) * len(self.levels), pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the losses of a batch."""
        if self._rows is None or not isinstance(pl_module, LatentDiffusionModule):
            return
        module, loss = pl_module, _lpl_of(trainer)
        with posterior_mean(module.autoencoder):
            z0 = module.clean_latents(batch).float()
        index = _own_numbers(to_uint8(batch["image"].float()) if "image" in batch else batch["latent"].float().cpu())
        index = index.to(z0.device)
        drawn = [torch.Generator().manual_seed((number + self.seed) % 2**32) for number in index.tolist()]
        noise = torch.stack([torch.randn(z0.shape[1:], generator=generator) for generator in drawn]).to(z0)
        condition = module.conditioner(batch, len(z0))
        found = []
        for t in module.noise.time_at(torch.tensor(self.levels)).tolist():
            noisy = module.noise.noised(z0, noise, torch.full((len(z0),), t))
            with trainer.precision_plugin.forward_context():
                prediction = module.denoiser(noisy.z_t, noisy.t, condition)
            error = (prediction.float() - module.noise.target(noisy)).square().flatten(1).mean(dim=1)
            z0_hat = module.noise.estimate_z0(prediction, noisy)
            off = (z0_hat - noisy.z0).square().flatten(1).mean(dim=1)
            found += [module.noise.weight(noisy) * error, error, off]
            if loss is not None:
                loss.to(z0.device).eval()
                found.append(loss.evaluate(z0_hat, noisy.z0, noisy.noise_to_signal, reduction="none")[0])
        self._rows.add(index, torch.stack([values.to(z0.device, torch.float32) for values in found], dim=1))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and write the means."""
        if self._rows is None or not isinstance(pl_module, LatentDiffusionModule):
            return
        if (loss := _lpl_of(trainer)) is not None:
            loss.flush()  # a sample that was not finite is zero among the rows
        index, rows = self._rows.all()
        values = rows.double().unflatten(1, (len(self.levels), len(self._names)))
        means = values.mean(dim=0)
        errors: list[list[float | None]] = [[None] * len(self._names)] * len(self.levels)
        if len(values) > 1:
            errors = (values.std(dim=0) / len(values) ** 0.5).tolist()
        times = pl_module.noise.time_at(torch.tensor(self.levels))
        alpha, sigma = pl_module.noise.alpha_sigma(times)
        levels: list[_Level] = []
        for i, level in enumerate(self.levels):
            ratio = float(sigma[i] / alpha[i])
            place = {"level": level, "noise_to_signal": ratio, "log_snr": float(2 * (alpha[i] / sigma[i]).log())}
            own = dict(zip(self._names, means[i].tolist(), strict=True))
            spread = {f"{name}_se": error for name, error in zip(self._names, errors[i], strict=True)}
            levels.append({**place, "t": float(times[i]), **own, **spread})
            # The same in all processes; Lightning warns of what is not said to be brought together.
            pl_module.log_dict({f"val_{name}_at_{level:g}": value for name, value in own.items()}, sync_dist=True)
        self._write(trainer, pl_module, levels, index)

    def _write(self, trainer: pl.Trainer, module: LatentDiffusionModule, levels: list[_Level], index: Tensor) -> None:
        source = trainer.ckpt_path if trainer.state.fn == "validate" else None
        run = loaded_run_folder(trainer, source)  # all processes must ask
        if run is None:
            return
        settings: dict[str, Any] = {"levels": self.levels, "noise_process": attributes(module.noise)}
        if _lpl_of(trainer) is not None:
            settings["lpl"] = attributes(_lpl_of(trainer))
        if trainer.state.fn == "validate":
            settings |= model_settings(module)  # all processes must ask
        if not trainer.is_global_zero:
            return
        made: dict[str, Any] = {"global_step": trainer.global_step, "ema": decay_in_place(trainer)}
        name = f"step-{trainer.global_step:08d}"
        if trainer.state.fn == "validate":
            checkpoint = None if source is None else read_checkpoint(str(source), "ckpt_path", weights=False)
            made = {"weights": module.weights} if checkpoint is None else {"checkpoint": str(source)}
            if checkpoint is not None:
                ema = decay_in_place(trainer, checkpoint)
                made |= {"global_step": checkpoint.get("global_step"), "ema": ema}
            name = "weights" if source is None else Path(source).stem
        made |= {"noise": type(module.noise).__name__, "prediction_type": module.noise.prediction_type}
        made |= {"seed": self.seed, "images": len(index), "images_hash": digest(index.tolist(), 16)}
        made["precision"] = str(trainer.precision)
        own = digest({**settings, **{key: made[key] for key in ("seed", "images_hash", "precision")}})
        made |= {"settings": as_json(settings), "versions": versions()}
        folder = run / VALIDATION
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"loss_by_noise_{name}-{own}"
        report = {"format": _FORMAT, "names": self._names, "made": made, "levels": levels}
        write_whole(folder / f"{stem}.json", json.dumps(report, indent=1))
        table = io.StringIO()
        writer = csv.DictWriter(table, levels[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(levels)
        write_whole(folder / f"{stem}.csv", table.getvalue())
        if _plot(self._names, levels, folder / f"{stem}.png"):
            log_picture(trainer, "loss_by_noise", folder / f"{stem}.png")
        if trainer.state.fn == "validate":
            print(_markdown(self._names, levels))
            rank_zero_info(f"Loss by noise level: {folder / stem}.csv")


def read_loss_by_noise(path: str | Path) -> dict[str, Any]:
    """Read a ``loss_by_noise_NAME-HASH.json``.

    Returns:
        ``levels``: per level its ratio ``noise_to_signal``, ``log_snr``, time ``t`` and the means, each NAME with its
        standard error ``NAME_se``, None of one image; ``names`` of the means; ``made``: what they were made with.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: make one by `lpl validate`.")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"its `format` is {found['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no loss by noise level as this version writes it: {error}.") from error
    return found


def _callbacks(trainer: pl.Trainer) -> list[Any]:
    found: list[Any] = getattr(trainer, "callbacks", [])
    return found


def _lpl_of(trainer: pl.Trainer) -> Any:
    """The loss of the first ``LPLCallback``."""
    return next((callback.loss for callback in _callbacks(trainer) if isinstance(callback, LPLCallback)), None)


def _own_numbers(images: Tensor) -> Tensor:
    """A number of each image's own, of its pixels in 8 bits or of its latent: (B,) int64, 0 or more."""
    digests = [blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def _markdown(names: Sequence[str], levels: Sequence[_Level]) -> str:
    lines = ["| " + " | ".join(["sigma / alpha", *names]) + " |", "|---" * (1 + len(names)) + "|"]
    for level in levels:
        cells = [formatted(level[name]) + _spread(level[f"{name}_se"]) for name in names]
        lines.append("| " + " | ".join([formatted(level["noise_to_signal"]), *cells]) + " |")
    return "\n".join(lines)


def _spread(error: float | None) -> str:
    return "" if error is None else f" ± {formatted(error)}"


def _plot(names: Sequence[str], levels: Sequence[_Level], path: Path) -> bool:
    try:
        figures: Any = import_module("matplotlib.figure")
    except ModuleNotFoundError:
        rank_zero_info(f"{path.name} is not drawn: `pip install matplotlib` for plots.")
        return False
    figure = figures.Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        ratios = [level["noise_to_signal"] for level in levels]
        errors = [level[f"{name}_se"] for level in levels]
        spread = None if None in errors else errors
        axes.errorbar(ratios, [level[name] for level in levels], spread, marker="o")
        axes.set_xscale("log")
        axes.set_xlabel("sigma / alpha")
        axes.set_title(name)
    figure.savefig(path, dpi=120)
    return True
