from __future__ import annotations

from traceback import extract_stack
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lpl_lightning import LatentPerceptualLoss, frozen_normalization
from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.execution import Execution
from lpl_lightning.frozen_normalization import group_norm
from lpl_lightning.frozen_operations import FrozenOperations


def block(**settings: Any) -> nn.Module:
    """A normalization with weights that matter, and an activation."""
    norm = nn.GroupNorm(4, 8, **settings)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(norm, nn.SiLU()).requires_grad_(False)


@pytest.mark.parametrize("shape", [(3, 8, 6, 5), (2, 8, 7), (2, 8, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_an_activation_of_a_normalized_map_is_what_it_is(shape: tuple[int, ...], last: bool) -> None:
    module = block().double()
    x = torch.randn(shape, dtype=torch.float64)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    plain = module(x)
    with FrozenOperations():
        found = module(x)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(shape, dtype=torch.float64)
    (gradient,), (expected,) = (torch.autograd.grad(y, x, cotangent) for y in (found, plain))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert gradient.stride() == expected.stride()


def test_what_is_normalized_is_not_held() -> None:
    module, x = block(), torch.randn(2, 8, 4, 4, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> None:
        kept.append(tensor)

    with FrozenOperations(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: x):
        result = module(x)
    maps = {t.data_ptr() for t in kept if t.ndim == 4 and t.data_ptr() != x.data_ptr()}
    assert not maps
    assert result.requires_grad
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: x):
        module(x)
    assert any(t.data_ptr() != x.data_ptr() for t in kept if t.ndim == 4)


class AsOnGPU(TorchDispatchMode):
    """Calls of ours find PyTorch's normalization as it is for GPUs: it takes maps of channels first alone, and checks.

    What PyTorch calls itself fits the device already.
    """

    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        maps = {torch.ops.aten.native_group_norm: 1, torch.ops.aten.native_group_norm_backward: 2}
        callers = {(frame.filename, frame.name) for frame in extract_stack(limit=8)}
        if (count := maps.get(func.overloadpacket)) and (frozen_normalization.__file__, "backward") in callers:
            assert all(x.is_contiguous() for x in args[:count]), "Expected X.is_contiguous(memory_format) to be true"
            self.taken += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("last", ["map", "gradient", "both"])
def test_kernels_of_gpus_are_given_what_they_take(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps behind an attention have their channels last, whatever is asked for."""
    module, plain = block().double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    x, cotangent = plain.clone(), torch.randn_like(plain)
    (expected,) = torch.autograd.grad(module(plain.requires_grad_()), plain, cotangent)
    x = x.contiguous(memory_format=torch.channels_last) if last != "gradient" else x
    cotangent = cotangent.contiguous(memory_format=torch.channels_last) if last != "map" else cotangent
    with FrozenOperations():
        result = module(x.requires_grad_())
    monkeypatch.setattr(frozen_normalization, "_takes_channels_last", lambda device: False)
    with AsOnGPU() as mode:  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(result, x, cotangent)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert mode.taken == 2


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_loss_runs_on_kernels_of_gpus(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on a decoder with attention: in its backward pass every normalization is made anew."""
    autoencoder = Autoencoder(tiny_kl().double())
    loss = LatentPerceptualLoss(autoencoder, execution=Execution(channels_last=channels_last))
    z0, z0_hat = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)

    def gradient() -> Tensor:
        leaf = z0_hat.clone().requires_grad_()
        found: Tensor
        (found,) = torch.autograd.grad(loss(leaf, z0, torch.full((2,), 0.1, dtype=torch.float64)).sum(), leaf)
        return found

    expected = gradient()
    monkeypatch.setattr(frozen_normalization, "_takes_channels_last", lambda device: False)
    with AsOnGPU() as mode:  # type: ignore[no-untyped-call]
        found = gradient()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert mode.taken > 10


class Between(nn.Module):
    """Something between a normalization and an activation."""

    def __init__(self, between: Any, silu: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.between, self.silu = block()[0], between, silu or nn.SiLU()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.silu(self.between(self.norm(x)))
        return result


@pytest.mark.parametrize(
    "module",
    [
        Between(lambda y: y + 1),
        Between(lambda y: y.mul_(2)),
        Between(lambda y: y, nn.SiLU(inplace=True)),
        Between(lambda y: y, nn.GELU()),
        Between(lambda y: y + F.silu(y)),
        Between(lambda y: 0 * F.silu(y, inplace=True) + y),
        Between(nn.GroupNorm(2, 8)),
        block(affine=False),
        nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()),
    ],
    ids=[
        "moved",
        "written_to",
        "in_place",
        "another",
        "used_twice",
        "in_place_and_used",
        "normalized_again",
        "no_weights",
        "trained",
    ],
)
def test_all_else_runs_as_it_is(module: nn.Module) -> None:
    module = module.double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    plain = module(x)
    with FrozenOperations():
        found = module(x)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(plain)
    gradients, expected = (torch.autograd.grad(y, wanted, cotangent) for y in (found, plain))
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_its_gradient_can_be_differentiated_again() -> None:
    module = block().double()

    def cheap(x: Tensor) -> Tensor:
        with FrozenOperations():
            result: Tensor = module(x)
            return result

    x = torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cheap, (x,))
    assert torch.autograd.gradgradcheck(cheap, (x,))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_compiled_code_computes_the_same(dtype: torch.dtype, last: bool) -> None:
    """Value and gradient, and that the operations hidden from the compiler are what they say they are."""
    x = torch.randn(2, 8, 4, 5, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    # Those of half precision's statistics are of another one: not to be hidden.
    weight, bias = torch.randn(2, 8, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    run: Any = torch.compile(group_norm, backend="aot_eager")
    found, plain = run(x, 4, weight, bias, 1e-5), F.group_norm(x, 4, weight, bias, 1e-5)
    torch.testing.assert_close(found, plain)
    cotangent = torch.randn(plain.shape, dtype=dtype)  # in whatever layout
    (gradient,), (expected,) = (torch.autograd.grad(y, x, cotangent) for y in (found, plain))
    torch.testing.assert_close(gradient, expected)
    if dtype == torch.bfloat16:
        return
    operations: Any = torch.ops.lpl_lightning
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operations.group_norm.default, (x.detach(), weight, bias, 4, 1e-5), test_utils=tests)
    _, mean, rstd = operations.group_norm(x.detach(), weight, bias, 4, 1e-5)
    arguments = (cotangent, x.detach(), weight, mean, rstd, 4)
    torch.library.opcheck(operations.group_norm_backward.default, arguments, test_utils=tests)
