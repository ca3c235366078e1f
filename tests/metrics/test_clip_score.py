from __future__ import annotations

import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import as_pil, photos, save_tower

from lpl_lightning.metrics.clip_score import CLIPScore
from lpl_lightning.text_encoders import OpenCLIPText

open_clip: Any = pytest.importorskip("open_clip")

CAPTIONS = ["a red circle on a blue ground", "two cats, sitting", "", "noise", "A photo of a dog."]


def by_hand(model: Any, images: Tensor, captions: list[str], weight: float = 100) -> float:
    """As the paper states it, with the library's own preprocessing, a pair at a time."""
    transform = import_module("open_clip.transform")
    prepare = transform.image_transform_v2(transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    scores = []
    for image, caption in zip(as_pil(images), captions, strict=True):
        with torch.no_grad():
            a = model.encode_image(prepare(image)[None])[0]
            b = model.encode_text(open_clip.tokenize([caption], 16))[0]
        scores.append(weight * max(float(a @ b / (a.norm() * b.norm())), 0))
    assert min(scores) == 0 < max(scores), "some of the pairs must be clamped, and some not"
    return sum(scores) / len(scores)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 40), (33, 50), (9, 9)])
def test_equal_to_a_computation_by_hand(height: int, width: int, tmp_path: Path) -> None:
    model = save_tower(tmp_path / "tower")
    images = photos(5, height, width)
    images[1] *= -1
    score = CLIPScore(f"local-dir:{tmp_path / 'tower'}")
    score.update(images, CAPTIONS)
    # PIL resizes in 8 bits.
    rounding = 1e-5 if (height, width) == (16, 16) else 0.02
    assert score.compute().item() == pytest.approx(by_hand(model, images, CAPTIONS), rel=rounding)
    assert score.compute().dtype == torch.float64


def test_the_weight_is_that_of_the_paper_if_asked_for(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    values, images = [], photos(5, 16, 16)
    for weight in (100.0, 2.5):
        score = CLIPScore(f"local-dir:{tmp_path / 'tower'}", weight=weight)
        score.update(images, CAPTIONS)
        values.append(score.compute().item())
    assert values[0] == pytest.approx(values[1] * 40)


def test_the_prompt_is_that_of_the_paper_if_asked_for(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    prefix, images = "A photo depicts ", photos(5, 16, 16)
    plain, prompted = (CLIPScore(f"local-dir:{tmp_path / 'tower'}", prefix=text) for text in ("", prefix))
    given = plain.pairs(images, [prefix + caption for caption in CAPTIONS])
    torch.testing.assert_close(prompted.pairs(images, CAPTIONS), given)
    assert not torch.equal(plain.pairs(images, CAPTIONS), given)
    assert prompted.provenance() == plain.provenance() | {"prefix": prefix}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_does_not_matter(batch_size: int, tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    images, name = photos(5, 30, 30), f"local-dir:{tmp_path / 'tower'}"
    whole, parts = CLIPScore(name), CLIPScore(name)
    whole.update(images, CAPTIONS)
    for start in range(0, 5, batch_size):
        parts.update(images[start : start + batch_size], CAPTIONS[start : start + batch_size])
    torch.testing.assert_close(parts.compute(), whole.compute(), rtol=1e-5, atol=1e-6)


def test_long_captions_keep_the_end_of_the_text(tmp_path: Path) -> None:
    model = save_tower(tmp_path / "tower")
    score = CLIPScore(f"local-dir:{tmp_path / 'tower'}")
    long = "cat " * 20
    with pytest.warns(UserWarning, match="CLIPScore takes 16 tokens: 6 of a caption are dropped"):
        ids = score.tokens([long, "cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score.tokens([long])  # said once
    start, cat, end = ids[1, :3].tolist()
    assert ids[0].tolist() == [start, *[cat] * 14, end]
    images = photos(2, 16, 16)
    score.update(images, [long, long])
    with torch.no_grad():
        text = model.encode_text(torch.tensor([[start, *[cat] * 14, end]]))
        image = model.encode_image(score.preparation(images))
    expected = 100 * nn.functional.cosine_similarity(image, text).clamp(min=0).double().mean()
    torch.testing.assert_close(score.compute(), expected, rtol=1e-5, atol=1e-6)


def test_towers_are_frozen_and_say_what_they_are(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    score = CLIPScore(f"local-dir:{tmp_path / 'tower'}")
    images = photos(5, 20, 20)
    score.update(images, CAPTIONS)
    before = score.compute()
    parent = nn.ModuleDict({"score": score})
    assert parent.state_dict() == {}
    parent.train()
    parent.to(torch.bfloat16)
    assert not any(module.training for module in score.towers.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    score.reset()
    with torch.autocast("cpu", torch.bfloat16):
        score.update(images, CAPTIONS)
    torch.testing.assert_close(score.compute(), before, rtol=0, atol=0)
    said = score.provenance()
    assert said["model"] == "local-dir:tower"
    assert (said["input_size"], said["resize"], said["antialias"]) == (16, "bicubic, crop", True)
    assert said["weights"] == CLIPScore(f"local-dir:{tmp_path / 'tower'}").provenance()["weights"]
    assert said["weights"] != CLIPScore(f"random:local-dir:{tmp_path / 'tower'}").provenance()["weights"]
    json.dumps(said)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # torchmetrics' own, before our error
def test_bad_input_is_refused(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    name = f"local-dir:{tmp_path / 'tower'}"
    score = CLIPScore(name)
    with pytest.raises(ValueError, match="there is no pair of image and caption"):
        score.compute()
    with pytest.raises(ValueError, match="`captions` must be one an image, 2, got 1"):
        score.update(photos(2, 16, 16), ["a"])
    with pytest.raises(ValueError, match="`captions` must be a list of strings, got 'ab'"):
        score.update(photos(2, 16, 16), "ab")
    with pytest.raises(ValueError, match="1 of 2 images with values that are not finite"):
        score.update(photos(2, 16, 16).index_fill(0, torch.tensor([1]), torch.nan), ["a", "b"])
    with pytest.raises(ValueError, match="`weight` must be above 0"):
        CLIPScore(name, weight=0)
    with pytest.raises(ValueError, match=r"`model_name`='ViT-B-32', `pretrained`=None: give a tag or file"):
        CLIPScore("ViT-B-32")
    with pytest.raises(ValueError, match="is not a known tag .*Without network: give the weights' file"):
        CLIPScore("ViT-B-32", "laion9b")


def test_a_text_encoder_is_the_same_wherever_its_folder_lies(tmp_path: Path) -> None:
    """What it has encoded is found again, and fits."""
    save_tower(tmp_path / "tower")
    shutil.copytree(tmp_path / "tower", tmp_path / "moved" / "copy")
    one, other = (OpenCLIPText(f"local-dir:{folder}") for folder in (tmp_path / "tower", tmp_path / "moved" / "copy"))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != OpenCLIPText(f"local-dir:{tmp_path / 'tower'}", tokens=False).fingerprint()
