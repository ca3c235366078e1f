from __future__ import annotations

import pytest
import torch
from families import VIDEO_FAMILIES, Family, tiny_wan

from lpl_lightning import Autoencoder


@pytest.fixture(params=VIDEO_FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return VIDEO_FAMILIES[request.param]


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_every_number_of_frames_decodes_as_the_model_does(family: Family, frames: int) -> None:
    model = family.model()
    autoencoder = Autoencoder(model)
    z = torch.randn(1, family.z[1], frames, 2, 3)
    decoded = autoencoder.decode(z)
    torch.testing.assert_close(decoded, family.decode(model, z), atol=1e-5, rtol=1e-5)
    upsamplings = sum(model.config.temperal_downsample)
    assert decoded.shape[2] == 1 + (frames - 1) * 2**upsamplings


def test_the_video_is_clamped_as_the_models_is(family: Family) -> None:
    model = family.model()
    decoded = Autoencoder(model).decode(30 * torch.randn(family.z))
    assert decoded.abs().max() == 1


def test_later_frames_do_not_reach_back(family: Family) -> None:
    """Causal, features too: a latent frame changes nothing of the frames before it."""
    autoencoder = Autoencoder(family.model())
    z = torch.randn(family.z)
    changed = z.clone()
    changed[:, :, -1] += 1
    for one, other in zip(autoencoder.features(z), autoencoder.features(changed), strict=True):
        same = 1 + (one.shape[2] - 1) // 2  # those of the first two of three latent frames
        torch.testing.assert_close(one[:, :, :same], other[:, :, :same])
        assert not torch.allclose(one[:, :, same:], other[:, :, same:])


def test_two_videos_share_no_cache(family: Family) -> None:
    autoencoder = Autoencoder(family.model())
    z, other = torch.randn(family.z), torch.randn(family.z)
    first = autoencoder.decode(z)
    autoencoder.decode(other)
    assert torch.equal(autoencoder.decode(z), first)


@pytest.mark.parametrize("shape", [(1, 3, 8, 16, 16), (1, 3, 16, 16), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16)])
def test_videos_that_would_be_cut_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\).*divisible by 8.*one more than a multiple of 4; got"):
        Autoencoder(tiny_wan()).encode(torch.rand(shape))
