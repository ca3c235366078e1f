r"""The clean latent in a loop that noises by a scheduler of diffusers.

For :math:`z_t = \alpha_t z_0 + \sigma_t \epsilon` and :math:`n^2 = \alpha_t^2 + \sigma_t^2`, a prediction p implies
(table 1 of Berrada et al., ICLR 2025, where n is 1)

===============  ====================================================
prediction       :math:`\hat z_0`
===============  ====================================================
epsilon          :math:`(z_t - \sigma_t p) / \alpha_t`
v_prediction     :math:`(\alpha_t z_t - \sigma_t n p) / n^2`
sample           :math:`p`
flow_prediction  :math:`z_t - \sigma_t p`
===============  ====================================================

Schedulers whose noisy latents are not of variance one (Euler's :math:`z_t = z_0 + \sigma_t \epsilon`) have models that
see :math:`z_t / n`, which the velocity is of.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["estimate_z0"]


def estimate_z0(scheduler: Any, prediction: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the clean latents in a loop that noises by a diffusers scheduler.

    Two lines add the Latent Perceptual Loss to such a loop::

        z0_hat, noise_to_signal = estimate_z0(scheduler, prediction, z_t, t)
        loss = loss + 3.0 * lpl(z0_hat, z0, noise_to_signal).mean()

    Args:
        scheduler: What noises the latents, by ``add_noise`` or, as flow matching schedulers do, with the sigma that is
            ``t / num_train_timesteps``.
        prediction: The model's output (B, C, h, w), of the scheduler's ``prediction_type``.
        z_t: Noisy latents (B, C, h, w), as ``add_noise`` gives them and before any ``scale_model_input``.
        t: Timesteps (B,) of the samples, as ``add_noise`` takes them.

    Returns:
        Estimates of the clean latents (B, C, h, w), connected to the prediction, in float32 at least, and sigma / alpha
        (B,) on the device of ``t``. Of a predicted epsilon with no signal left (a terminal SNR of zero) there is none:
        it is infinite, without a gradient, and passes no finite threshold.

    Raises:
        ValueError: A scheduler or a prediction of an unknown kind, or shapes that do not belong together.
    """
    if prediction.shape != z_t.shape:
        raise ValueError(
            f"`prediction` must be of the shape of `z_t`, got {tuple(prediction.shape)} and {tuple(z_t.shape)}. Of a "
            "model that predicts a variance too, give the half before it: prediction.chunk(2, dim=1)[0]."
        )
    if t.shape != z_t.shape[:1]:
        raise ValueError(
            f"`t` must hold one timestep for each of the {len(z_t)} samples, got shape {tuple(t.shape)}. Give one for "
            "each: t.expand(len(z_t))."
        )
    alpha, sigma = _scales(scheduler, t)
    noise_to_signal = sigma / alpha
    alpha, sigma = (x.to(z_t.device).view(-1, *[1] * (z_t.ndim - 1)) for x in (alpha, sigma))
    p, z_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (prediction, z_t))
    if hasattr(scheduler, "precondition_outputs"):  # of EDM, whose networks predict what c_out makes the rest of
        return cast(Tensor, scheduler.precondition_outputs(z_t, p, sigma)), noise_to_signal
    flow = "flow_prediction" if hasattr(scheduler, "scale_noise") else None
    kind = scheduler.config.get("prediction_type", flow)
    match kind:
        case "epsilon":
            # With no signal left there is no estimate, and its gradient is zero and not, as of a division by 0, none.
            found = (z_t - sigma * p) / torch.where(alpha > 0, alpha, 1.0)
            return torch.where(alpha > 0, found, torch.inf), noise_to_signal
        case "v_prediction":
            n = torch.hypot(alpha, sigma)
            return (alpha * z_t - sigma * n * p) / n**2, noise_to_signal
        case "sample":
            return p, noise_to_signal
        case "flow_prediction":
            return z_t - sigma * p, noise_to_signal
    raise ValueError(
        f"`scheduler` has the prediction_type {kind!r}; known are 'epsilon', 'v_prediction', 'sample' and "
        "'flow_prediction'. Compute the clean latent that such a prediction implies in your loop."
    )


def _scales(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma (B,) float32 of timesteps, read off what the scheduler makes of a latent of one and no noise."""
    if hasattr(scheduler, "add_noise"):
        one = torch.ones(len(t), 1, device=t.device, dtype=torch.float32)  # whatever the default is
        none = torch.zeros_like(one)
        alpha, sigma = (scheduler.add_noise(latent, noise, t) for latent, noise in ((one, none), (none, one)))
        return alpha.flatten(), sigma.flatten()
    if hasattr(scheduler, "scale_noise"):
        sigma = t.float() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    raise ValueError(
        f"`scheduler` must be one of diffusers with add_noise or scale_noise, got {type(scheduler).__name__}. In a "
        "loop without one, give LatentPerceptualLoss the clean latent that the model's prediction implies."
    )
