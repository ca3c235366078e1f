from __future__ import annotations

import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms._presets import ImageClassification

from lpl_lightning.metrics.classifier_features import InceptionFeatures, TorchvisionFeatures
from lpl_lightning.metrics.frechet import FrechetDistance


def images(count: int = 2, height: int = 50, width: int = 50) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width)) / 127.5 - 1


PENULTIMATE: dict[str, Any] = {
    # As each of torchvision's own `forward` computes it.
    "resnet18": lambda model, x: nn.Sequential(*list(model.children())[:-1])(x).flatten(1),
    "squeezenet1_0": lambda model, x: model.features(x).mean((2, 3)),
    "mobilenet_v3_small": lambda model, x: model.classifier[:-1](model.avgpool(model.features(x)).flatten(1)),
    "shufflenet_v2_x0_5": lambda model, x: nn.Sequential(*list(model.children())[:-1])(x).mean((2, 3)),
}


@pytest.mark.parametrize("name", PENULTIMATE)
def test_features_are_the_penultimate_ones(name: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    batch = images(2, 64, 64)
    # No resizing is done at this size, so that the library's own transform is exact.
    transform = ImageClassification(crop_size=64, resize_size=64)
    with torch.no_grad():
        expected = PENULTIMATE[name](model, transform(((batch + 1) * 127.5).round().to(torch.uint8)))
    found = TorchvisionFeatures(name, str(tmp_path / "weights.safetensors"), size=64)
    torch.testing.assert_close(found(batch), expected, rtol=1e-4, atol=1e-5)
    assert found.dim == expected.shape[1]
    assert found.name == f"{name} penultimate"


def test_another_layer_can_be_asked_for(tmp_path: Path) -> None:
    model = torchvision.models.get_model("resnet18", weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    settings: dict[str, Any] = {"size": 48, "mean": (0, 0, 0), "std": (1, 1, 1)}
    batch = images(2, 48, 48)
    with torch.no_grad():
        maps = nn.Sequential(*list(model.children())[:6])((batch + 1) / 2)
        logits = model((batch + 1) / 2)
    layer2 = TorchvisionFeatures("resnet18", str(tmp_path / "weights.pth"), "layer2", **settings)
    torch.testing.assert_close(layer2(batch), maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
    last = TorchvisionFeatures("resnet18", str(tmp_path / "weights.pth"), "fc", **settings)
    torch.testing.assert_close(last(batch), logits, rtol=1e-4, atol=1e-4)
    assert layer2.provenance()["model"] == "resnet18 layer2"
    with pytest.raises(ValueError, match="`layer`='layer9' is no module of resnet18 layer9, which has conv1, bn1"):
        TorchvisionFeatures("resnet18", str(tmp_path / "weights.pth"), "layer9")


def test_torchvision_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`model_name`='resnet' is no model of torchvision"):
        TorchvisionFeatures("resnet", "x.pth")
    with pytest.raises(ValueError, match="`weights`=None: give a file or .* or else 'random:resnet18'"):
        TorchvisionFeatures("resnet18")
    with pytest.raises(ValueError, match="`model_name`='random:resnet18', `weights`='x'"):
        TorchvisionFeatures("random:resnet18", "x")
    with pytest.raises(FileNotFoundError, match="`weights`='none.pth' is neither a file nor the name of weights"):
        TorchvisionFeatures("resnet18", "none.pth")
    other = torchvision.models.get_model("squeezenet1_1", weights=None)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth are of another model"):
        TorchvisionFeatures("resnet18", str(tmp_path / "other.pth"))
    torch.save(other, tmp_path / "module.pth")  # a pickle that would run code
    with pytest.raises(ValueError, match="`weights`=.*cannot be read as weights"):
        TorchvisionFeatures("squeezenet1_1", str(tmp_path / "module.pth"))
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="must hold a state dict"):
        TorchvisionFeatures("squeezenet1_1", str(tmp_path / "checkpoint.pth"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    monkeypatch.setattr("torch.hub.urlopen", _no_network)
    place = f"{tmp_path}/hub/checkpoints/resnet18-f37072fd.pth"
    with pytest.raises(FileNotFoundError, match=f"resnet18-f37072fd.pth cannot be downloaded .*put it at {place} or"):
        TorchvisionFeatures("resnet18", "IMAGENET1K_V1")


def test_convolutions_have_channels_last_on_a_cpu() -> None:
    """Through the whole network."""
    found = TorchvisionFeatures("random:resnet18", size=64)
    seen: list[Tensor] = []
    for module in found.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    found(images(2, 64, 64))
    assert len(seen) == 40
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)


def _no_network(*args: Any, **kwargs: Any) -> Any:
    raise URLError("no network")


def publish(entry: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **settings: Any) -> Path:
    """Random weights where torch would have downloaded those of a name to."""
    name = next(
        name for name in torchvision.models.list_models() if entry in torchvision.models.get_model_weights(name)
    )
    torch.manual_seed(0)
    state = change(torchvision.models.get_model(name, weights=None, **settings).state_dict())
    place: Path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {name: torch.randn_like(tensor) * 0.05 if tensor.ndim == 4 else tensor for name, tensor in state.items()}, place
    )
    return place


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As of before BatchNorm counted."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As of before names of layers could not hold a dot."""
    names = {name: re.sub(r"(norm|conv)([12])\.(\w+)$", r"\1.\2.\3", name) for name in without_counts(state)}
    return {old: state[name] for name, old in names.items()}


@pytest.mark.parametrize(
    ("name", "entry", "change"),
    [
        ("googlenet", torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1, dict),  # takes input of another range
        ("resnet18", torchvision.models.ResNet18_Weights.IMAGENET1K_V1, without_counts),
        ("densenet121", torchvision.models.DenseNet121_Weights.IMAGENET1K_V1, with_old_names),
    ],
)
def test_named_weights_are_read_and_used_as_torchvision_does(
    name: str, entry: Any, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = publish(entry, change, **({"init_weights": False} if name == "googlenet" else {}))
    model = torchvision.models.get_model(name, weights=entry).eval()
    seen: list[Tensor] = []
    [*(module for module in model.modules() if isinstance(module, nn.Linear))][-1].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    batch = images(2, 224, 224)
    with torch.no_grad():
        model(entry.transforms(resize_size=224)(((batch + 1) * 127.5).round().to(torch.uint8)))
    found = TorchvisionFeatures(name, entry.name)
    torch.testing.assert_close(found(batch), seen[0], rtol=1e-3, atol=1e-5)
    assert found.provenance().get("transform_input") == (True if name == "googlenet" else None)
    if name == "resnet18":  # whose file is as good as its name
        torch.testing.assert_close(TorchvisionFeatures(name, str(place))(batch), seen[0], rtol=1e-3, atol=1e-5)
        return
    said = f"are torchvision's IMAGENET1K_V1, .* put the file at {place}, and give"
    with pytest.raises(ValueError, match=said), warnings.catch_warnings(action="ignore"):
        TorchvisionFeatures(name, str(place))


def test_named_weights_are_read_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.save(torchvision.models.squeezenet1_1(weights=None), publish(entry))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        TorchvisionFeatures("squeezenet1_1", "IMAGENET1K_V1")
    torch.save(torchvision.models.squeezenet1_0(weights=None).state_dict(), publish(entry))
    with pytest.raises(
        ValueError, match="holds weights of another model than squeezenet1_1's IMAGENET1K_V1: delete it"
    ):
        TorchvisionFeatures("squeezenet1_1", "IMAGENET1K_V1")


def test_named_weights_bring_their_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    publish(torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V1)
    found = TorchvisionFeatures("efficientnet_b1", "IMAGENET1K_V1")
    preset = torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V1.transforms()
    said = found.preparation
    assert (said.size, said.resize) == (preset.crop_size[0], preset.interpolation.value) == (240, "bicubic")
    assert (said.mean, said.std) == (tuple(preset.mean), tuple(preset.std))
    own = TorchvisionFeatures("efficientnet_b1", "IMAGENET1K_V1", size=64, resize="bilinear", antialias=False)
    assert (own.preparation.size, own.preparation.resize, own.preparation.antialias) == (64, "bilinear", False)


def fidelity() -> Any:
    return pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity, of the `eval` extra, is not installed"
    )


def test_inception_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[eval\]"'):
        InceptionFeatures()


def test_inception_says_where_to_put_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _no_network)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match=f"{name} cannot be downloaded .*/hub/checkpoints/{name} or give its"):
        InceptionFeatures()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth are of another model"):
        InceptionFeatures(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="`layer` must be one of 64, 192, 768, 2048, logits_unbiased"):
        InceptionFeatures("random:", layer="1024")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layer", [*(pytest.param(layer, marks=pytest.mark.slow) for layer in ("2048", "logits_unbiased")), "192"]
)
def test_inception_is_that_of_torch_fidelity_and_torchmetrics(layer: Any, tmp_path: Path) -> None:
    module = fidelity()
    first = InceptionFeatures("random:", layer=layer)
    torch.save(first.model.state_dict(), tmp_path / "inception.pth")
    path = str(tmp_path / "inception.pth")
    batch = images(2, 70, 90)
    eight = ((batch + 1) * 127.5).round().to(torch.uint8)
    found = InceptionFeatures(path, layer=layer)
    assert found.dim == {"2048": 2048, "logits_unbiased": 1008, "192": 192}[layer]
    theirs = module.FeatureExtractorInceptionV3("inception-v3-compat", [layer], path)
    torch.testing.assert_close(found(batch), theirs(eight)[0], rtol=0, atol=0)
    from torchmetrics.image.fid import NoTrainInceptionV3

    smooth = InceptionFeatures(path, antialias=True, layer=layer)
    metrics = NoTrainInceptionV3("inception-v3-compat", [layer], path, antialias=True)
    torch.testing.assert_close(smooth(batch), metrics(eight), rtol=0, atol=0)
    assert not torch.equal(smooth(batch), found(batch))
    assert found.provenance() | {"resize": "", "antialias": True} == smooth.provenance() | {"resize": ""}
    assert found.provenance()["resize"] == "bilinear of TensorFlow 1, stretch"
    assert found.provenance()["weights"] == first.provenance()["weights"]
    assert nn.ModuleList([found]).state_dict() == {}
    nn.ModuleList([found]).train()
    nn.ModuleList([found]).load_state_dict({}, strict=True)
    torch.testing.assert_close(found(batch), theirs(eight)[0], rtol=0, atol=0)


@pytest.mark.slow
def test_a_real_network_tells_photos_from_worse_ones(shared: Path) -> None:
    """SqueezeNet 1.0 on photos; its weights take pixels less a mean, in place of torchvision's normalization."""
    weights = shared / "weights" / "squeezenet1_0_imagenet" / "squeezenet1_0_fp16.pth"
    archive = shared / "data" / "imagenette128.zip"
    if not weights.is_file() or not archive.is_file():
        pytest.skip("../shared has no squeezenet1_0_imagenet or no imagenette128.zip")
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".webp"))[::139][:96]
        pictures = [Image.open(file.open(name)).convert("RGB").resize((128, 128)) for name in names]
    photos = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).movedim(3, 1) / 127.5 - 1
    extractor = TorchvisionFeatures(
        "squeezenet1_0", str(weights), size=227, mean=(123 / 255, 117 / 255, 104 / 255), std=(1 / 255, 1 / 255, 1 / 255)
    )
    model = torchvision.models.squeezenet1_0(weights=None).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    pixels = nn.functional.interpolate((photos[:4] + 1) * 127.5, (227, 227), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model.features(pixels - torch.tensor([123, 117, 104]).view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(extractor(photos[:4]), expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    blurred = nn.functional.interpolate(photos, scale_factor=0.25, mode="area")
    blurred = nn.functional.interpolate(blurred, (128, 128), mode="bilinear")
    half, other = extractor(photos[::2]), extractor(photos[1::2])
    distances = []
    for generated in (other, extractor(blurred[1::2]), extractor(torch.rand_like(photos[1::2]) * 2 - 1)):
        distance = FrechetDistance(512, allow_few=True)
        distance.update(half, real=True)
        distance.update(generated, real=False)
        distances.append(distance.compute().item())
    assert distances[0] * 1.3 < distances[1] < distances[2] / 1.3
