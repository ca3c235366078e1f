from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from towers import as_pil, photos, save_tower, tiny_dino

from lpl_lightning.metrics.tower_features import OpenCLIPFeatures, TransformersFeatures

open_clip: Any = pytest.importorskip("open_clip")
transformers: Any = pytest.importorskip("transformers")


@pytest.mark.parametrize("settings", [{}, {"interpolation": "bilinear", "resize_mode": "squash"}])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 48), (30, 61)])
def test_open_clip_embeds_what_its_own_preprocessing_gives(
    settings: dict[str, str], height: int, width: int, tmp_path: Path
) -> None:
    model = save_tower(tmp_path / "tower", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], **settings)
    transform = import_module("open_clip.transform")
    prepare = transform.image_transform_v2(transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    images = photos(3, height, width)
    prepared = torch.stack([prepare(image) for image in as_pil(images)])
    extractor = OpenCLIPFeatures(f"local-dir:{tmp_path / 'tower'}")
    assert extractor.dim == 24
    torch.testing.assert_close(extractor.preparation(images), prepared, rtol=0, atol=1.01 / 255 / 0.2)
    with torch.no_grad():
        expected = model.encode_image(extractor.preparation(images))
        torch.testing.assert_close(extractor(images), expected, rtol=1e-5, atol=1e-6)
        theirs = model.encode_image(prepared)
    assert (theirs - expected).norm() < 0.03 * expected.norm()
    assert sum(parameter.numel() for parameter in extractor.parameters()) < 49408 * 32, "the text tower is left out"


def test_open_clip_says_what_it_is(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    name = f"local-dir:{tmp_path / 'tower'}"
    said = OpenCLIPFeatures(name, resize="bilinear", antialias=False).provenance()
    assert (said["model"], said["resize"], said["antialias"]) == ("local-dir:tower", "bilinear, crop", False)
    assert said["library"] == f"open_clip {open_clip.__version__}"
    random = OpenCLIPFeatures(f"random:{name}")
    assert random.provenance()["weights"] != said["weights"]
    assert str(tmp_path) not in str(random.provenance())
    with pytest.raises(ValueError, match="give a tag or file of weights as `pretrained` beside a plain name"):
        OpenCLIPFeatures("ViT-B-32")
    with pytest.raises(ValueError, match="and none beside random:"):
        OpenCLIPFeatures(name, "openai")
    with pytest.raises(ValueError, match="`model_name`='ViT-Q', `pretrained`='x': .*not found"):
        OpenCLIPFeatures("ViT-Q", "x")
    save_tower(tmp_path / "wide", resize_mode="longest")
    with pytest.raises(ValueError, match=r"`model_name` must be of a model of square images.*'longest'"):
        OpenCLIPFeatures(f"local-dir:{tmp_path / 'wide'}")


def change(folder: Path, **settings: Any) -> str:
    """Rewrite settings of a tower; returns what loads it with weights drawn anew."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"] |= settings
    file.write_text(json.dumps(config))
    return f"random:local-dir:{folder}"


def test_towers_that_give_tokens_too_will_do(tmp_path: Path) -> None:
    """As CoCa's does."""
    save_tower(tmp_path / "tower")
    extractor = OpenCLIPFeatures(change(tmp_path / "tower", output_tokens=True))
    images = photos(2, 16, 16)
    with torch.no_grad():
        pooled, tokens = extractor.model(extractor.preparation(images))
    assert tokens.ndim == 3
    torch.testing.assert_close(extractor(images), pooled)
    assert extractor.provenance()["model"] == "random:local-dir:tower"


def test_towers_that_lack_something_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    save_tower(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="`model_name`='local-dir:.*Without network: give the weights' file"):
        OpenCLIPFeatures(f"local-dir:{folder}")
    oblong = change(folder, image_size=[16, 24])
    with pytest.raises(ValueError, match=r"`model_name` must be of a model of square images.*\(16, 24\), 'shortest'"):
        OpenCLIPFeatures(oblong)


def test_transformers_gives_what_its_model_gives(tmp_path: Path) -> None:
    model: Any = tiny_dino().eval()
    model.save_pretrained(tmp_path)
    images = photos(3, 28, 28)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(pixel_values=((images + 1) / 2 - mean) / std)
    tokens = expected.last_hidden_state
    for output, value in (("pooled", expected.pooler_output), ("cls", tokens[:, 0]), ("mean", tokens.mean(1))):
        extractor = TransformersFeatures(str(tmp_path), output, size=28)  # type: ignore[arg-type]
        assert extractor.dim == 16
        torch.testing.assert_close(extractor(images), value, rtol=1e-4, atol=1e-5)
        assert extractor.provenance()["model"] == f"Dinov2Model {output}"
        assert extractor.provenance()["library"] == f"transformers {transformers.__version__}"
    own = TransformersFeatures(model, size=28)
    assert own.provenance() == TransformersFeatures(str(tmp_path), size=28).provenance()
    random = TransformersFeatures(f"random:{tmp_path}", size=28)
    assert random.provenance()["weights"] != own.provenance()["weights"]
    assert TransformersFeatures(str(tmp_path), size=42)(images).shape == (3, 16)


def test_the_pooler_is_not_the_first_token() -> None:
    """DINOv2's pooler gives the first token as it is, others change it."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    model = transformers.ViTModel(config).eval()
    images = photos(2, 32, 32)
    extractor = TransformersFeatures(model, "cls", size=32)
    with torch.no_grad():
        found = model(pixel_values=extractor.preparation(images))
    torch.testing.assert_close(extractor(images), found.last_hidden_state[:, 0])
    torch.testing.assert_close(TransformersFeatures(model, size=32)(images), found.pooler_output)


def test_images_are_resized_bicubic_unless_one_says_otherwise() -> None:
    model = tiny_dino()
    plain = TransformersFeatures(model, size=28).preparation
    assert (plain.resize, plain.antialias, plain.fit) == ("bicubic", True, "crop")
    other = TransformersFeatures(model, size=28, resize="bilinear", antialias=False).preparation
    assert (other.resize, other.antialias) == ("bilinear", False)


def test_the_preprocessors_settings_are_taken(tmp_path: Path) -> None:
    tiny_dino().save_pretrained(tmp_path)  # type: ignore[operator]
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 28}, crop_size=28, resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    extractor = TransformersFeatures(str(tmp_path), size=28)
    assert extractor.preparation.resize == "bilinear"
    for height, width in ((28, 28), (60, 45)):
        images = photos(2, height, width)
        theirs = processor([Image.fromarray(_array(image)) for image in images], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(extractor.preparation(images), theirs, rtol=0, atol=1.01 / 255 / 0.1)
    own = TransformersFeatures(str(tmp_path), size=28, resize="bicubic", mean=(0, 0, 0), std=(1, 1, 1)).preparation
    assert (own.resize, own.mean, own.std) == ("bicubic", (0, 0, 0), (1, 1, 1))


def test_a_preprocessor_that_does_not_normalize_is_followed(tmp_path: Path) -> None:
    tiny_dino().save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.BitImageProcessor(do_normalize=False, image_mean=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    found = TransformersFeatures(str(tmp_path), size=28).preparation
    assert (tuple(found.mean), tuple(found.std)) == ((0, 0, 0), (1, 1, 1))


def _array(image: torch.Tensor) -> Any:
    return ((image + 1) * 127.5).round().to(torch.uint8).movedim(0, 2).numpy()


def test_convolutional_models_will_do() -> None:
    model = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    )
    images = photos(2, 32, 32)
    pooled, mean = (TransformersFeatures(model, output, size=32) for output in ("pooled", "mean"))
    assert pooled(images).shape == (2, 12)
    torch.testing.assert_close(pooled(images), mean(images))


def test_transformers_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`model`='\./none' does not exist"):
        TransformersFeatures("./none")
    with pytest.raises(FileNotFoundError, match="cannot be had: expected config.json .*Without network: download"):
        TransformersFeatures(str(tmp_path))
    with pytest.raises(ValueError, match="`output` must be one of pooled, cls, mean, got 'last'"):
        TransformersFeatures(tiny_dino(), "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`model`: Linear pooled does not take 224 x 224 images"):
        TransformersFeatures(nn.Linear(2, 2))
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    with pytest.raises(ValueError, match="it has no pooler: set `output` to 'cls' or 'mean'"):
        TransformersFeatures(transformers.ViTModel(config, add_pooling_layer=False), size=32)
    model = tiny_dino()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="cannot be loaded: .*weights are missing"):
        TransformersFeatures(str(tmp_path), size=28)
