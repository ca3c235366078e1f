from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lpl_lightning.folded_convolution import FoldedConvolution, FoldedWeights, fold


def test_folded_weights_are_sums() -> None:
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    found = fold(weight).reshape(3, 3)
    assert found.tolist() == [
        [36.0, -(0.0 + 3 + 6), 2.0 + 5 + 8],
        [-(0.0 + 1 + 2), 0.0, -2.0],
        [6.0 + 7 + 8, -6.0, 8.0],
    ]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_code_computes_the_same(bias: bool, channels_last: bool) -> None:
    """Value and gradient, and that the operations hidden from the compiler are what they say they are."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    offset = torch.randn(6, dtype=torch.float64) if bias else None
    plain = F.conv2d(F.interpolate(x, scale_factor=2), weight, offset, padding=1)
    folded = fold(weight)
    run: Any = torch.compile(FoldedConvolution.apply, backend="aot_eager")
    found = run(x, folded, offset, channels_last)
    format = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=format)
    torch.testing.assert_close(found, plain)
    cotangent = torch.randn_like(plain)
    (gradient,), (expected,) = (torch.autograd.grad(y, x, cotangent) for y in (found, plain))
    torch.testing.assert_close(gradient, expected)
    operations: Any = torch.ops.lpl_lightning
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operations.folded_convolution.default, (x.detach(), folded, offset, channels_last), test_utils=tests
    )
    torch.library.opcheck(
        operations.folded_convolution_backward.default, (cotangent, folded, channels_last), test_utils=tests
    )


def test_narrow_and_other_convolutions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl_lightning.folded_convolution.NARROWEST", 128)
    wide = torch.zeros(128, 256, 3, 3)
    assert FoldedWeights.takes(wide)
    for other in (wide[:64], wide[:, :64], wide[..., :1], wide.half()):
        assert not FoldedWeights.takes(other)
