from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from torch import Tensor

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses import Execution


def overflowing(stage: str, sample: int = 1) -> Autoencoder:
    """An autoencoder one of whose stages overflows for one sample of two."""
    model: Any = tiny_kl()
    blocks = {"mid": model.decoder.mid_block} | {f"up_{i}": b for i, b in enumerate(model.decoder.up_blocks)}

    def overflow(_module: object, _inputs: object, features: Tensor) -> Tensor:
        factor = torch.ones(len(features), 1, 1, 1)
        factor[sample : sample + 1] = math.inf
        return features * factor

    blocks[stage].register_forward_hook(overflow)
    return Autoencoder(model)


def pair() -> tuple[Tensor, Tensor]:
    z0 = torch.randn(2, 4, 4, 4)
    return (z0 + 0.3 * torch.randn_like(z0)).requires_grad_(), z0


@pytest.mark.parametrize("stage", ["mid", "up_0", "up_2"])
def test_raise_names_the_stage_and_the_sample(stage: str) -> None:
    lpl = LatentPerceptualLoss(overflowing(stage))
    with pytest.raises(FloatingPointError, match=rf"arose in the decoder's stage '{stage}', for the samples \[1\]"):
        lpl(*pair())


def test_raise_names_no_stage_that_it_did_not_look_at() -> None:
    """Compared is up_2 alone: the first map is looked at as well, those between are not."""
    z = pair()
    with pytest.raises(FloatingPointError, match="arose in the decoder's stage 'mid'"):
        LatentPerceptualLoss(overflowing("mid"), depth=["up_2"])(*z)
    with pytest.raises(FloatingPointError, match="arose in the decoder's stages after 'mid', up to 'up_2'"):
        LatentPerceptualLoss(overflowing("up_1"), depth=["up_2"])(*z)


@pytest.mark.parametrize("statistics", ["predicted", "target", "separate", "none"])
@pytest.mark.parametrize("streamed", [True, False])
def test_the_outlier_mask_hides_nothing(statistics: Any, streamed: bool) -> None:
    """A value that is no number makes the spread of its channel none, and may make all of it outliers."""
    model: Any = tiny_kl()

    def overflow(_module: object, _inputs: object, features: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # of the estimates
            features = features.clone()
            features[:, 0, 0, 0] = math.inf
        return features

    model.decoder.up_blocks[2].register_forward_hook(overflow)
    execution = Execution(streamed=streamed)
    lpl = LatentPerceptualLoss(Autoencoder(model), statistics=statistics, mask_upscale=1.0, execution=execution)
    with pytest.raises(FloatingPointError, match="arose in the decoder's stage 'up_2'"):
        lpl(*pair())


@pytest.mark.parametrize("which", [0, 1])
def test_raise_names_a_latent(which: int) -> None:
    latents = [z.detach().clone() for z in pair()]
    latents[which][0, 2, 1, 1] = math.nan
    name = ("the estimate z0_hat", "the clean latent z0")[which]
    with pytest.raises(FloatingPointError, match=rf"arose in {name}, for the samples \[0\]"):
        LatentPerceptualLoss(Autoencoder(tiny_kl()))(*latents)


def test_zero_leaves_out_the_sample_and_its_gradient_only() -> None:
    z0_hat, z0 = pair()
    loss = LatentPerceptualLoss(overflowing("up_1"), nonfinite="zero")(z0_hat, z0)
    loss.sum().backward()
    assert loss[0] > 0
    assert loss[1] == 0
    assert z0_hat.grad is not None
    assert z0_hat.grad[0].abs().sum() > 0
    assert z0_hat.grad[1].abs().sum() == 0


def test_the_sample_that_is_kept_counts_as_it_would_alone() -> None:
    autoencoder = overflowing("up_1")
    z0_hat, z0 = pair()
    (gradient,) = torch.autograd.grad(LatentPerceptualLoss(autoencoder, nonfinite="zero")(z0_hat, z0).sum(), z0_hat)
    twice = [torch.stack([z[0], z[0]]) for z in (z0_hat.detach(), z0)]
    twice[0].requires_grad_()
    whole = LatentPerceptualLoss(overflowing("up_1", sample=1), nonfinite="zero")
    whole.autoencoder.model.load_state_dict(autoencoder.model.state_dict())
    (expected,) = torch.autograd.grad(whole(*twice).sum(), twice[0])
    torch.testing.assert_close(gradient[0], expected[0])


def test_skip_leaves_out_the_whole_call() -> None:
    z0_hat, z0 = pair()
    loss = LatentPerceptualLoss(overflowing("up_1"), nonfinite="skip")(z0_hat, z0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().sum() == 0


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
def test_finite_values_pass_untouched(nonfinite: Any) -> None:
    z0_hat, z0 = pair()
    autoencoder = Autoencoder(tiny_kl())
    loss = LatentPerceptualLoss(autoencoder, nonfinite=nonfinite)(z0_hat, z0)
    torch.testing.assert_close(loss, LatentPerceptualLoss(autoencoder)(z0_hat, z0), rtol=0, atol=0)
    loss.sum().backward()
    assert z0_hat.grad is not None
    assert (z0_hat.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_a_copy_of_the_loss_can_be_made() -> None:
    lpl = LatentPerceptualLoss(Autoencoder(tiny_kl()), nonfinite="skip")
    z0_hat, z0 = pair()
    torch.testing.assert_close(copy.deepcopy(lpl)(z0_hat, z0), lpl(z0_hat, z0))
