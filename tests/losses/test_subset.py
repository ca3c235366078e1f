from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from torch import Tensor, nn

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.draws import Draws
from lpl_lightning.losses import Subset, inlier_mask
from lpl_lightning.losses.subset import depths_of, draw_crop

NSR = torch.tensor([0.1, 9.0, 0.2, 0.1, 0.15, 9.0, 0.3])


def latents(batch: int = 7, side: int = 4) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(batch, 4, side, side, dtype=torch.float64)
    return (z0 + 0.5 * torch.randn_like(z0)).requires_grad_(), z0


def sample(lpl: LatentPerceptualLoss, z0_hat: Tensor, *rest: Any) -> Tensor:
    """Losses and their gradient at the estimates, flattened."""
    losses = lpl(z0_hat, *rest)
    (gradient,) = torch.autograd.grad(losses.sum(), z0_hat)
    return torch.cat([losses.detach(), gradient.flatten()])


def samples(lpl: LatentPerceptualLoss, z0_hat: Tensor, z0: Tensor) -> Tensor:
    """Ten of them at once, a row each."""
    many = z0_hat.detach().repeat(10, 1, 1, 1).requires_grad_()
    losses, gradient = sample(lpl, many, z0.repeat(10, 1, 1, 1), NSR.repeat(10)).split([len(many), many.numel()])
    return torch.cat([losses.view(10, -1), gradient.view(10, -1)], dim=1)


@pytest.mark.parametrize("keep", [0.3, [1.0, 0.6, 0.6, 0.1], [0.5, 0.2, 0.05, 0.05]], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_each_map_is_drawn_with_its_probability(keep: Any, count: int) -> None:
    probabilities = Subset(keep=keep).probabilities(4)
    draws = torch.stack([depths_of(count, probabilities) for _ in range(4000)])
    for k, q in enumerate(probabilities):
        drawn = (draws > k).double()
        assert (drawn.mean(dim=0) - q).abs().max() < 5 * math.sqrt(0.25 / 4000), "each sample alike"
        # As many as there should be, to one.
        assert set(drawn.sum(dim=1).tolist()) <= {math.floor(count * q), math.ceil(count * q)}


@pytest.mark.parametrize(
    "keep", [0.4, pytest.param([1.0, 0.7, 0.5, 0.5], marks=pytest.mark.slow), [0.6, 0.3, 0.3, 0.2]], ids=str
)
def test_value_and_gradient_are_exact_in_expectation(keep: Any) -> None:
    """The mean over draws lies within five of its standard errors of the exact one, in every component."""
    autoencoder = Autoencoder(tiny_kl().double())
    z0_hat, z0 = latents()
    options: dict[str, Any] = {"reference_side": 0, "execution": {"chunk_size": 4}}
    exact = sample(LatentPerceptualLoss(autoencoder, **options), z0_hat, z0, NSR)
    lpl = LatentPerceptualLoss(autoencoder, **options, subset=Subset(keep=keep))
    draws = torch.cat([samples(lpl, z0_hat, z0) for _ in range(30)])
    errors = (draws.mean(dim=0) - exact).abs()
    spread = draws.std(dim=0) / math.sqrt(len(draws))
    assert (errors <= 5 * spread + 1e-9).all()
    assert draws.std(dim=0).max() > 0.1 * exact.abs().max(), "draws differ"
    # A tighter one on a sum, against a weight that is left out or squared.
    total, mean = exact[:7].sum(), draws[:, :7].sum(dim=1)
    assert abs(mean.mean() - total) < 4 * mean.std() / math.sqrt(len(draws))
    assert mean.std() / math.sqrt(len(draws)) < 0.05 * total


def test_only_what_is_drawn_is_decoded_and_no_deeper() -> None:
    model: Any = tiny_kl()
    seen: dict[str, list[int]] = {"mid": [], "up_0": [], "up_2": []}
    for name, block in (
        ("mid", model.decoder.mid_block),
        ("up_0", model.decoder.up_blocks[0]),
        ("up_2", model.decoder.up_blocks[2]),
    ):
        block.register_forward_hook(lambda _m, inputs, _o, name=name: seen[name].append(len(inputs[0])))
    lpl = LatentPerceptualLoss(
        Autoencoder(model),
        subset=Subset(keep=[1.0, 0.5, 0.25, 0.25]),
        execution={"chunk_size": 8},  # type: ignore[arg-type]
    )
    z0_hat, z0 = (z.float() for z in latents(8))
    losses, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert {name: sum(sizes) // 2 for name, sizes in seen.items()} == {"mid": 8, "up_0": 4, "up_2": 2}
    assert found is not None
    assert found.seen.sum(dim=1).tolist() == [8, 4, 2, 2]
    assert (losses > 0).all()
    assert all(math.isfinite(value) for value in found.scalars().values() if not math.isnan(value))


def test_evaluation_is_exact() -> None:
    autoencoder = Autoencoder(tiny_kl().double())
    z0_hat, z0 = latents()
    lpl = LatentPerceptualLoss(autoencoder, subset=Subset(keep=0.01, crop=2)).eval()
    torch.testing.assert_close(lpl(z0_hat, z0), LatentPerceptualLoss(autoencoder)(z0_hat, z0))


def test_a_draw_of_nothing_is_zero_and_connected() -> None:
    z0_hat, z0 = latents(1)
    lpl = LatentPerceptualLoss(Autoencoder(tiny_kl().double()), subset=Subset(keep=1e-6))
    loss = lpl(z0_hat, z0)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert z0_hat.grad is not None


@pytest.mark.parametrize(("sides", "crop", "halo"), [((12, 8), 4, 1), ((8, 9), 3, 2), ((8,), 2, 0), ((6, 4, 7), 3, 1)])
def test_crops_are_an_exact_partition_in_windows_of_one_size(sides: tuple[int, ...], crop: int, halo: int) -> None:
    found = {repr(c): c for c in (draw_crop(sides, crop, halo) for _ in range(600)) if c is not None}
    covered = torch.zeros(sides)
    for part in found.values():
        window = torch.zeros(sides)
        window[part.window][part.inner] += 1
        covered += window
        assert [s.stop - s.start for s in part.window] == [
            min(side, -(-side // -(-side // crop)) + 2 * halo) for side in sides
        ]
        for axis, (outer, inner) in enumerate(zip(part.window, part.inner, strict=True)):
            assert inner.start >= halo or outer.start == 0
            assert outer.stop - outer.start - inner.stop >= halo or outer.stop == sides[axis]
        assert part.share == pytest.approx(window.mean().item())
        assert len(found) == part.parts
    assert (covered == 1).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("side", "crop"), [(12, 4), (8, 3)])
def test_crops_of_a_local_decoder_are_exact_in_expectation(side: int, crop: int, reduction: Any) -> None:
    """With a halo of the receptive field, and no statistics; without a halo they are not."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(6, 5, 3, padding=1)
    ).double()
    autoencoder = Autoencoder(net, feature_modules=["0", "3"])
    options: dict[str, Any] = {"statistics": "none", "mask_outliers": False, "position_reduction": reduction}
    z0_hat, z0 = latents(3, side)
    exact = sample(LatentPerceptualLoss(autoencoder, **options), z0_hat, z0)

    def mean(halo: int) -> Tensor:
        lpl = LatentPerceptualLoss(autoencoder, **options, subset=Subset(crop=crop, halo=halo))
        parts = math.ceil(side / crop) ** 2
        found: dict[tuple[float, ...], Tensor] = {}
        tried = 0
        while len(found) < parts or tried < 2 * parts:
            tried += 1
            assert tried < 40 * parts
            drawn = sample(lpl, z0_hat, z0)
            found[tuple(drawn[:3].tolist())] = drawn
        assert len(found) == parts
        return torch.stack(list(found.values())).mean(dim=0)

    torch.testing.assert_close(mean(2), exact, rtol=1e-9, atol=1e-12)
    assert (mean(0) - exact).abs().max() > 1e-3 * exact.abs().max()


def test_masks_of_crops_have_the_windows_of_whole_maps() -> None:
    """Latents of twice the reference's side have windows of twice the size, in a crop as in the whole."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    autoencoder = Autoencoder(tiny_kl(**blocks, block_out_channels=(8, 8, 8, 8)).double())
    z0_hat, z0 = latents(1, 16)
    options: dict[str, Any] = {"reference_side": 8, "quantile": 0.15, "widening": 0.0}
    lpl = LatentPerceptualLoss(autoencoder, **options, subset=Subset(crop=8, halo=2))
    _, found = lpl.evaluate(z0_hat, z0, diagnose=True)
    assert found is not None
    windows = [z0_hat.detach()[:, :, a : a + 12, b : b + 12] for a in (0, 4) for b in (0, 4)]
    features = [autoencoder.features(window, ["up_3"])[0] for window in windows]
    # 3 and 5 positions of the finest map, doubled, to the nearest odd number.
    expected = [inlier_mask(f, 0.15, 0.0, 5, 9).mean().item() for f in features]
    assert min(abs(found.inliers[-1].item() - e) for e in expected) < 1e-9
    wrong = [inlier_mask(f, 0.15, 0.0, 3, 7).mean().item() for f in features]
    assert min(abs(e - w) for e, w in zip(expected, wrong, strict=True)) > 1e-3


def test_a_crop_says_how_much_of_the_latent_it_is() -> None:
    assert draw_crop((8, 8), 4, 4) is None
    inner = [draw_crop((10, 10), 4, 0) for _ in range(50)]
    shares = {round(100 * part.share) for part in inner if part is not None}
    assert shares <= {9, 12, 16}, "equal to within one position"
    part = draw_crop((16, 16), 4, 2)
    assert part is not None
    assert part.enlarged == 2.0
    video = draw_crop((5, 8, 8), 4, 0, frames=True)
    assert video is not None
    assert video.window[0] == slice(0, 5)
    assert video.enlarged == 2.0
    # Decoders of video make more frames than latents have.
    assert video.inner_of((17, 32, 32)) == (slice(0, 17), *(slice(0, 32),) * 2)


def test_bad_settings_are_named() -> None:
    autoencoder = Autoencoder(tiny_kl())
    bad: list[tuple[Any, str]] = [
        ({"keep": 0.0}, "`keep` must be a probability above 0 and at most 1, or a list of them, got 0.0"),
        ({"keep": [0.5, 1.5]}, "`keep` must be a probability"),
        ({"keep": []}, "`keep` must be a probability"),
        ({"keep": [0.5, 0.6, 0.5, 0.5]}, r"`keep` must not rise .* got \[0.5, 0.6, 0.5, 0.5\]"),
        ({"keep": [0.5, 0.4]}, "`keep` as a list must have an entry for each compared feature map: expected 4, got 2"),
        ({"crop": 0}, "`crop` must be 1 or more"),
        ({"halo": -1}, "`halo` must be 0 or more"),
        ({"crop": 2.5}, "`crop` must be a whole number of positions, got 2.5"),
        ({"halo": True}, "`halo` must be a whole number of positions, got True"),
        ({"keep": "0.5"}, "`keep` must be a probability"),
        ({"share": 0.5}, r"`subset` must have settings among keep, crop, halo, got \['share'\]"),
    ]
    for value, message in bad:
        with pytest.raises(ValueError, match=message):
            LatentPerceptualLoss(autoencoder, subset=value)


def test_a_decoder_whose_maps_do_not_follow_the_latent_has_no_crops() -> None:
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Conv2d(3, 3, 1)).double()
    lpl = LatentPerceptualLoss(Autoencoder(net, feature_modules=["0", "1"]), subset=Subset(crop=4, halo=0))
    with pytest.raises(ValueError, match="`crop` needs feature maps whose positions follow the latent's"):
        lpl(*latents(1, 8))


def test_samples_with_numbers_of_their_own_have_the_same_maps_in_any_batch() -> None:
    """A batch in two parts, of which other numbers of samples pass the gate, against the whole: values and crop."""
    lpl = LatentPerceptualLoss(Autoencoder(tiny_kl()), threshold=1.0, reference_side=0, mask_outliers=False)
    lpl = lpl.double().train()
    z0_hat, z0 = latents(side=6)
    for crop in (None, 3):
        lpl.subset = Subset(keep=[0.9, 0.5, 0.2, 0.1], crop=crop, halo=0)
        found = []
        for rows in (slice(0, 7), slice(0, 2), slice(2, 7)):
            lpl.draws = Draws.of(4, rows.start, rows.stop - rows.start, batch=3)
            found.append(lpl(z0_hat[rows], z0[rows], NSR[rows]).detach())
        torch.testing.assert_close(torch.cat(found[1:]), found[0])
        assert (found[0] == 0).any()
        assert (found[0] > 0).any()
    u = torch.tensor([0.05, 0.15, 0.4, 0.95])
    assert depths_of(4, [0.9, 0.2, 0.1], u=u).tolist() == [3, 2, 1, 0]
