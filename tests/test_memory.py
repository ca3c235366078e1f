"""Encoder and decoder where memory holds no more than some samples at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import image_batch, tiny_kl
from test_module import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpl_lightning import Autoencoder, LatentDiffusionModule, LatentPerceptualLoss, LPLCallback
from lpl_lightning.memory import Halving

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
]


def limit(module: nn.Module, most: int, error: RuntimeError) -> list[int]:
    """Let a module refuse more samples than that; gives the list of how many it was asked for."""
    seen: list[int] = []

    def refuse(_module: object, inputs: Any, _output: object) -> None:
        seen.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise error

    module.register_forward_hook(refuse)
    return seen


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lpl_lightning.memory"]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "cudnn"])
def test_what_does_not_fit_runs_in_parts(error: RuntimeError, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny_kl(scaling_factor=0.5, shift_factor=0.1).double()
    autoencoder = Autoencoder(model)
    images = torch.rand(7, 3, 16, 16, dtype=torch.float64) * 2 - 1
    generators = [torch.Generator().manual_seed(n) for n in range(7)]
    z, again = autoencoder.encode(images, generators), autoencoder.encode(images, generators)
    images_back = autoencoder.decode(again)
    mean, deviation = autoencoder.posterior(images)
    seen = [limit(model.encoder.mid_block, 4, error), limit(model.decoder.mid_block, 2, error)]
    for attempt in range(2):
        generators = [torch.Generator().manual_seed(n) for n in range(7)]
        torch.testing.assert_close(autoencoder.encode(images, generators), z, rtol=1e-10, atol=1e-12)
        for found, expected in zip(autoencoder.posterior(images), (mean, deviation), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        again = autoencoder.encode(images, generators)
        torch.testing.assert_close(autoencoder.decode(again), images_back, rtol=1e-10, atol=1e-12)
        if attempt == 0:
            assert [counts[:2] for counts in seen] == [[7, 4], [7, 4]]
            # Once for each size that was found to be too large: 7 of the encoder, 7 and 4 of the decoder.
            assert len(said(caplog)) == 3
            assert "Encoder: 7 samples do not fit in memory at once; from now on 4." in said(caplog)
        for counts in seen:
            counts.clear()
    assert len(said(caplog)) == 3, "what did not fit once is not tried again"


def test_what_is_not_about_memory_is_raised() -> None:
    halving = Halving()

    def run(part: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        halving("It", run, torch.zeros(4, 2), torch.cat)

    def refuse(part: Tensor) -> Tensor:
        sizes.append(len(part))
        raise ERRORS[0]

    sizes: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        halving("It", refuse, torch.zeros(4, 2), torch.cat)
    assert sizes == [4, 2, 1]
    assert halving("Nothing", lambda part: part, torch.zeros(0, 2), torch.cat).shape == (0, 2)


def test_with_a_gradient_nothing_is_halved() -> None:
    sizes: list[int] = []

    def refuse(part: Tensor) -> Tensor:
        sizes.append(len(part))
        raise ERRORS[0]

    with pytest.raises(torch.OutOfMemoryError):
        Halving()("It", refuse, torch.zeros(4, 2, requires_grad=True), torch.cat)
    assert sizes == [4]


def test_training_goes_on_with_smaller_chunks_of_lpl(
    make_module: Callable[..., LatentDiffusionModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses and weights are those of a run with memory enough; what was too large is said once."""

    def trained(most: int) -> tuple[list[Tensor], Tensor, list[int]]:
        torch.manual_seed(0)
        module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        seen = limit(module.autoencoder.model.decoder.up_blocks[0], most, ERRORS[0])
        losses: list[Tensor] = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                losses.append(trainer.callback_metrics["loss"])

        def loss(autoencoder: Autoencoder) -> LatentPerceptualLoss:
            return LatentPerceptualLoss(autoencoder, threshold=float("inf"), mask_outliers=False)

        run = trainer(tmp_path, max_steps=3, callbacks=[LPLCallback(loss=loss), Watch()], limit_val_batches=0)
        batches: Any = [image_batch(6) for _ in range(3)]
        loader: Any = DataLoader(batches, batch_size=None)
        run.fit(module, loader, loader)
        return losses, module.denoiser.backbone.proj_out.weight.detach(), seen

    expected, weight, _ = trained(100)
    assert not said(caplog)
    found, same_weight, seen = trained(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_weight, weight, rtol=1e-4, atol=1e-6)
    assert said(caplog) == [
        "LPL: 6 samples do not fit in memory at once; from now on 3.",
        "LPL: 3 samples do not fit in memory at once; from now on 2.",
    ]
    assert sum(count > 2 for count in seen) == 2
