"""What a finished training leaves behind: safetensors that hold what was trained and nothing that can run code."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import save_file
from torch import Tensor, nn

from lpl_lightning.autoencoder_module import AutoencoderModule
from lpl_lightning.callbacks.ema import averaged, decay_in_place
from lpl_lightning.export import export_diffusers
from lpl_lightning.export.provenance import check_replaceable, note, provenance
from lpl_lightning.metrics.tensor_files import open_to_others
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.run_folder import run_folder
from lpl_lightning.sharding import gathered

__all__ = ["SaveAutoencoder", "SaveDiffusers", "SaveWeights"]

Precision = Literal["float32", "float16", "bfloat16"]


class SaveWeights(Callback):
    """At the end of ``fit``, write the trained weights as one safetensors file, for ``weights`` of another run.

    Args:
        filename: Name of the file inside the run's folder; it may lie in a folder of its own, such as
            ``final/weights.safetensors``, which is made.
        dtype: Precision of the saved weights.
    """

    def __init__(self, filename: str = "weights.safetensors", dtype: Precision = "float32") -> None:
        self.filename = filename
        self.dtype = dtype

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to write over a file that no run has left."""
        _check_place(trainer, stage, self.filename, "filename")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        # The average is in place by now, but not where there was nothing left to train.
        with averaged(trainer, pl_module):
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer)
        if folder is None:
            return
        module = gathered(pl_module, keep=trainer.is_global_zero)
        if module is None:
            return
        path = folder / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, self.dtype)
        state: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in module.state_dict().items():
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            written = tensor.detach().to("cpu", kind).contiguous()
            storage = written.untyped_storage().data_ptr()
            state[name] = written.clone() if storage in storages else written  # safetensors refuses tied weights
            storages.add(storage)
        save_file(state, path, _metadata(trainer, pl_module))
        open_to_others(path)
        rank_zero_info(f"Weights saved in {path}")


class SaveAutoencoder(Callback):
    """At the end of ``fit``, write the autoencoder, or its average, as a diffusers ``save_pretrained`` folder.

    ``shift_factor`` and ``scaling_factor`` are set from the latents of the last validation, also of one before the
    checkpoint that the run went on from, so that the scaled latents have zero mean and unit variance;
    ``latents_mean`` and ``latents_std`` by channel are taken out. Where there was no validation, or nothing left to
    train, the first process encodes the data module's images for validation at the end.

    Args:
        dirname: Folder inside the run's folder.
        dtype: Precision of the saved weights.
    """

    def __init__(
        self,
        dirname: str = "autoencoder",
        dtype: Precision = "float32",
    ) -> None:
        self.dirname = dirname
        self.dtype = dtype
        self._statistics: tuple[float, float] | None = None
        self._trains = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that is not an autoencoder's, and to write over what no run has left."""
        self._statistics, self._trains = None, False
        if not isinstance(pl_module, AutoencoderModule):
            raise ValueError(
                f"SaveAutoencoder saves the autoencoder of an AutoencoderModule, got {type(pl_module).__name__}; "
                "take it out of trainer.callbacks."
            )
        _check_place(trainer, stage, self.dirname, "dirname")

    def state_dict(self) -> dict[str, Any]:
        """What the last validation measured."""
        return {} if self._statistics is None else {"statistics": list(self._statistics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have what was measured before the checkpoint."""
        if "statistics" in state_dict:
            mean, std = state_dict["statistics"]
            self._statistics = float(mean), float(std)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there is something left to train."""
        self._trains = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up the latents' statistics over processes, on their devices: the end of ``fit`` is on the CPU."""
        is_measured = trainer.state.fn == "fit" and not trainer.sanity_checking
        if is_measured and isinstance(pl_module, AutoencoderModule):
            self._statistics = pl_module.latent_statistics()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder."""
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero or not isinstance(pl_module, AutoencoderModule):
            return
        with averaged(trainer, pl_module):
            # A checkpoint from before the last validation would say what the one before it measured.
            if self._statistics is None or not self._trains:
                self._statistics = _measured(trainer, pl_module) or self._statistics
            self._write(trainer, pl_module, folder / self.dirname)

    def _write(self, trainer: pl.Trainer, pl_module: AutoencoderModule, folder: Path) -> None:
        if self._statistics is None:
            rank_zero_warn(
                "SaveAutoencoder: there is nothing to measure the latents' scale by, which is left at "
                f"{pl_module.autoencoder.config.get('scaling_factor')}: validate by images of a data module."
            )
        else:
            mean, std = self._statistics
            # Numbers by channel, which it may have come with, would be read in the place of these.
            former = {key: None for key in ("latents_mean", "latents_std") if key in pl_module.autoencoder.config}
            pl_module.autoencoder.register_to_config(shift_factor=mean, scaling_factor=1.0 / std, **former)
        # By PyTorch's method: diffusers' own warns of parts to be kept in float32, of which there are none.
        model: Any = nn.Module.to(copy.deepcopy(pl_module.autoencoder), "cpu", getattr(torch, self.dtype))
        model.save_pretrained(folder)
        note(folder, _metadata(trainer, pl_module))
        open_to_others(folder)
        rank_zero_info(f"Autoencoder saved in {folder}")


def _measured(trainer: pl.Trainer, pl_module: AutoencoderModule) -> tuple[float, float] | None:
    """The latents' statistics over what a validation looks at; None where there is nothing."""
    data, limit = trainer.datamodule, trainer.limit_val_batches  # type: ignore[attr-defined]
    if data is None or not limit or not is_overridden("val_dataloader", data):
        return None
    loader = data.val_dataloader()
    count = limit if isinstance(limit, int) else None if limit == 1.0 else int(len(loader) * limit)
    pl_module.to(trainer.strategy.root_device)
    found = pl_module.measured_latents(islice(loader, count))
    pl_module.to("cpu")
    return found


class SaveDiffusers(Callback):
    """At the end of ``fit``, write what was trained as a diffusers pipeline loads it, averaged if it was averaged.

    What ``lpl export`` does with a checkpoint, see ``export_diffusers``; the folder of an earlier run is replaced.

    Args:
        dirname: Folder inside the run's folder.
        dtype: Precision of the saved weights.
    """

    def __init__(self, dirname: str = "diffusers", dtype: Precision = "float32") -> None:
        self.dirname = dirname
        self.dtype = dtype

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that is no latent diffusion model, and to write over what no run has left."""
        if not isinstance(pl_module, LatentDiffusionModule):
            raise ValueError(
                f"SaveDiffusers writes a LatentDiffusionModule, got {type(pl_module).__name__}; take it out of "
                "trainer.callbacks."
            )
        _check_place(trainer, stage, self.dirname, "dirname")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder."""
        folder = run_folder(trainer)
        if folder is None or not isinstance(pl_module, LatentDiffusionModule):
            return
        with averaged(trainer, pl_module):
            module = gathered(pl_module, keep=trainer.is_global_zero)
            if module is not None:
                metadata = _metadata(trainer, module)
                export_diffusers(module, folder / self.dirname, self.dtype, replace=True, metadata=metadata)


def _check_place(trainer: pl.Trainer, stage: str, name: str, argument: str) -> None:
    folder = run_folder(trainer) if stage == "fit" else None
    if folder is not None:
        check_replaceable(folder / name, folder, argument)


def _metadata(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
    return provenance(module, trainer.global_step, trainer.current_epoch, decay_in_place(trainer))
