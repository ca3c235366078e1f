from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import save_tower, tiny_dino

from lpl_lightning.frozen import weights_hash
from lpl_lightning.metrics.classifier_features import TorchvisionFeatures
from lpl_lightning.metrics.features import FeatureExtractor, ModuleFeatures, TorchScriptFeatures
from lpl_lightning.metrics.tower_features import OpenCLIPFeatures, TransformersFeatures


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def script(folder: Path, module: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format
        torch.jit.script(module.eval()).save(folder / "network.pt")
    return str(folder / "network.pt")


MAKERS: dict[str, Callable[[Path], FeatureExtractor]] = {
    "module": lambda folder: ModuleFeatures(network(), size=12),
    "torchscript": lambda folder: TorchScriptFeatures(script(folder, network()), size=12, trusted=True),
    "torchvision": lambda folder: TorchvisionFeatures("random:squeezenet1_1", size=32),
    "open_clip": lambda folder: OpenCLIPFeatures("local-dir:" + str(save_tower(folder / "tower") and folder / "tower")),
    "transformers": lambda folder: TransformersFeatures(tiny_dino(), size=28),
}


@pytest.fixture(params=MAKERS)
def extractor(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureExtractor:
    return MAKERS[request.param](tmp_path)


def test_extractors_are_frozen(extractor: FeatureExtractor) -> None:
    images = torch.rand(4, 3, 20, 24) * 2 - 1
    parent = nn.ModuleDict({"extractor": extractor, "trained": nn.Linear(2, 2)})
    assert set(parent.state_dict()) == {"trained.weight", "trained.bias"}
    before = extractor(images)
    assert before.shape == (4, extractor.dim)
    assert before.dtype == torch.float32
    parent.load_state_dict(parent.state_dict(), strict=True)
    parent.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.requires_grad_(True).parameters())
    assert not extractor(images.requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extractor(images), before, rtol=0, atol=0)
    said = extractor.provenance()
    parent.to(torch.bfloat16)
    torch.testing.assert_close(extractor(images), before, rtol=0, atol=0)
    assert extractor.provenance() == said
    parent.to(torch.float64)  # as with Trainer(precision="64-true")
    torch.testing.assert_close(extractor(images), before, rtol=1e-3, atol=1e-4)
    assert extractor(images).dtype == torch.float32
    assert extractor.provenance() == said, "the weights are the same in another precision"


def test_each_image_is_taken_by_itself(extractor: FeatureExtractor) -> None:
    images = torch.rand(5, 3, 20, 20) * 2 - 1
    whole = extractor(images)
    assert (whole[0] - whole[1]).abs().max() > 1e-6
    single = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)


def test_bad_images_are_refused(extractor: FeatureExtractor) -> None:
    for wrong in (torch.zeros(1, 1, 20, 20), torch.zeros(1, 3, 20, 20) * torch.nan, torch.full((1, 3, 20, 20), 3.0)):
        with pytest.raises(ValueError, match="`images` must be"):
            extractor(wrong)


def test_provenance_says_all(extractor: FeatureExtractor) -> None:
    said = extractor.provenance()
    assert list(said) == [
        *["class", "model", "weights", "features", "input_size", "resize", "antialias", "normalization", "library"]
    ]
    assert said["class"] == type(extractor).__name__
    assert said["features"] == extractor.dim
    assert json.loads(json.dumps(said)) == said
    last = list(extractor.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3
    changed = extractor.provenance()
    assert changed.pop("weights") != said.pop("weights")
    assert changed == said


def test_a_module_is_given_what_it_asks_for() -> None:
    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.input = x
            return x.float().flatten(1)[:, :5]

    images = torch.tensor([-1.0, -0.5, 0.25, 1.0]).repeat(4)[None, None].expand(2, 3, 4, 16)
    eight = ((images + 1) * 127.5).round()
    module = Seen()
    ModuleFeatures(module)(images)
    torch.testing.assert_close(module.input, eight / 127.5 - 1)
    ModuleFeatures(module, pixels="uint8")(images)
    torch.testing.assert_close(module.input, eight.to(torch.uint8))
    found = ModuleFeatures(module, size=4, mean=(0, 0, 0), std=(1 / 255, 0.5, 1))(images)
    torch.testing.assert_close(module.input[0, :, 0, 0] / eight[0, :, 0, 6], torch.tensor([1, 2 / 255, 1 / 255]))
    assert found.shape == (2, 5)


def test_torchscript_is_the_module_that_was_saved(tmp_path: Path) -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, scale: int = 1, return_features: bool = False) -> Tensor:
            return self.network(x.float() / 255) * scale if return_features else x

    module = Optional().eval()
    path = script(tmp_path, module)
    images = torch.rand(3, 3, 9, 9) * 2 - 1
    options: dict[str, Any] = {"return_features": True, "scale": 3}
    found = TorchScriptFeatures(path, pixels="uint8", options=options, trusted=True)
    expected = module(((images + 1) * 127.5).round(), 3, True)
    torch.testing.assert_close(found(images), expected)
    assert found.provenance()["model"] == "network.pt [('return_features', True), ('scale', 3)]"
    with pytest.raises(ValueError, match=r"`path`: network.pt does not take 64 x 64 images.*\(1, D\), got \(1, 3"):
        TorchScriptFeatures(path, trusted=True)
    with pytest.raises(FileNotFoundError, match="`path`='none.pt' does not exist"):
        TorchScriptFeatures("none.pt", trusted=True)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        TorchScriptFeatures(str(tmp_path / "state.pt"), trusted=True)


def test_images_follow_a_network_that_has_buffers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a fixed random projection. The device "meta" stands in for any other than that of the images."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which meta has not

    class Fixed(nn.Module):
        projection: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("projection", torch.randn(48, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.projection

    extractor = ModuleFeatures(Fixed())
    assert extractor.dim == 5
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert extractor(images).device.type == "cpu"
    assert extractor.to("meta")(images).device.type == "meta"


def test_modules_that_give_no_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`module`: Conv2d does not take 64 x 64 .* got \(1, 4, 62, 62\)"):
        ModuleFeatures(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="`module`: Linear does not take 64 x 64 images"):
        ModuleFeatures(nn.Linear(5, 5))


def test_the_hash_is_of_names_shapes_and_values() -> None:
    module = network()
    assert weights_hash(module) == weights_hash(copy.deepcopy(module)) == weights_hash(copy.deepcopy(module).double())
    half = copy.deepcopy(module).half()
    assert weights_hash(half) == weights_hash(copy.deepcopy(half).float()) != weights_hash(module)
    found = {weights_hash(module)}
    for name, tensor in module.state_dict().items():
        changed = copy.deepcopy(module)
        changed.state_dict()[name].view(-1)[-1] += 1
        found.add(weights_hash(changed))
        assert tensor.numel()
    assert len(found) == 1 + len(module.state_dict())
    assert weights_hash(nn.Sequential(nn.Linear(2, 3))) != weights_hash(nn.Linear(2, 3))
