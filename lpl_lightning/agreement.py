"""What the parts of a run must agree on and keep to before time is spent: encoders, data, noise, shapes, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.captions import Captions
from lpl_lightning.conditioning import Conditioner
from lpl_lightning.frozen import weights_hash
from lpl_lightning.noise import DDPM, EDM, NoiseProcess
from lpl_lightning.pretrained import read_notes

__all__ = [
    "MEANING",
    "autoencoder_fingerprint",
    "check_batch",
    "check_encoded",
    "check_match",
    "check_meaning",
    "check_noise",
    "check_precision",
    "check_prediction",
    "check_range",
    "meaning_of",
    "rounded_fingerprints",
    "warn_of_meaning",
]

MEANING = "lpl_lightning"
"""Where a checkpoint says what its weights mean."""


def meaning_of(noise: NoiseProcess, autoencoder: Autoencoder) -> dict[str, Any]:
    """What a denoiser's weights mean: what it predicts, of which noise, and how its latents are scaled."""
    scaled: dict[str, Any] = {}
    if isinstance(noise, DDPM):
        scaled["noise_schedule"] = noise.schedule
    if isinstance(noise, EDM):
        scaled["sigma_data"] = noise.sigma_data
    return {
        "prediction_type": noise.prediction_type,
        **scaled,
        "latent_shift": [round(value, 6) for value in autoencoder.shift.flatten().tolist()],
        "latent_scale": [round(value, 6) for value in autoencoder.scale.flatten().tolist()],
    }


def check_meaning(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights mean something else than a model's.

    Args:
        own: The model's meaning, by ``meaning_of``.
        checkpoint: What an older release wrote may lack the whole or some of it.

    Raises:
        ValueError: They mean something else.
    """
    if differing := _unlike(own, checkpoint.get(MEANING, {})):
        raise ValueError(
            f"The checkpoint's model was trained for something else: {differing}. "
            "Give the noise process and the autoencoder that it was trained with."
        )


def warn_of_meaning(own: Mapping[str, Any], source: str) -> None:
    """Warn of weights to start from that mean something else than a model's, which training may change on purpose.

    Args:
        own: The model's meaning, by ``meaning_of``.
        source: Where the weights are from, as for ``read_state``; a .safetensors file does not say what they mean.
    """
    if differing := _unlike(own, read_notes(source).get(MEANING, {})):
        rank_zero_warn(
            f"The weights of {source} were trained for something else: {differing}. Without training they need the "
            "noise process and the autoencoder that they were trained with."
        )


def _unlike(own: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    other = {key: found[key] for key in own if found.get(key, own[key]) != own[key]}
    return "; ".join(
        f"{key} {_apart(value, own[key])} there, {_apart(own[key], value)} here" for key, value in other.items()
    )


def _apart(one: Any, other: Any) -> Any:
    """A value or, of one with several by name, those that are not the other's."""
    if not isinstance(one, dict):
        return one
    return ", ".join(f"{key} {value}" for key, value in one.items() if value != other.get(key))


def autoencoder_fingerprint(autoencoder: Autoencoder, dtype: torch.dtype | None = None) -> str:
    """A hash of what latents depend on: class, weights, scale and shift.

    Args:
        autoencoder: The autoencoder.
        dtype: What its weights are rounded to before; None takes them as they are, in the precision it was given.
    """
    numbers = [f"{x:.6g}" for part in (autoencoder.scale, autoencoder.shift) for x in part.flatten().tolist()]
    said = f"{type(autoencoder.model).__name__} {weights_hash(autoencoder.model, dtype)} {numbers}"
    return blake2b(said.encode(), digest_size=16).hexdigest()


def rounded_fingerprints(autoencoder: Autoencoder) -> list[str]:
    """Fingerprints of an autoencoder's copies in lower precision; the same weights in 16 bits have one of them."""
    coarse = (torch.bfloat16, torch.float16) if autoencoder.dtype.itemsize > 2 else ()
    return [autoencoder_fingerprint(autoencoder, dtype) for dtype in coarse]


def check_encoded(data: Any, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Refuse latents and embeddings that others than a model's parts have made.

    The same autoencoder in another precision is no other: a decoder in bfloat16 takes latents encoded in float32.

    Args:
        data: The data module; one with ``encoded_by`` says what made its latents, and by ``encoded_by_rounded`` what
            lower precisions make of that.
        autoencoder: The model's.
        conditioner: The model's.

    Raises:
        ValueError: They are of another autoencoder, or of other text encoders.
    """
    by: Mapping[str, str | None] = getattr(data, "encoded_by", {})
    own: dict[str, Callable[[], str]] = {"autoencoder": lambda: autoencoder_fingerprint(autoencoder)}
    if isinstance(conditioner, Captions):
        own["text"] = conditioner.embedding_key
    for part, found in by.items():
        if found is not None and part in own and (used := own[part]()) != found:
            if part == "autoencoder" and (
                used in getattr(data, "encoded_by_rounded", ()) or found in rounded_fingerprints(autoencoder)
            ):
                continue
            what = {"autoencoder": "another autoencoder", "text": "other text encoders"}[part]
            raise ValueError(
                f"`data`: what {data.root} holds was made by {what} than the model's: weights, their precision, scale "
                f"or settings differ ({found} there, {used} here). Give the model what made it, by the same `dtype`, "
                "or encode anew by `lpl encode`."
            )


def check_precision(parameters: Iterable[nn.Parameter], precision: str) -> None:
    """Refuse to train weights in 16 bits by accident.

    Args:
        parameters: The model's.
        precision: The trainer's.

    Raises:
        ValueError: Some that are trained have 16 bits, and the trainer was not told to.
    """
    coarse = {str(p.dtype) for p in parameters if p.requires_grad and p.dtype.itemsize < 4}
    if coarse and precision not in ("bf16-true", "16-true"):
        raise ValueError(
            f"Weights in {', '.join(sorted(coarse))} are to be trained, in which small steps are lost. Set `dtype` of "
            f"the denoiser to float32, with bf16-mixed as the trainer's `precision` (now {precision}), or train LoRA."
        )


def check_batch(batch: Any) -> None:
    """Refuse a batch that holds no images.

    Raises:
        ValueError: It is no dictionary with ``image`` or ``latent``, or its images are not floating numbers.
    """
    wanted = "a dictionary with `image` (B, 3, H, W) in [-1, 1]"
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch must be {wanted}, got a {type(batch).__name__}: let items of the data be so.")
    found = batch.get("image", batch.get("latent"))
    if not isinstance(found, Tensor):
        raise ValueError(f"A batch must be {wanted}, got one with {sorted(map(str, batch))}.")
    if not found.is_floating_point():
        raise ValueError(f"A batch must be {wanted}, got images of {found.dtype}: divide them by 127.5 and subtract 1.")


def check_range(batch: Mapping[str, Any]) -> None:
    """Refuse images that are far from [-1, 1], and warn of those in [0, 1]. It waits for an accelerator.

    Args:
        batch: Whose ``image`` (B, 3, H, W) is looked at, if it has any.

    Raises:
        ValueError: A value is below -2 or above 2.
    """
    images = batch.get("image")
    if images is None or not images.numel():
        return
    least, most = torch.stack(images.detach().aminmax()).tolist()
    if least < -2 or most > 2:
        raise ValueError(
            f"`image` of a batch must lie in [-1, 1], got values from {least:.4g} to {most:.4g}: divide pixels of 0 to "
            "255 by 127.5 and subtract 1."
        )
    if 0 <= least < most <= 1:
        rank_zero_warn(
            f"`image` of the first batch lies in [{least:.4g}, {most:.4g}]. Images are to lie in [-1, 1]: if yours "
            "are in [0, 1], multiply them by 2 and subtract 1."
        )


def check_prediction(denoiser: nn.Module, prediction: Any, z_t: Tensor) -> None:
    """Refuse a prediction that would be broadcast, or is no tensor.

    Args:
        denoiser: What predicted.
        prediction: What it gave.
        z_t: The noisy latents.

    Raises:
        ValueError: It is no tensor of the latents' shape.
    """
    _check_shape(f"{type(denoiser).__name__}.forward", prediction, z_t.shape)


def check_noise(noise: NoiseProcess) -> None:
    """Refuse a noise process that does not do what it is for, on a few random latents.

    Args:
        noise: The process.

    Raises:
        ValueError: What a method gives is of another shape, or its target does not lead back to the clean latent.
    """
    name = type(noise).__name__
    if not isinstance(getattr(noise, "prediction_type", None), str):
        raise ValueError(f"{name}.prediction_type must be a string that says what is predicted, such as 'velocity'.")
    drawn = torch.Generator().manual_seed(0)
    z0, epsilon = (torch.randn(4, 2, 3, 3, generator=drawn) for _ in range(2))
    t = noise.times(torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64))
    _check_shape(f"{name}.times", t, (4,))
    for scale in noise.alpha_sigma(t.float()):
        _check_shape(f"{name}.alpha_sigma", scale, (4,))
    _check_shape(f"{name}.time_at", noise.time_at(torch.tensor([0.1, 1.0, 3.0])), (3,))
    noisy = noise.noised(z0, epsilon, t.float())
    target = noise.target(noisy)
    _check_shape(f"{name}.target", target, z0.shape)
    _check_shape(f"{name}.weight", noise.weight(noisy), (4,))
    estimate = noise.estimate_z0(target, noisy)
    _check_shape(f"{name}.estimate_z0", estimate, z0.shape)
    # Rounding is as large as the noise is to the signal.
    ratio = noisy.noise_to_signal.cpu()
    off = (estimate - z0).flatten(1).abs().amax(dim=1)
    if not (off <= 1e-3 * (1 + ratio))[ratio < 100].all():
        raise ValueError(
            f"{name}.estimate_z0 must give the clean latent back where the prediction is {name}.target: it is off by "
            f"{off.tolist()} at ratios sigma / alpha of {ratio.tolist()}."
        )


def _check_shape(what: str, found: Any, wanted: Sequence[int]) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != tuple(wanted):
        got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"{what} must give a tensor of shape {tuple(wanted)}, got {got}.")


def check_match(decoder: Autoencoder, encoder: object) -> None:
    """Refuse an autoencoder of other latents than the module's."""
    if not isinstance(encoder, Autoencoder) or encoder is decoder:
        return
    for name in ("latent_channels", "downscale"):
        try:
            own, other = getattr(decoder, name), getattr(encoder, name)
        except ValueError:  # one of them does not say
            continue
        if own != other:
            raise ValueError(
                f"`autoencoder` must be made for the latents of the module's: its {name} is {own}, expected {other}. "
                "For a cheaper decoder give the tiny autoencoder that was distilled from the module's own."
            )
