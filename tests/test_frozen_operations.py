from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpl_lightning.folded_convolution import FoldedWeights
from lpl_lightning.frozen_operations import FrozenOperations


def frozen(module: nn.Module) -> nn.Module:
    return module.double().requires_grad_(False)


def held(function: Any, x: Tensor) -> int:
    """Bytes that the graph of a function holds, each once."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(storages.values())


def compare(module: nn.Module, x: Tensor, folded: FoldedWeights | None) -> None:
    """Value and gradient as without the mode."""
    x = x.requires_grad_()
    plain = module(x)
    with FrozenOperations(folded):
        cheap = module(x)
    cotangent = torch.randn_like(plain)
    (expected,), (found,) = (torch.autograd.grad(y, x, cotangent) for y in (plain, cheap))
    torch.testing.assert_close(cheap, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


CONVOLUTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 1}),
    (2, {"kernel_size": (3, 5), "padding": (0, 2), "bias": False}),
    (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (2, {"kernel_size": 2, "stride": 3}),
    (2, {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2}),
    (2, {"kernel_size": 3, "padding": "same"}),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (3, {"kernel_size": 3, "padding": 1}),
    (3, {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}),
]


@pytest.mark.parametrize(("axes", "settings"), CONVOLUTIONS, ids=str)
def test_a_frozen_convolution_is_the_convolution(axes: int, settings: dict[str, Any]) -> None:
    module = frozen((nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 6, **settings))
    compare(module, torch.randn(2, 4, *(7, 8, 6)[:axes], dtype=torch.float64), None)


def test_a_frozen_convolution_keeps_no_input() -> None:
    module = frozen(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)))
    weights = sum(p.numel() for n, p in module.named_parameters() if "weight" in n) * 8
    x = torch.randn(16, 4, 20, 20, dtype=torch.float64, requires_grad=True)

    def cheap(x: Tensor) -> None:
        with FrozenOperations():
            module(x)

    assert held(cheap, x) == weights
    assert held(module, x) > 10 * weights


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 5), (3, 3, 6, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_an_enlarged_map_is_folded_exactly(shape: tuple[int, ...], bias: bool, format: Any) -> None:
    folded = FoldedWeights()
    module = frozen(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1, bias=bias)))
    module = module.to(memory_format=format)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=format)
    compare(module, x, folded)
    assert len(folded._made) == 1
    with FrozenOperations(folded), torch.no_grad():
        assert module(x).is_contiguous(memory_format=format) or min(shape[2:]) == 1
    assert len(folded._made) == 1


class Enlarged(nn.Module):
    """An enlargement, and what comes after it."""

    def __init__(self, convolution: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.convolution, self.settings = convolution, {"scale_factor": 2} | settings
        self.between = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.convolution(self.between(F.interpolate(x, **self.settings)))
        return result


@pytest.mark.parametrize(
    "module",
    [
        Enlarged(nn.Conv2d(4, 4, 3, padding=1), mode="bilinear"),
        Enlarged(nn.Conv2d(4, 4, 3, padding=1), scale_factor=3),
        Enlarged(nn.Conv2d(4, 4, 3, padding=1), scale_factor=(1, 2)),
        Enlarged(nn.Conv2d(4, 4, 5, padding=2)),
        Enlarged(nn.Conv2d(4, 4, 3)),
        Enlarged(nn.Conv2d(4, 4, 3, padding=1, stride=2)),
        Enlarged(nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        Enlarged(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        Enlarged(nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))),
        Enlarged(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))),
        Enlarged(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))),
    ],
    ids=lambda m: f"{m.settings} {m.convolution}",
)
def test_only_what_can_be_folded_is(module: nn.Module) -> None:
    folded = FoldedWeights()
    compare(frozen(module), torch.randn(2, 4, 4, 6, dtype=torch.float64), folded)
    assert not folded._made


def test_a_size_given_for_a_factor_is_folded_too() -> None:
    folded = FoldedWeights()
    module = frozen(Enlarged(nn.Conv2d(4, 4, 3, padding=1), scale_factor=None, size=(8, 12)))
    compare(module, torch.randn(2, 4, 4, 6, dtype=torch.float64), folded)
    assert len(folded._made) == 1


def test_half_precision_is_not_folded_and_trained_weights_take_their_gradient() -> None:
    folded = FoldedWeights()
    module = Enlarged(nn.Conv2d(4, 4, 3, padding=1)).bfloat16().requires_grad_(False)
    with FrozenOperations(folded):
        module(torch.randn(1, 4, 4, 4, dtype=torch.bfloat16))
    assert not folded._made
    trained = Enlarged(nn.Conv2d(4, 4, 3, padding=1))
    with FrozenOperations(folded):
        trained(torch.randn(1, 4, 4, 4)).sum().backward()
    assert not folded._made
    assert trained.convolution.weight.grad is not None


def test_gradients_can_be_differentiated_again() -> None:
    module = frozen(
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3))
    )
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def cheap(x: Tensor) -> Tensor:
        with FrozenOperations(folded):
            result: Tensor = module(x)
            return result

    folded = FoldedWeights()
    assert torch.autograd.gradcheck(cheap, (x,))
    assert torch.autograd.gradgradcheck(cheap, (x,))


def test_folded_weights_follow_the_weights() -> None:
    """Written to or moved, they are folded anew at the next check."""
    folded = FoldedWeights()
    module = frozen(Enlarged(nn.Conv2d(2, 2, 3, padding=1)))
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    compare(module, x, folded)
    assert not folded.check()
    with torch.no_grad():
        module.convolution.weight.mul_(3)  # type: ignore[operator, union-attr]
    assert folded.check()
    compare(module, x, folded)
    module.convolution.weight.data = torch.randn(2, 2, 3, 3, dtype=torch.float64)  # type: ignore[union-attr]
    assert folded.check()
    compare(module, x, folded)
