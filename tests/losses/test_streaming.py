"""The loss a chunk at a time against the loss of the whole batch by autograd's graph, itself tested against loops."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from families import FAMILIES
from torch import Tensor, nn

from lpl_lightning import Autoencoder, LatentPerceptualLoss
from lpl_lightning.losses import Execution
from lpl_lightning.losses.options import PRESETS
from lpl_lightning.losses.streaming import activation_bytes, chunk_for

PLAIN = Execution(streamed=False, channels_last=False, fold_upsampling=False)
EXECUTIONS: dict[str, Execution] = {
    "auto": Execution(),
    "one_by_one": Execution(chunk_size=1),
    "by_twos": Execution(chunk_size=2),
    "filled_up": Execution(chunk_size=2, static_shapes=True),
    "checkpoint": Execution(chunk_size=3, checkpoint=True),
    "as_it_lies": Execution(chunk_size=3, channels_last=False, fold_upsampling=False),
    "whole": Execution(streamed=False),
    "whole_checkpoint": Execution(streamed=False, checkpoint=True),
}
NSR = torch.tensor([0.1, 9.0, 0.2, 0.1, 0.15, 9.0, 0.3])


def latents(batch: int = 7, dtype: torch.dtype = torch.float64, side: int = 4) -> tuple[Tensor, Tensor]:
    z0 = torch.randn(batch, 4, side, side, dtype=dtype)
    return (z0 + 0.5 * torch.randn_like(z0)).requires_grad_(), z0


def value_and_gradient(lpl: LatentPerceptualLoss, z0_hat: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Of the losses weighted differently, so that samples which are mixed up show."""
    leaf = z0_hat.detach().clone().requires_grad_()
    losses = lpl(leaf, *rest)
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).reshape(losses.shape)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EXECUTIONS)
def test_value_and_gradient_are_those_of_the_plain_way(name: str, preset: Any) -> None:
    autoencoder = Autoencoder(tiny_kl().double())
    z0_hat, z0 = latents()
    options: dict[str, Any] = {"preset": preset, "quantile": 0.1, "widening": 0.5, "reference_side": 0}
    plain = LatentPerceptualLoss(autoencoder, **options, execution=PLAIN)
    other = LatentPerceptualLoss(autoencoder, **options, execution=EXECUTIONS[name])
    for nsr in (None, NSR):
        expected = value_and_gradient(plain, z0_hat, z0, nsr)
        torch.testing.assert_close(value_and_gradient(other, z0_hat, z0, nsr), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_outliers": False},
        {"normalization": "channel_norm", "statistics": "predicted"},
        {"statistics": "separate"},
        {"distance": "huber"},
        {"distance": "l1", "statistics": "target"},
        {"mask_before_normalization": True, "mask_source": "target"},
        {"depth": ["up_1", "image"]},
        {"depth": ["image"], "statistics": "none"},
        {"gate_softness": 4.0, "threshold": 0.2},
        {"reduction": "mean_passed"},
        {"reduction": "mean"},
        {"relative_eps": 0.1, "depth_reduction": "mean", "position_reduction": "sum"},
    ],
    ids=str,
)
def test_every_kind_of_option(options: dict[str, Any]) -> None:
    autoencoder = Autoencoder(tiny_kl().double())
    given = {"quantile": 0.1, "widening": 0.5, "reference_side": 0} | options
    plain = LatentPerceptualLoss(autoencoder, **given, execution=PLAIN)
    streamed = LatentPerceptualLoss(autoencoder, **given, execution=Execution(chunk_size=2))
    z0_hat, z0 = latents()
    expected = value_and_gradient(plain, z0_hat, z0, NSR)
    torch.testing.assert_close(value_and_gradient(streamed, z0_hat, z0, NSR), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_decoders(name: str) -> None:
    autoencoder = Autoencoder(FAMILIES[name].model().double())
    z0 = torch.randn(3, *FAMILIES[name].z[1:], dtype=torch.float64)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    plain = LatentPerceptualLoss(autoencoder, relative_eps=0.1, execution=PLAIN)
    streamed = LatentPerceptualLoss(autoencoder, relative_eps=0.1, execution=Execution(chunk_size=2))
    value, gradient = value_and_gradient(plain, z0_hat, z0)
    found, found_gradient = value_and_gradient(streamed, z0_hat, z0)
    # Some families compute parts of themselves in float32 whatever their weights are in.
    torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    assert (found_gradient - gradient).norm() < 1e-6 * gradient.norm()


def test_volumes_by_hooked_modules() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv3d(4, 3, 3, padding=1))
    autoencoder = Autoencoder(model.double(), feature_modules=["0", "2"])
    z0 = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    expected = value_and_gradient(LatentPerceptualLoss(autoencoder, execution=PLAIN), z0_hat, z0)
    found = value_and_gradient(LatentPerceptualLoss(autoencoder, execution=Execution(chunk_size=2)), z0_hat, z0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for setting in ("compile", "checkpoint"):
        with pytest.raises(
            ValueError, match="`execution`: `compile` and `checkpoint` need a decoder that runs in stages"
        ):
            LatentPerceptualLoss(autoencoder, execution={setting: True})  # type: ignore[arg-type]


def test_float32_agrees_to_rounding() -> None:
    """Without masks, whose thresholds rounding may cross."""
    autoencoder = Autoencoder("embedded:autoencoder_shapes")
    z0 = torch.randn(4, 4, 16, 16)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    plain = LatentPerceptualLoss(autoencoder, mask_outliers=False, execution=PLAIN)
    value, gradient = value_and_gradient(plain, z0_hat, z0)
    found, found_gradient = value_and_gradient(LatentPerceptualLoss(autoencoder, mask_outliers=False), z0_hat, z0)
    torch.testing.assert_close(found, value, rtol=3e-6, atol=0)
    assert (found_gradient - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize(
    ("chunk", "fill", "sizes"),
    [(1, False, [1] * 5), (2, False, [2, 2, 1]), (4, False, [3, 2])]
    + [(4, True, [4, 4]), (9, False, [5]), (9, True, [len(NSR)])],
)
def test_the_decoder_sees_chunks_of_samples_past_the_gate(chunk: int, fill: bool, sizes: list[int]) -> None:
    model: Any = tiny_kl()
    lpl = LatentPerceptualLoss(
        Autoencoder(model), reference_side=0, execution=Execution(chunk_size=chunk, static_shapes=fill)
    )
    seen: list[int] = []
    model.decoder.conv_in.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    lpl(*latents(dtype=torch.float32), NSR)
    assert seen == [size for size in sizes for _ in range(2)]


def test_the_graph_holds_latents_and_nothing_of_the_decoder() -> None:
    z0_hat, z0 = latents(dtype=torch.float32)
    loss = LatentPerceptualLoss(Autoencoder(tiny_kl()), execution=Execution(chunk_size=1))(z0_hat, z0)
    reached, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in reached:
            reached.add(node)
            todo += [next_node for next_node, _ in node.next_functions]
    assert len(reached) < 20
    saved = [tensor for node in reached for tensor in getattr(node, "saved_tensors", ())]
    assert saved
    assert sum(t.numel() * t.element_size() for t in saved) <= 2.5 * z0.numel() * 4


def test_it_cannot_be_differentiated_twice_and_says_so() -> None:
    z0_hat, z0 = latents(2)
    autoencoder = Autoencoder(tiny_kl().double())
    (gradient,) = torch.autograd.grad(LatentPerceptualLoss(autoencoder)(z0_hat, z0).sum(), z0_hat, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again.* execution={'streamed': False}"):
        gradient.square().sum().backward()
    # A flash attention has no second derivative on a CPU.
    autoencoder = Autoencoder(tiny_kl(mid_block_add_attention=False).double())
    whole = LatentPerceptualLoss(autoencoder, execution=Execution(streamed=False), mask_outliers=False)
    (gradient,) = torch.autograd.grad(whole(z0_hat, z0).sum(), z0_hat, create_graph=True)
    gradient.square().sum().backward()
    assert z0_hat.grad is not None
    assert z0_hat.grad.abs().sum() > 0


def test_backward_twice_and_through_what_came_before() -> None:
    """A retained graph, and the chain rule beyond the estimate."""
    z0_hat, z0 = latents(3)
    autoencoder = Autoencoder(tiny_kl().double())
    base = z0_hat.detach().clone().requires_grad_()
    loss = LatentPerceptualLoss(autoencoder)(base.tanh() * 2, z0).mean()
    loss.backward(retain_graph=True)
    assert base.grad is not None
    once = base.grad.clone()
    loss.backward()
    torch.testing.assert_close(base.grad, 2 * once)
    other = base.detach().clone().requires_grad_()
    LatentPerceptualLoss(autoencoder, execution=PLAIN)(other.tanh() * 2, z0).mean().backward()
    torch.testing.assert_close(once, other.grad, rtol=1e-9, atol=1e-12)


def test_under_a_grad_scaler_and_autocast() -> None:
    autoencoder = Autoencoder(tiny_kl())
    net = nn.Conv2d(4, 4, 1)
    z0 = torch.randn(3, 4, 4, 4)
    gradients = []
    for execution in (PLAIN, Execution(chunk_size=1)):
        lpl = LatentPerceptualLoss(autoencoder, mask_outliers=False, execution=execution)
        copied = copy.deepcopy(net)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        with torch.autocast("cpu", torch.float16):
            z0_hat = copied(z0)
            assert z0_hat.dtype == torch.float16
            loss = lpl(z0_hat, z0.half()).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert copied.weight.grad is not None
        gradients.append(copied.weight.grad)
        scaler.step(optimizer)
        assert not torch.equal(copied.weight, net.weight), "the step was not skipped"
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast", "near"),
    [("float16", False, 0.999), ("bfloat16", False, 0.98), ("float32", True, 0.999)],
    ids=["float16", "bfloat16", "float16_by_autocast"],
)
def test_a_decoder_in_half_precision_gives_the_direction_of_one_in_float32(
    dtype: Any, autocast: bool, near: float
) -> None:
    """Gradients at its maps are below what float16 holds, by the number of their positions."""
    torch.manual_seed(0)
    model = tiny_kl(force_upcast=False)
    z0 = torch.randn(2, 4, 16, 16)
    z0_hat = z0 + 0.3 * torch.randn_like(z0)
    options: dict[str, Any] = {"mask_outliers": False, "position_reduction": "mean", "depth_weights": [1e-6] * 4}
    _, expected = value_and_gradient(LatentPerceptualLoss(Autoencoder(copy.deepcopy(model)), **options), z0_hat, z0)
    half = Autoencoder(copy.deepcopy(model).float(), dtype=dtype, autocast=autocast)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        _, found = value_and_gradient(LatentPerceptualLoss(half, **options), z0_hat, z0)
    for one, other in zip(found, expected, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > near
        assert one.norm().item() == pytest.approx(other.norm().item(), rel=0.05)


def test_gradients_survive_float16_behind_a_map_in_float32() -> None:
    """As a normalization on a GPU gives it under autocast: the convolution before it has its gradient in float16."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), Wide())
    autoencoder = Autoencoder(net, feature_modules=["1"], autocast=True)
    lpl = LatentPerceptualLoss(autoencoder, mask_outliers=False, depth_weights=[1e-6])
    z0_hat, z0 = latents(2, torch.float32)
    _, expected = value_and_gradient(lpl, z0_hat, z0)
    with torch.autocast("cpu", torch.float16):
        assert autoencoder.features(z0)[0].dtype == torch.float32
        _, found = value_and_gradient(lpl, z0_hat, z0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one / other.norm(), other / other.norm(), rtol=0.05, atol=1e-3)


def test_a_chunk_too_large_for_memory_is_halved() -> None:
    model: Any = tiny_kl().double()
    seen: list[int] = []

    def limited(_module: object, inputs: Any, _output: object) -> None:
        seen.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("no memory left")

    autoencoder = Autoencoder(model)
    z0_hat, z0 = latents(7)
    expected = value_and_gradient(LatentPerceptualLoss(autoencoder, execution=PLAIN), z0_hat, z0)
    handle = model.decoder.up_blocks[0].register_forward_hook(limited)
    lpl = LatentPerceptualLoss(autoencoder, execution=Execution(chunk_size=7))
    found = value_and_gradient(lpl, z0_hat, z0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert max(seen) == 7
    assert seen[-1] <= 2
    seen.clear()
    torch.testing.assert_close(value_and_gradient(lpl, z0_hat, z0), expected, rtol=1e-9, atol=1e-12)
    assert max(seen) <= 2, "what did not fit once is not tried again"
    handle.remove()
    model.decoder.up_blocks[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        LatentPerceptualLoss(autoencoder, execution=Execution(chunk_size=7))(z0_hat, z0)


def test_activations_of_a_sample_are_measured() -> None:
    """Against a network whose graph is known: one tanh output each, of 8 channels."""
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh()).requires_grad_(False)
    z = torch.randn(5, 4, 8, 8)

    def features(z: Tensor, names: Any) -> list[Tensor]:
        return [net(z)]

    output, hidden, latent = 8 * 64 * 4, 8 * 64 * 4, 4 * 64 * 4
    found = activation_bytes(features, z, ["image"], net)
    # The inputs of both convolutions, both outputs of tanh (one of them such an input), and three maps.
    assert found == latent + hidden + output + 3 * output
    assert chunk_for(2**26, torch.device("cpu")) == 4
    assert chunk_for(2**40, torch.device("cpu")) == 1
    with torch.inference_mode():
        assert activation_bytes(features, torch.randn(5, 4, 8, 8), ["image"], net) == found


def test_weights_that_are_laid_out_anew_are_no_activations() -> None:
    """A decoder's first pass lays them out; what is measured then is what is measured later."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(tiny_kl(block_out_channels=(16, 32, 32)))
    lpl = LatentPerceptualLoss(autoencoder, execution=Execution(channels_last=True, fold_upsampling=False))
    found = [activation_bytes(lpl.features, torch.randn(1, 4, 4, 4), lpl.compared, autoencoder) for _ in range(2)]
    assert found[0] == found[1]


class Cut(nn.Module):
    """A decoder of one's own that lets no gradient through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def decode(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(self.first(z).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("execution", [Execution(), Execution(streamed=False), Execution(chunk_size=1)])
def test_a_decoder_that_cuts_the_gradient_is_refused(execution: Execution) -> None:
    lpl = LatentPerceptualLoss(Autoencoder(Cut(), feature_modules=["first"]), execution=execution)
    z0_hat, z0 = latents(2, torch.float32)
    with torch.no_grad():  # as a weight is calibrated
        if execution == Execution():
            with pytest.raises(ValueError, match="lets no gradient pass"):
                lpl(z0_hat, z0)
        else:
            assert lpl(z0_hat, z0).isfinite().all()
    with pytest.raises(ValueError, match=r"lets no gradient pass from its stage 'first'"):
        lpl(z0_hat, z0)


def test_measuring_activations_holds_nothing_afterwards() -> None:
    """Tensors that are held by what they hold would stay to the end of the process, unseen by Python."""
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh()).requires_grad_(False)
    seen: list[weakref.ref[Tensor]] = []

    def features(z: Tensor, names: Any) -> list[Tensor]:
        found: Tensor = net(z)
        seen.append(weakref.ref(found))
        return [found]

    activation_bytes(features, torch.randn(2, 4, 8, 8), ["image"], net)
    gc.collect()
    assert seen[0]() is None


def test_no_gradient_is_taken_where_none_is_wanted() -> None:
    model: Any = tiny_kl()
    lpl = LatentPerceptualLoss(Autoencoder(model), execution=Execution(chunk_size=2))
    graphs: list[bool] = []
    model.decoder.conv_in.register_forward_hook(lambda _m, _i, output: graphs.append(output.requires_grad))
    z0_hat, z0 = latents(2, torch.float32)
    with torch.no_grad():
        expected = lpl(z0_hat, z0)
    assert graphs == [False, False]
    assert not lpl(z0_hat.detach(), z0).requires_grad
    assert graphs == [False] * 4
    torch.testing.assert_close(lpl(z0_hat, z0).detach(), expected)
    assert graphs[4:] == [False, True]
