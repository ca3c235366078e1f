"""Whether a diffusers scheduler samples what a denoiser was trained for: its prediction, its noise levels, latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler, UnCLIPScheduler
from torch import Tensor

from lpl_lightning.noise import NoiseProcess, NoisyLatents

__all__ = ["check_scheduler", "knowing_ones"]


def knowing_ones(noise: NoiseProcess) -> Callable[[Tensor, Tensor, object], Tensor]:
    """The exact denoiser of a data set whose only latent is all ones.

    What is left of any other sample is noise in a straight line, so that schedulers of every order and number of steps
    give the ones back exactly, but for the noise that they end with.

    Args:
        noise: The process.

    Returns:
        ``(z_t, t, condition) -> prediction``.
    """

    def predict(z_t: Tensor, t: Tensor, condition: object) -> Tensor:
        alpha, sigma = (value.to(z_t).view(-1, 1, 1, 1) for value in noise.alpha_sigma(t))
        added = torch.where(sigma > 0, (z_t - alpha) / sigma, torch.zeros_like(z_t))
        return noise.target(NoisyLatents(torch.ones_like(z_t), added, t, alpha, sigma, z_t, (sigma / alpha).flatten()))

    return predict


def check_scheduler(scheduler: Any, noise: NoiseProcess, num_steps: int) -> None:
    """Refuse a scheduler that is not one for a noise process, or whose settings make it none for latents.

    Args:
        scheduler: A diffusers scheduler.
        noise: The process that the denoiser is trained with.
        num_steps: Steps that are taken.

    Raises:
        ValueError: It does not fit.
    """
    config = scheduler.config
    kind = config.get("prediction_type")
    # Such a scheduler takes its noise levels by one and what the denoiser gives by the other.
    if "use_flow_sigmas" in config and bool(config["use_flow_sigmas"]) != (kind == "flow_prediction"):
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} has prediction_type={kind!r} with use_flow_sigmas="
            f"{config['use_flow_sigmas']!r}. For a flow set prediction_type='flow_prediction' and "
            "use_flow_sigmas=True, for another noise process neither, or leave `scheduler` out to have the "
            "matching one."
        )
    made_for = "edm" if "sigma_data" in config else "flow" if kind is None else str(kind)
    if made_for == "flow" and {"trained_betas", "beta_start", "sigma_min"} & config.keys():
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} has noise levels of its own, and does not say what the "
            "denoiser predicts: leave `scheduler` out to have the matching one, or take one with `prediction_type`."
        )
    if made_for.removesuffix("_prediction") != noise.prediction_type.removesuffix("_prediction"):
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} is set for prediction_type={made_for!r}, but the "
            f"noise process {type(noise).__name__} trains {noise.prediction_type!r}. Set the scheduler's "
            "`prediction_type`, or leave `scheduler` out to have the matching one."
        )
    name = type(scheduler).__name__
    if made_for == "edm":
        level = torch.tensor([2.0])
        times = getattr(scheduler, "precondition_noise", noise.time_at)
        if kind != "epsilon" or not torch.allclose(times(level), noise.time_at(level)):
            raise ValueError(
                f"The scheduler {name} with prediction_type={kind!r} reads what the denoiser predicts with another "
                "sign than EDM's, or gives it other times: take EDMEulerScheduler or "
                "EDMDPMSolverMultistepScheduler with prediction_type='epsilon', or leave `scheduler` out to have "
                "the matching one."
            )
    timesteps = getattr(scheduler, "timesteps", None)
    rises = timesteps is not None and len(timesteps) > 1 and timesteps[0] < timesteps[-1]
    if rises or config.get("invert_sigmas"):
        raise ValueError(
            f"The scheduler {name} goes from clean latents to noise: set invert_sigmas=False where it has that, or "
            "leave `scheduler` out to have the matching one."
        )
    try:
        inspect.signature(scheduler.step).bind(None, None, None)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"The scheduler {name} cannot be called as `step(prediction, timestep, z)`, whatever num_steps is: "
            "take another, or leave `scheduler` out to have the matching one."
        ) from error
    _check_chain(scheduler, noise)
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise ValueError(
                f"The scheduler {type(scheduler).__name__} has {key}=True, which confines clean images to the "
                "range of pixels; latents reach beyond it. Set `clip_sample` and `thresholding` to False (for some "
                "schedulers the first is True by default), or leave `scheduler` out to have the matching one."
            )
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} has use_dynamic_shifting=True, which asks for a shift "
            "(`mu`) of each image size, and the sampler gives it none. Set it to False, with a fixed shift "
            "(`shift`, or `flow_shift` where it is called so), or leave `scheduler` out to have that of the noise "
            "process."
        )
    _check_stride(scheduler, num_steps)


def _check_stride(scheduler: Any, num_steps: int) -> None:
    """Refuse a scheduler whose steps lead to other noise levels than those that its next steps assume."""
    config, n = scheduler.config, num_steps
    if isinstance(scheduler, PNDMScheduler):  # by num_train_timesteps // n
        chain, spacing = config["num_train_timesteps"], config["timestep_spacing"]
        misses = n > chain if spacing == "leading" else spacing != "trailing" or chain % n != 0
        remedy = f"set timestep_spacing='leading' and at most {chain} steps"
    else:  # by 1
        misses = isinstance(scheduler, UnCLIPScheduler) and n != config["num_train_timesteps"]
        remedy = "take DDPMScheduler"
    if misses:
        raise ValueError(
            f"The scheduler {type(scheduler).__name__} does not step from each of its timesteps to the next "
            f"where num_steps={n} and timestep_spacing={config.get('timestep_spacing')!r}: {remedy}, or leave "
            "`scheduler` out to have the matching one."
        )


def _check_chain(scheduler: Any, noise: NoiseProcess) -> None:
    """Refuse a scheduler of other noise levels than those trained with."""
    name, config = type(scheduler).__name__, scheduler.config
    matching = noise.sampling_scheduler()
    trained = matching.config
    keys = ["num_train_timesteps", "sigma_data"]
    if config.get("trained_betas") is None:
        keys += ["beta_start", "beta_end", "beta_schedule"]
    elif "trained_betas" in trained:
        # Before they are rescaled, which is a setting of its own.
        betas = type(matching).from_config(trained, rescale_betas_zero_snr=False).betas
        given = torch.tensor(np.asarray(config["trained_betas"]), dtype=betas.dtype)
        if given.shape != betas.shape or not torch.allclose(given, betas, rtol=1e-4, atol=0):
            raise ValueError(
                f"The scheduler {name} has `trained_betas` that are not those that the noise process was trained "
                "with: leave them out and set `beta_start`, `beta_end` and `beta_schedule`, or leave `scheduler` "
                "out to have the matching one."
            )
    for key in keys:
        if key in trained and key in config and trained[key] != config[key]:
            raise ValueError(
                f"The scheduler {name} has {key}={config[key]!r}, but the noise process was trained with "
                f"{trained[key]!r}: set it so, or leave `scheduler` out to have the matching one."
            )
    if config.get("snr_shift_scale", 1.0) != 1.0:
        raise ValueError(
            f"The scheduler {name} has snr_shift_scale={config['snr_shift_scale']!r}, so its noise levels are "
            "others than those trained with: set it to 1.0, or leave `scheduler` out to have the matching one."
        )
    key = "rescale_betas_zero_snr"
    # Those that know no such setting do not rescale.
    if key in trained and trained[key] != config.get(key, False):
        knows = f"has {key}={config[key]!r}" if key in config else f"knows no {key}"
        remedy = "set it so" if key in config else "take one that knows it, such as DDIMScheduler"
        raise ValueError(
            f"The scheduler {name} {knows}, but the noise process was trained with {trained[key]!r}: {remedy}, or "
            "leave `scheduler` out to have the matching one."
        )
