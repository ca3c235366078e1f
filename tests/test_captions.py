from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from lpl_lightning.captions import Captions
from lpl_lightning.conditioning import Condition, ConditionShape
from lpl_lightning.text_encoders import SideBySide, TextEmbedding, TextEncoder, TransformersText

SDXL, SD3 = "random:embedded:tiny/sdxl", "random:embedded:tiny/sd3"
CAPTIONS = ["a red circle on a blue ground", "two cats, sitting", "a red circle on a blue ground", ""]
NO_PART = {"vae": None, "scheduler": None}


class Letters(TextEncoder):
    """Embeds letters one by one, and notes what it was asked for."""

    def __init__(self, width: int | None = 6, pooled: int | None = 4, length: int = 5, masked: bool = False) -> None:
        super().__init__()
        self.token_dim, self.pooled_dim, self.length, self.masked = width, pooled, length, masked
        self.settings = {"width": width, "pooled": pooled, "length": length, "masked": masked}
        self.table = nn.Embedding(256, (width or 0) + (pooled or 0)).requires_grad_(False)
        self.asked: list[list[str]] = []

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        self.asked.append(list(captions))
        rows = [list(text.encode()[: self.length]) for text in captions]
        ids = torch.tensor([row + [0] * (self.length - len(row)) for row in rows], device=self.device)
        mask = (ids > 0) | (torch.arange(self.length, device=self.device) == 0)  # as if a mark of the start
        tokens, pooled = self.table(ids).split([self.token_dim or 0, self.pooled_dim or 0], dim=-1)
        return TextEmbedding(
            tokens if self.token_dim else None,
            mask if self.masked else None,
            pooled.mean(1) if pooled.numel() else None,
        )


def equal(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def same(a: Any, b: Any) -> None:
    """Embeddings or conditions are equal to the bit."""
    for name in ("tokens", "mask", "pooled"):
        if getattr(a, name) is None:
            assert getattr(b, name) is None
        else:
            equal(getattr(a, name), getattr(b, name))


def encoded(captions: list[str], *encoders: TextEncoder, **settings: Any) -> Condition:
    condition: Condition = Captions(list(encoders), **settings)({"caption": captions}, len(captions))
    return condition


def pipeline_parts(*encoders: TransformersText) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for number, encoder in enumerate(encoders, 1):
        suffix = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
    return parts


def test_embeddings_are_those_of_stable_diffusion() -> None:
    clip = TransformersText(SDXL, "text_encoder")
    options: dict[str, Any] = {"unet": None, "safety_checker": None, "feature_extractor": None}
    pipeline = StableDiffusionPipeline(**pipeline_parts(clip), **NO_PART, **options, requires_safety_checker=False)
    tokens, null = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=True)
    found = encoded(CAPTIONS, clip)
    torch.testing.assert_close(found.tokens, tokens)
    assert found.pooled is None
    dropped = Captions([clip])({"caption": CAPTIONS}, 4, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(dropped.tokens, null)


@pytest.mark.parametrize("zero", [True, False])
def test_embeddings_are_those_of_sdxl(zero: bool) -> None:
    first = TransformersText(SDXL, "text_encoder", layer=-2)
    second = TransformersText(SDXL, "text_encoder_2", layer=-2, pooled=True)
    parts = pipeline_parts(first, second)
    pipeline = StableDiffusionXLPipeline(
        **parts, **NO_PART, unet=None, force_zeros_for_empty_prompt=zero, add_watermarker=False
    )
    tokens, null_tokens, pooled, null_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu")
    captions = Captions([SideBySide([first, second])], null_is_zero=zero, size_conditions=True)
    assert captions.gives == ConditionShape(token_dim=80, pooled_dim=48, time_ids=True)
    batch = {"caption": CAPTIONS, "image": torch.zeros(4, 3, 64, 96)}
    found = captions(batch, 4)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)
    assert found.mask is None
    dropped = captions(batch, 4, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(dropped.tokens, null_tokens)
    torch.testing.assert_close(dropped.pooled, null_pooled)
    assert bool((dropped.tokens == 0).all()) == zero
    # The pipeline's own ids, for which it asks its backbone nothing but two numbers.
    pipeline.unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=8),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=6 * 8 + 48)),
    )
    ids = pipeline._get_add_time_ids((640, 480), (3, 5), (64, 96), torch.float32, text_encoder_projection_dim=48)
    batch |= {"original_size": torch.tensor([[640, 480]] * 4), "crop_top_left": torch.tensor([[3, 5]] * 4)}
    equal(captions(batch, 4).time_ids, ids.expand(4, 6))


def test_embeddings_are_those_of_sd3() -> None:
    first, second = (TransformersText(SD3, name, layer=-2, pooled=True) for name in ("text_encoder", "text_encoder_2"))
    third = TransformersText(SD3, "text_encoder_3", max_length=24)
    pipeline = StableDiffusion3Pipeline(**pipeline_parts(first, second, third), **NO_PART, transformer=None)
    tokens, null_tokens, pooled, null_pooled = pipeline.encode_prompt(
        CAPTIONS, None, None, device="cpu", max_sequence_length=24
    )
    captions = Captions([SideBySide([first, second]), third])
    assert captions.gives == ConditionShape(token_dim=96, pooled_dim=80)
    found = captions({"caption": CAPTIONS}, 4)
    assert found.tokens.shape == (4, 77 + 24, 96)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)
    dropped = captions({}, 4, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(dropped.tokens, null_tokens)
    torch.testing.assert_close(dropped.pooled, null_pooled)


def test_embeddings_are_those_of_flux() -> None:
    clip = TransformersText(SDXL, "text_encoder", tokens=False, pooled=True)
    t5 = TransformersText(SD3, "text_encoder_3", max_length=16)
    pipeline = FluxPipeline(**pipeline_parts(clip, t5), **NO_PART, transformer=None)
    tokens, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=16)
    found = encoded(CAPTIONS, clip, t5)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)


def test_embeddings_and_masks_are_those_of_pixart() -> None:
    t5 = TransformersText(SD3, "text_encoder_3", max_length=20, use_mask=True)
    pipeline = PixArtSigmaPipeline(**pipeline_parts(t5), **NO_PART, transformer=None)
    tokens, mask, null, null_mask = pipeline.encode_prompt(CAPTIONS, device="cpu", max_sequence_length=20)
    captions = Captions([t5])
    found = captions({"caption": CAPTIONS}, 4)
    torch.testing.assert_close(found.tokens, tokens)
    equal(found.mask, mask.bool())
    dropped = captions({"caption": CAPTIONS}, 4, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(dropped.tokens, null.expand(4, -1, -1))
    equal(dropped.mask, null_mask.bool().expand(4, -1))


def test_parts_are_padded_and_joined_in_order() -> None:
    first, second, third = Letters(6, 4, 5), Letters(3, None, 2, masked=True), Letters(None, 2)
    captions = Captions([first, second, third], token_dim=8)
    assert captions.gives == ConditionShape(token_dim=8, pooled_dim=6)
    found = captions({"caption": ["ab", "c"]}, 2)
    assert found.tokens.shape == (2, 7, 8)
    equal(found.tokens[:, :5, :6], first(["ab", "c"]).tokens)
    equal(found.tokens[:, 5:, :3], second(["ab", "c"]).tokens)
    assert found.tokens[:, :5, 6:].abs().max() == 0
    assert found.tokens[:, 5:, 3:].abs().max() == 0
    assert found.mask.tolist() == [[True] * 7, [True] * 6 + [False]]
    equal(found.pooled, torch.cat([first(["ab", "c"]).pooled, third(["ab", "c"]).pooled], dim=1))
    assert encoded(["ab"], first, Letters(3, None)).mask is None
    alone = Captions([third])
    assert alone.gives == ConditionShape(pooled_dim=2)
    assert alone({"caption": ["x"]}, 1).tokens is None


@pytest.mark.parametrize("zero", [False, True])
def test_dropped_samples_get_the_null_condition_and_others_keep_theirs(zero: bool) -> None:
    encoder = Letters(masked=True)
    captions = Captions([encoder], null_is_zero=zero)
    drop = torch.tensor([True, False, True, False])
    texts = ["abc", "de", "f", "ghijk"]
    null = captions({}, 1, torch.tensor([True]))
    expected = encoder([""])
    equal(null.mask, expected.mask)
    equal(null.tokens, torch.zeros_like(expected.tokens) if zero else expected.tokens)
    equal(null.pooled, torch.zeros_like(expected.pooled) if zero else expected.pooled)
    text = captions.encode(texts)
    for batch in ({"caption": texts}, {"text": vars(text)}, {"text": text}):
        found = captions(batch, 4, drop)
        for name in ("tokens", "mask", "pooled"):
            for row, dropped in enumerate(drop.tolist()):
                own = getattr(found, name)[row]
                equal(own, getattr(null, name)[0] if dropped else getattr(text, name)[row])
        same(captions(batch, 4, torch.zeros(4, dtype=torch.bool)), text)
        same(captions(batch, 4), text)
    without_mask = captions({"text": {"tokens": text.tokens, "pooled": text.pooled}}, 4, drop)
    assert without_mask.mask.sum(1).tolist() == [1, 5, 1, 5]


def test_dropout_is_drawn_at_its_rate() -> None:
    captions = Captions([Letters()], dropout=0.2)
    drop = captions.dropped(torch.rand(20_000))
    assert drop is not None
    assert drop.float().mean().item() == pytest.approx(0.2, abs=0.01)
    found = captions({"caption": ["abc"] * 20_000}, 20_000, drop)
    null = captions({}, 1, torch.tensor([True]))
    assert (found.tokens == null.tokens).all(dim=2).all(dim=1).float().mean().item() == pytest.approx(0.2, abs=0.01)


def test_nothing_is_encoded_needlessly() -> None:
    encoder = Letters()
    captions = Captions([encoder])
    captions({"caption": ["ab", "c", "ab", "ab"]}, 4)
    assert encoder.asked == [["ab", "c"]]
    everything = torch.ones(4, dtype=torch.bool)
    for _ in range(3):
        captions({"caption": ["ab", "c", "d", "e"]}, 4, everything)
    assert encoder.asked[1:] == [[""]], "the null condition, once"
    captions({"caption": ["ab", "c", "d", "e"]}, 4, torch.tensor([True, False, True, False]))
    assert encoder.asked[2:] == [["c", "e"]]
    captions({"text": captions.encode(["x"])}, 1)
    assert encoder.asked[3:] == [["x"]]


def test_one_of_several_captions_is_drawn_in_training() -> None:
    encoder = Letters()
    captions = Captions([encoder], dropout=0.0)
    batch = {"caption": [["a", "b", "c"], ["d"], "e"]}
    for _ in range(300):
        captions.train()(batch, 3)
    drawn = Counter(text for asked in encoder.asked for text in asked)
    assert set(drawn) == set("abcde")
    assert drawn["d"] == drawn["e"] == 300
    assert all(60 < drawn[text] < 140 for text in "abc")
    encoder.asked.clear()
    for _ in range(5):
        captions.eval()(batch, 3)
    assert encoder.asked == [["a", "d", "e"]] * 5
    encoder.asked.clear()
    captions.train()
    for draw, wanted in ((0.1, "a"), (0.5, "b"), (0.99, "c")):
        captions({**batch, "caption_draw": torch.tensor([draw, 0.9, 0.9])}, 3)
        assert encoder.asked.pop() == [wanted, "d", "e"]


def test_nothing_of_it_is_saved_or_trained() -> None:
    clip = TransformersText(SDXL, "text_encoder_2", pooled=True)
    captions = Captions([clip, TransformersText(SD3, "text_encoder_3", max_length=9)])
    before = captions({"caption": CAPTIONS}, 4, torch.tensor([True, False, False, False]))
    assert captions.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in captions.parameters())
    module = nn.ModuleDict({"conditioner": captions, "denoiser": nn.Linear(2, 2)})
    assert set(module.state_dict()) == {"denoiser.weight", "denoiser.bias"}
    module.load_state_dict(module.state_dict(), strict=True)
    module.train()
    drop = torch.tensor([True, False, False, False])
    same(captions({"caption": CAPTIONS}, 4, drop), before)
    same(copy.deepcopy(captions)({"caption": CAPTIONS}, 4, drop), before)


def test_the_null_condition_of_a_validation_serves_training() -> None:
    captions = Captions([Letters()])
    with torch.inference_mode():
        captions({}, 2, torch.ones(2, dtype=torch.bool))
    found = captions({}, 2, torch.ones(2, dtype=torch.bool))
    weight = torch.ones(6, requires_grad=True)
    (found.tokens * weight).sum().backward()
    torch.testing.assert_close(weight.grad, found.tokens.sum(dim=(0, 1)))


def test_the_null_condition_follows_the_encoders() -> None:
    captions = Captions([Letters()])
    captions({}, 1, torch.tensor([True]))
    captions.to("meta")
    assert captions.device.type == "meta"
    found = captions({}, 2, torch.ones(2, dtype=torch.bool))
    assert found.tokens.device.type == found.pooled.device.type == "meta"
    given = captions({"text": {"tokens": torch.zeros(2, 5, 6), "pooled": torch.zeros(2, 4)}}, 2)
    assert given.tokens.device.type == "meta"


@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_is_read_instead_of_encoding(masked: bool, tmp_path: Path) -> None:
    encoder, folder = Letters(masked=masked), tmp_path / "cache"
    first = Captions([encoder], cache_dir=str(folder)).encode(["ab", "c", "ab"])
    assert encoder.asked == [["ab", "c"]]
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert {path.suffix for path in files} == {".safetensors"}
    again = Captions([encoder], cache_dir=str(folder))
    same(again.encode(["ab", "c", "ab"]), first)
    same(again({"caption": ["c", "ab", "ab"]}, 3), Captions([encoder]).encode(["c", "ab", "ab"]))
    assert encoder.asked[1:] == [["c", "ab"]], "only that without a cache"
    found = again.encode(["new", "c"])
    assert encoder.asked[2:] == [["new"]]
    torch.testing.assert_close(found.tokens, Captions([encoder]).encode(["new", "c"]).tokens)


def test_a_torn_file_is_made_again(tmp_path: Path) -> None:
    encoder = Letters(masked=True)
    captions = Captions([encoder], cache_dir=str(tmp_path))
    first = captions.encode(["ab", "c"])
    for keep in (0, 20, 150):
        torn = sorted(tmp_path.iterdir())[0]
        whole = torn.read_bytes()
        torn.write_bytes(whole[:keep])
        encoder.asked.clear()
        same(captions.encode(["ab", "c"]), first)
        assert len(encoder.asked) == 1
        assert len(encoder.asked[0]) == 1
        assert torn.read_bytes() == whole
        same(captions.encode(["ab", "c"]), first)
        assert len(encoder.asked) == 1


def test_a_cache_keeps_encoders_and_settings_apart(tmp_path: Path) -> None:
    one, other = Letters(), Letters()
    for captions in (
        Captions([one], cache_dir=str(tmp_path)),
        Captions([other], cache_dir=str(tmp_path)),
        Captions([one, other], cache_dir=str(tmp_path)),
        Captions([other, one], cache_dir=str(tmp_path)),
        Captions([one], token_dim=9, cache_dir=str(tmp_path)),
    ):
        free = Captions([*captions.encoders], token_dim=captions.token_dim)
        for _ in range(2):
            same(captions.encode(["ab"]), free.encode(["ab"]))
    assert len(list(tmp_path.iterdir())) == 5


def test_the_cache_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = Captions([Letters()], cache_dir=str(tmp_path))
    seen: list[list[str]] = []

    def refuse(source: Path, target: Path) -> None:
        seen.append([path.name for path in tmp_path.iterdir()])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(OSError, match="no space left"):
            captions.encode(["ab"])
    assert len(seen) == 1
    assert not seen[0][0].endswith(".safetensors"), "written beside its place first"
    assert list(tmp_path.iterdir()) == []
    captions.encode(["ab"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_sizes_come_from_the_batch() -> None:
    captions = Captions([Letters()], size_conditions=True)
    batch: dict[str, Any] = {"caption": ["a", "b"], "image": torch.zeros(2, 3, 32, 48)}
    found = captions(batch, 2, torch.tensor([True, False])).time_ids
    assert found.dtype == torch.float32
    assert found.tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    batch |= {"original_size": torch.tensor([[640, 480], [100, 200]]), "crop_top_left": torch.tensor([[1, 2], [3, 4]])}
    expected = [[640, 480, 1, 2, 32, 48], [100, 200, 3, 4, 32, 48]]
    assert captions(batch, 2).time_ids.tolist() == expected
    assert captions(batch, 2, torch.ones(2, dtype=torch.bool)).time_ids.tolist() == expected, "never dropped"
    assert captions(batch | {"target_size": torch.tensor([8, 9])}, 2).time_ids[:, 4:].tolist() == [[8, 9]] * 2
    targets = torch.tensor([[8, 9], [10, 11]])
    assert captions(batch | {"target_size": targets}, 2).time_ids[:, 4:].tolist() == targets.tolist()
    del batch["image"]
    with pytest.raises(ValueError, match=r"neither 'target_size' nor 'image' \(it has \['caption', 'crop_top_left', "):
        captions(batch, 2)
    captions.check(SimpleNamespace(has_captions=True, image_size=16))
    assert captions(batch, 2).time_ids[:, 4:].tolist() == [[16, 16]] * 2
    assert Captions([Letters()])({"caption": ["a"]}, 1).time_ids is None


def test_what_does_not_fit_is_refused() -> None:
    captions = Captions([Letters()])

    class NoCaptions:
        has_captions = False

    with pytest.raises(ValueError, match="needs data with captions, but NoCaptions has none: use a data module"):
        captions.check(NoCaptions())
    captions.check(None)
    captions.check(SimpleNamespace(has_captions=True))
    with pytest.raises(ValueError, match=r"neither 'caption' nor 'text' \(it has \['image', 'label'\]\)"):
        captions({"label": 1, "image": 2}, 1)
    with pytest.raises(ValueError, match="list of its 2 samples' captions, got a string"):
        captions({"caption": "ab"}, 2)
    with pytest.raises(ValueError, match="list of its 2 samples' captions, got 3"):
        captions({"caption": ["a", "b", "c"]}, 2)
    with pytest.raises(ValueError, match="a caption or more a sample, got none"):
        captions({"caption": [[], ["a"]]}, 2)
    with pytest.raises(ValueError, match="`captions` must be a list of one string or more, got 'ab'"):
        captions.encode("ab")
    with pytest.raises(ValueError, match=r"`captions` must be a list .* got \[1\]"):
        captions({"caption": [[1]]}, 1)
    good = {"tokens": torch.zeros(2, 5, 6), "pooled": torch.zeros(2, 4)}
    captions({"text": good}, 2)
    with pytest.raises(
        ValueError, match="`tokens` in `text` of the batch must be 2 embeddings of width 6, .* got shape"
    ):
        captions({"text": good | {"tokens": torch.zeros(2, 5, 7)}}, 2)
    with pytest.raises(ValueError, match=r"`pooled` in `text` .* of width 4, .* got shape None"):
        captions({"text": {"tokens": good["tokens"]}}, 2)
    with pytest.raises(ValueError, match="must be 3 embeddings"):
        captions({"text": good}, 3)
    with pytest.raises(ValueError, match="`pooled` in `text` of the batch must be left out"):
        Captions([Letters(pooled=None)])({"text": good}, 2)
    with pytest.raises(ValueError, match="must be 5 a sample, as many as the encoders give, got 3"):
        captions({"text": good | {"tokens": torch.zeros(2, 3, 6)}}, 2, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="`encoders` must hold one"):
        Captions([])
    with pytest.raises(ValueError, match="`token_dim`=5 must be 6 or more, but the widest"):
        Captions([Letters()], token_dim=5)
    with pytest.raises(ValueError, match="`token_dim`=5 must be 1 or more, but no encoder gives tokens"):
        Captions([Letters(None)], token_dim=5)
    with pytest.raises(ValueError, match="`dropout` must lie in"):
        Captions([Letters()], dropout=2)
