"""What parts of one's own are told before time is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import image_batch, tiny_kl
from torch import Tensor, nn

from lpl_lightning import DDPM, EDM, Autoencoder, ClassLabels, Denoiser, FlowMatching, LatentDiffusionModule
from lpl_lightning.agreement import check_batch, check_noise, check_range
from lpl_lightning.conditioning import Condition
from lpl_lightning.noise import NoiseProcess, NoisyLatents

PROCESSES: list[NoiseProcess] = [
    DDPM(),
    DDPM("v_prediction"),
    DDPM("sample", min_snr_gamma=5.0),
    DDPM("epsilon", num_train_timesteps=10, beta_end=0.5),
    FlowMatching(shift=3.0),
    EDM(sigma_data=0.5),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_noise_processes_keep_to_it(process: NoiseProcess) -> None:
    check_noise(process)


class Flow(FlowMatching):
    """One that a method is taken from."""


def scalar(self: Any, noisy: NoisyLatents) -> Tensor:
    return noisy.t.mean()


def column(self: Any, noisy: NoisyLatents) -> Tensor:
    return torch.ones_like(noisy.alpha)


BROKEN: list[tuple[str, Any, str]] = [
    ("times", lambda self, u: (1000 * u).float()[:, None], r"Flow.times must give .* \(4,\), got \(4, 1\)"),
    ("alpha_sigma", lambda self, t: (torch.tensor(1.0), t / 1000), r"Flow.alpha_sigma must give .* \(4,\), got \(\)"),
    ("time_at", lambda self, nsr: nsr.mean(), r"Flow.time_at must give .* \(3,\), got \(\)"),
    ("target", lambda self, noisy: noisy.noise.mean(dim=1), r"Flow.target must give .*, got \(4, 3, 3\)"),
    ("target", lambda self, noisy: noisy.z0 - noisy.noise, "must give the clean latent back where"),
    ("estimate_z0", lambda self, p, noisy: noisy.z_t - noisy.sigma * p * 1.01, "must give the clean latent back"),
    ("estimate_z0", scalar, "takes 2 positional"),
    ("weight", column, r"Flow.weight must give a tensor of shape \(4,\), got \(4, 1, 1, 1\)"),
    ("weight", lambda self, noisy: 1.0, r"Flow.weight must give a tensor of shape \(4,\), got a float"),
    ("prediction_type", None, "Flow.prediction_type must be a string"),
]


@pytest.mark.parametrize(("name", "method", "said"), BROKEN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BROKEN)])
def test_a_noise_process_that_does_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, method: Any, said: str
) -> None:
    monkeypatch.setattr(Flow, name, method, raising=False)
    with pytest.raises((ValueError, TypeError), match=said):
        check_noise(Flow())


class Predicts(Denoiser):
    """Over a network without a config."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__(nn.Conv2d(4, 4, 1))
        self.what = what

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        found: Tensor = self.what(self.backbone(z_t))
        return found


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_network_without_a_config_is_taken(make_module: Callable[..., LatentDiffusionModule]) -> None:
    module = make_module(denoiser=Predicts(lambda z: z), conditioner=ClassLabels(3))
    assert module.training_step(image_batch(), 0).requires_grad
    module.denoiser.check(4, 4, module.conditioner)
    with pytest.raises(ValueError, match="`gradient_checkpointing`: Conv2d has no method"):
        Denoiser.__init__(module.denoiser, nn.Conv2d(4, 4, 1), gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("what", "got"), [(lambda z: z[:, :1], r"\(6, 1, 4, 4\)"), (lambda z: (z,), "a tuple")], ids=["channels", "tuple"]
)
def test_predictions_that_are_none_are_refused(
    make_module: Callable[..., LatentDiffusionModule], what: Callable[[Tensor], Any], got: str
) -> None:
    module = make_module(denoiser=Predicts(what), conditioner=ClassLabels(3))
    with pytest.raises(ValueError, match=rf"Predicts.forward must give a tensor of shape \(6, 4, 4, 4\), got {got}"):
        module.training_step(image_batch(), 0)


def test_batches_that_are_none_are_refused() -> None:
    check_batch(image_batch())
    check_batch({"latent": torch.zeros(2, 4, 4, 4)})
    with pytest.raises(ValueError, match=r"must be a dictionary with `image` .* got a list: let items"):
        check_batch([torch.zeros(2, 3, 8, 8), torch.zeros(2)])
    with pytest.raises(ValueError, match=r"got one with \['label', 'pixels'\]"):
        check_batch({"pixels": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2)})
    with pytest.raises(ValueError, match="got images of torch.uint8: divide them by 127.5"):
        check_batch({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)})


def test_the_range_of_images() -> None:
    images = torch.rand(2, 3, 8, 8)
    check_range({"image": images * 2 - 1})
    check_range({"image": torch.zeros(0, 3, 8, 8)})
    check_range({"image": torch.ones(2, 3, 8, 8)})  # white says nothing
    check_range({"latent": images * 100})
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got values from 0 to 255"):
        check_range({"image": torch.tensor([0.0, 255.0])})
    with pytest.warns(UserWarning, match=r"multiply them by 2 and subtract 1"):
        check_range({"image": images})


def test_encoders_that_do_not_fit_what_is_said_of_them() -> None:
    class Half(nn.Module):
        latent_channels = 4

        def __init__(self, channels: int, stride: int) -> None:
            super().__init__()
            self.latent_channels = 4
            self.encode = nn.Conv2d(3, channels, stride, stride)
            self.decode = nn.Conv2d(4, 3, 1)

    def encoded(channels: int, stride: int) -> Tensor:
        wrapped = Autoencoder(Half(channels, stride), feature_modules=["decode"], downscale=4)
        return wrapped.encode(torch.zeros(2, 3, 8, 16))

    assert encoded(4, 4).shape == (2, 4, 2, 4)
    for channels, stride, got in ((4, 2, r"\(2, 4, 4, 8\)"), (3, 4, r"\(2, 3, 2, 4\)")):
        with pytest.raises(ValueError, match=rf"must give latents \(2, 4, 2, 4\), .* got {got}"):
            encoded(channels, stride)
    assert Autoencoder(tiny_kl()).encode(torch.zeros(2, 3, 8, 16)).shape == (2, 4, 2, 4)
