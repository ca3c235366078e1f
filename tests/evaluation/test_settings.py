from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backbones
import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lpl_lightning import ClassTokens, FluxDenoiser, LatentDiffusionModule, LoRA
from lpl_lightning.evaluation import FeatureMetrics, SpectrumMetrics
from lpl_lightning.evaluation.measure import Sets
from lpl_lightning.evaluation.settings import attributes, differing, digest, model_settings, tensors_hash
from lpl_lightning.metrics import ModuleFeatures

MakeModule = Callable[..., LatentDiffusionModule]


def test_what_is_not_in_the_weights_is_told(make_module: MakeModule) -> None:
    module: Any = make_module()
    first = model_settings(module)
    assert model_settings(module) == first
    module.denoiser = FluxDenoiser(backbones.flux(), guidance=3.5)
    weights = module.denoiser.state_dict()
    flux = model_settings(module)
    assert flux["denoiser"]["guidance"] == 3.5
    assert flux["denoiser"]["backbone"]["num_layers"] == 1
    module.denoiser = FluxDenoiser(backbones.flux(), guidance=1.0)
    module.denoiser.load_state_dict(weights)
    assert differing(model_settings(module), flux) == "denoiser"
    module.denoiser.guidance = 3.5
    assert model_settings(module) == flux
    module.denoiser.backbone.proj_out.weight.data += 1
    assert differing(model_settings(module), flux) == "weights_blake2b"


@pytest.mark.parametrize("kind", ["weights", "scale", "shift", "precision"])
def test_the_autoencoder_is_told_by_weights_and_numbers(make_module: MakeModule, kind: str) -> None:
    module: Any = make_module()
    first = model_settings(module)
    if kind == "weights":
        module.autoencoder.model.decoder.conv_out.bias.data += 1e-3
    elif kind == "precision":
        nn.Module.to(module.autoencoder.model, torch.bfloat16)
    else:
        getattr(module.autoencoder, kind).add_(0.1)
    assert differing(first, model_settings(module)) == "autoencoder"


def test_lora_is_told_by_its_scale(make_module: MakeModule) -> None:
    pytest.importorskip("peft")
    found = []
    for alpha in (2, 4):
        torch.manual_seed(0)
        module = make_module(fine_tuning=LoRA(rank=2, alpha=alpha))
        found.append(model_settings(module))
    assert differing(*found) == "lora"


def test_tensors_are_told_by_name_shape_and_kind() -> None:
    whole = torch.arange(6.0)
    ways = [("a", whole), ("b", whole), ("a", whole.view(2, 3)), ("a", whole.view(torch.int32)), ("a", whole + 1)]
    assert len({tensors_hash([way]) for way in ways}) == 5
    assert tensors_hash([("a", whole.view(2, 3).T)]) == tensors_hash([("a", whole.view(2, 3).T.clone())])


def test_tensors_that_are_sharded_are_told_whole(tmp_path: Any) -> None:
    init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        whole = torch.randn(4, 3)
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert tensors_hash([("a", sharded)]) == tensors_hash([("a", whole)])
    finally:
        destroy_process_group()


def test_measures_are_told_by_their_arguments() -> None:
    sets = Sets(16, 20, 20)

    class Means(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    def of(**options: Any) -> str:
        return digest(FeatureMetrics(ModuleFeatures(Means()), "x", **options).settings(sets))

    ways: list[dict[str, Any]] = [{}, {"neighbours": 3}, {"kernel": False}, {"kernel_subset": 5}, {"allow_few": True}]
    assert len({of(**way) for way in ways}) == len(ways)
    assert of() == of()
    assert SpectrumMetrics().settings(sets) != SpectrumMetrics(window=True).settings(sets)
    # And not by what they have found.
    used, fresh = SpectrumMetrics(), SpectrumMetrics()
    used.begin(sets, torch.device("cpu"))
    for role in ("real", "generated"):
        used.update(torch.rand(20, 3, 16, 16), role, torch.arange(20))
        used.put_real_state(used.real_state()) if role == "real" else used.compute()
    assert used.settings(sets) == fresh.settings(sets)


def test_attributes_are_public_and_plain() -> None:
    tokens = attributes(ClassTokens(3, token_dim=8))
    numbers = {"dropout": 0.1, "num_classes": 3, "token_dim": 8, "pooled_dim": None, "pooled": None}
    assert tokens == {"class": "ClassTokens", **numbers}
