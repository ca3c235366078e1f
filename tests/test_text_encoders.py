from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    T5EncoderModel,
)

import lpl_lightning
from lpl_lightning.text_encoders import OpenCLIPText, SideBySide, TextEmbedding, TextEncoder, TransformersText

TINY = Path(lpl_lightning.__file__).parent / "weights" / "tiny"
SDXL, SD3 = "random:embedded:tiny/sdxl", "random:embedded:tiny/sd3"
CAPTIONS = ["a red circle on a blue ground", "two cats, sitting", ""]


def clip(**overrides: Any) -> TransformersText:
    """SDXL's second tower, small."""
    settings: dict[str, Any] = {"subfolder": "text_encoder_2"} | overrides
    return TransformersText(SDXL, **settings)


def t5(**overrides: Any) -> TransformersText:
    settings: dict[str, Any] = {"subfolder": "text_encoder_3", "max_length": 12} | overrides
    return TransformersText(SD3, **settings)


def same(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "subfolder", "family", "token_dim", "pooled_dim"),
    [
        (SDXL, "text_encoder", CLIPTextModel, 32, 32),
        (SDXL, "text_encoder_2", CLIPTextModelWithProjection, 48, 48),
        (SD3, "text_encoder", CLIPTextModelWithProjection, 32, 32),
        (SD3, "text_encoder_2", CLIPTextModelWithProjection, 48, 48),
        (SD3, "text_encoder_3", T5EncoderModel, 96, None),
    ],
)
def test_stand_ins_are_of_the_real_classes(
    source: str, subfolder: str, family: type, token_dim: int, pooled_dim: int | None
) -> None:
    encoder = TransformersText(source, subfolder, pooled=pooled_dim is not None)
    assert type(encoder.model) is family
    assert (encoder.token_dim, encoder.pooled_dim) == (token_dim, pooled_dim)
    found: TextEmbedding = encoder(CAPTIONS)
    assert found.tokens is not None
    assert found.tokens.shape == (3, encoder.max_length, token_dim)
    assert found.mask is None
    assert (found.pooled is None) == (pooled_dim is None)
    if found.pooled is not None:
        assert found.pooled.shape == (3, pooled_dim)
    config = json.loads((TINY / source.split("/")[1] / subfolder / "config.json").read_text())
    assert config["vocab_size"] == len(encoder.tokenizer)
    assert config["eos_token_id"] == encoder.tokenizer.eos_token_id
    assert max(encoder.tokenizer("Ünïcode ☃ 'n more: 100%?").input_ids) < config["vocab_size"]


def test_stand_ins_are_small_and_without_weights() -> None:
    files = [path for name in ("sdxl", "sd3") for path in (TINY / name).glob("t*/*")]
    assert {path.suffix for path in files} == {".json", ".txt"}
    assert sum(path.stat().st_size for path in files) < 150_000


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_layers_are_what_hooks_see(layer: int) -> None:
    encoder = clip(layer=layer, pooled=True)
    seen: list[Tensor] = []
    inner: Any = encoder.model
    inner = inner.text_model
    if layer == -1:
        hook = inner.final_layer_norm.register_forward_hook(lambda m, args, output: seen.append(output))
    else:
        blocks = inner.encoder.layers
        hook = blocks[layer + 1].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    found = encoder(CAPTIONS)
    hook.remove()
    same(found.tokens, seen[0])


def test_the_vector_is_the_projection_at_the_end_of_the_text() -> None:
    encoder = clip(pooled=True)
    found = encoder(CAPTIONS)
    ids = AutoTokenizer.from_pretrained(TINY / "sdxl" / "tokenizer_2")(CAPTIONS).input_ids
    model: Any = encoder.model
    for row, own in enumerate(ids):
        torch.testing.assert_close(found.pooled[row], model.text_projection(found.tokens[row, len(own) - 1]))
    plain = TransformersText(SDXL, "text_encoder", pooled=True)(CAPTIONS)
    same(plain.pooled, torch.stack([plain.tokens[row, len(own) - 1] for row, own in enumerate(ids)]))


def test_only_what_is_asked_for_is_given() -> None:
    alone = clip(tokens=False, pooled=True)
    assert (alone.token_dim, alone.pooled_dim) == (None, 48)
    assert alone(CAPTIONS).tokens is None
    assert alone(CAPTIONS).pooled.shape == (3, 48)
    assert clip()(CAPTIONS).pooled is None
    assert clip().pooled_dim is None


def test_the_mask_hides_padding() -> None:
    encoder = t5(use_mask=True)
    found = encoder(CAPTIONS)
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(TINY / "sd3" / "tokenizer_3")(CAPTIONS).input_ids]
    assert found.mask.dtype == torch.bool
    assert found.mask.sum(1).tolist() == lengths
    assert found.mask[:, 0].all()
    longer = TransformersText(encoder.model, None, str(TINY / "sd3" / "tokenizer_3"), max_length=20, use_mask=True)
    torch.testing.assert_close(longer(CAPTIONS).tokens[:, :12][found.mask], found.tokens[found.mask])
    without = TransformersText(encoder.model, None, str(TINY / "sd3" / "tokenizer_3"), max_length=12)(CAPTIONS)
    assert without.mask is None
    assert not torch.allclose(without.tokens[found.mask], found.tokens[found.mask], atol=1e-3)
    assert t5(use_mask=True, max_length=5)(["x"]).mask.tolist() == [[True, True, False, False, False]]


def test_another_class_that_gives_hidden_states_will_do(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=900,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model: Any = Gemma2Model(config)
    model.eval()
    model.save_pretrained(tmp_path)
    encoder = TransformersText(str(tmp_path), None, str(TINY / "sdxl" / "tokenizer"), max_length=9, use_mask=True)
    found = encoder(CAPTIONS[:2])
    rows = CLIPTokenizer.from_pretrained(TINY / "sdxl" / "tokenizer")(CAPTIONS[:2]).input_ids
    for row, ids in enumerate(rows):
        alone = model(torch.tensor([ids[:9]])).last_hidden_state[0]
        torch.testing.assert_close(found.tokens[row, : len(ids)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("source", "subfolder"), [("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3")])
def test_a_saved_folder_gives_what_the_module_gave(source: str, subfolder: str, tmp_path: Path) -> None:
    first = TransformersText(f"random:embedded:tiny/{source}", subfolder, max_length=20)
    first.model.save_pretrained(tmp_path / subfolder)  # type: ignore[operator]
    tokenizer = subfolder.replace("text_encoder", "tokenizer")
    shutil.copytree(TINY / source / tokenizer, tmp_path / tokenizer)
    loaded = TransformersText(str(tmp_path), subfolder, max_length=20)
    same(loaded(CAPTIONS).tokens, first(CAPTIONS).tokens)
    assert loaded.fingerprint() == first.fingerprint()
    shutil.copytree(TINY / source / tokenizer, tmp_path / subfolder, dirs_exist_ok=True)
    beside = TransformersText(str(tmp_path / subfolder), max_length=20)
    same(beside(CAPTIONS).tokens, first(CAPTIONS).tokens)
    module = TransformersText(first.model, tokenizer=str(tmp_path), tokenizer_subfolder=tokenizer, max_length=20)
    same(module(CAPTIONS).tokens, first(CAPTIONS).tokens)
    again = TransformersText(f"random:{tmp_path}", subfolder, max_length=20)
    assert not torch.equal(again(CAPTIONS).tokens, first(CAPTIONS).tokens)
    half = TransformersText(str(tmp_path), subfolder, max_length=20, dtype="bfloat16")
    assert half(CAPTIONS).tokens.dtype == torch.bfloat16
    torch.testing.assert_close(half(CAPTIONS).tokens.float(), first(CAPTIONS).tokens, atol=0.1, rtol=0.1)


def test_published_weights_of_older_releases_load(tmp_path: Path) -> None:
    first = TransformersText(SDXL, "text_encoder")
    model: Any = first.model
    model.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(TINY / "sdxl" / "tokenizer", tmp_path / "tokenizer")
    # As transformers 4 wrote them.
    old = {f"text_model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, tmp_path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    same(TransformersText(str(tmp_path), "text_encoder")(CAPTIONS).tokens, first(CAPTIONS).tokens)


def every_encoder() -> list[TextEncoder]:
    return [clip(pooled=True), t5(use_mask=True), SideBySide([clip(), clip(pooled=True)])]


@pytest.mark.parametrize("index", range(3))
def test_encoders_are_frozen(index: int) -> None:
    encoder = every_encoder()[index]
    parent = nn.ModuleDict({"encoder": encoder, "trained": nn.Linear(2, 2)})
    assert set(parent.state_dict()) == {"trained.weight", "trained.bias"}
    before = encoder(CAPTIONS)
    parent.load_state_dict(parent.state_dict(), strict=True)
    same(encoder(CAPTIONS).tokens, before.tokens)
    parent.train()
    assert parent.training
    assert not any(module.training for module in encoder.modules())
    same(encoder(CAPTIONS).tokens, before.tokens)  # T5 has dropout
    encoder.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for again in (parent.train, parent.cpu):
        parent.requires_grad_(True)  # reaches the parameters without asking the encoder
        again()
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert parent["trained"].weight.requires_grad
    with torch.enable_grad():
        assert not encoder(CAPTIONS).tokens.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        same(encoder(CAPTIONS).tokens, before.tokens)
    parent.to(torch.float16)
    same(encoder(CAPTIONS).tokens, before.tokens)


def test_fingerprints_tell_encoders_apart(tmp_path: Path) -> None:
    one = clip()
    tokenizer = str(TINY / "sdxl" / "tokenizer_2")
    alike = [clip.fingerprint() for clip in (one, TransformersText(one.model, None, tokenizer))]
    assert alike[0] == alike[1] == one.fingerprint()
    one(CAPTIONS)
    assert one.fingerprint() == alike[0]
    others: list[TextEncoder] = [
        clip(),
        TransformersText(one.model, None, tokenizer, layer=-2),
        TransformersText(one.model, None, tokenizer, pooled=True),
        TransformersText(one.model, None, tokenizer, use_mask=True),
        TransformersText(one.model, None, tokenizer, max_length=40),
        SideBySide([one]),
        SideBySide([one, one]),
        t5(),
    ]
    with torch.no_grad():
        copied = TransformersText(CLIPTextModelWithProjection(one.model.config), None, tokenizer)
        copied.model.load_state_dict(one.model.state_dict())
        assert copied.fingerprint() == alike[0]
        next(copied.model.parameters()).view(-1)[0] += 1
        late = TransformersText(CLIPTextModelWithProjection(one.model.config), None, tokenizer)
        late.model.load_state_dict(one.model.state_dict())
        next(late.model.parameters()).view(-1)[-1] += 1
        vocabulary = shutil.copytree(tokenizer, tmp_path / "tokenizer")
        settings = json.loads((vocabulary / "tokenizer_config.json").read_text())
        (vocabulary / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|startoftext|>"}))
        (vocabulary / "special_tokens_map.json").unlink(missing_ok=True)
        padded = TransformersText(one.model, None, str(vocabulary))
        assert padded.tokenizer.pad_token != one.tokenizer.pad_token
    prints = [encoder.fingerprint() for encoder in (one, copied, late, padded, *others)]
    assert len(set(prints)) == len(prints)


def test_long_captions_are_cut_with_one_warning() -> None:
    encoder = t5(max_length=6)
    long = "a red circle on a blue ground"  # 7 tokens and the end
    tokens = AutoTokenizer.from_pretrained(TINY / "sd3" / "tokenizer_3")
    assert len(tokens(long).input_ids) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a red circle on a"])  # fits just so
    with pytest.warns(UserWarning, match="takes 6 tokens: 2 of a caption are dropped"):
        found = encoder(["a", long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = encoder([long])
    model: Any = encoder.model
    ids = torch.tensor([[*tokens(long).input_ids[:5], tokens.eos_token_id]])
    torch.testing.assert_close(again.tokens, model(ids).last_hidden_state)
    torch.testing.assert_close(found.tokens[1:], again.tokens)


def test_side_by_side_joins_channels() -> None:
    first, second = TransformersText(SDXL, "text_encoder", layer=-2), clip(layer=-2, pooled=True)
    both = SideBySide([first, second])
    assert (both.token_dim, both.pooled_dim) == (80, 48)
    found = both(CAPTIONS)
    same(found.tokens[..., :32], first(CAPTIONS).tokens)
    same(found.tokens[..., 32:], second(CAPTIONS).tokens)
    same(found.pooled, second(CAPTIONS).pooled)
    assert found.mask is None
    masked = SideBySide([clip(use_mask=True), clip(use_mask=True, tokens=False, pooled=True), clip(use_mask=True)])
    same(masked(CAPTIONS).mask, clip(use_mask=True)(CAPTIONS).mask)
    assert SideBySide([clip(use_mask=True), clip()])(CAPTIONS).mask is None
    with pytest.raises(ValueError, match=r"equally many tokens, got \[77, 12\]"):
        SideBySide([clip(), t5()])(CAPTIONS)
    with pytest.raises(ValueError, match="`encoders` must hold one"):
        SideBySide([])


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`model`='.*', `subfolder`='text_encoder_3' is not there.*config.json"
    ):
        TransformersText(str(TINY / "sdxl"), "text_encoder_3")
    with pytest.raises(FileNotFoundError, match=r"safetensors weights \(no .bin\) as save_pretrained.*Download"):
        TransformersText("embedded:tiny/sdxl", "text_encoder")
    with pytest.raises(FileNotFoundError, match="config.json"):
        TransformersText(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`model`='./none' does not exist"):
        TransformersText("./none")
    shutil.copytree(TINY / "sdxl" / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in '.*/tokenizer' or '.*/text_encoder': .*Give `token"):
        TransformersText(f"random:{tmp_path}", "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(TINY / "sdxl" / "tokenizer" / "tokenizer_config.json", tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        TransformersText(f"random:{tmp_path}", "text_encoder")
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="transformers said"):
        TransformersText(f"random:{tmp_path}", "text_encoder")
    with pytest.raises(FileNotFoundError, match="`tokenizer`='./none' does not exist"):
        TransformersText(SDXL, "text_encoder", tokenizer="./none")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(TINY / "sdxl", tmp_path, dirs_exist_ok=True)
    model: Any = TransformersText(SDXL, "text_encoder").model
    torch.save(model.state_dict(), tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no file named model.safetensors"):
        TransformersText(str(tmp_path), "text_encoder")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY / "sdxl", tmp_path, dirs_exist_ok=True)
    model: Any = TransformersText(SDXL, "text_encoder").model
    model.save_pretrained(tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("layers.1.layer_norm1.weight"))
    save_file({n: t for n, t in state.items() if n != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of its CLIPTextModel are not in .*layers.1.layer_norm1.weight"):
        TransformersText(str(tmp_path), "text_encoder")
    save_file(state | {name: torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are of another model than its config says"):
        TransformersText(str(tmp_path), "text_encoder")


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`pooled` must be false for T5EncoderModel"):
        t5(pooled=True)
    with pytest.raises(ValueError, match="both false"):
        clip(tokens=False)
    with pytest.raises(ValueError, match="`layer` must be -1"):
        clip(layer=2)
    with pytest.raises(ValueError, match="`layer`=-5 must be -4 to -1: CLIPTextModelWithProjection has 3 layers"):
        clip(layer=-5)
    with pytest.raises(ValueError, match="`dtype` must be one of float32, .* got 'half'"):
        clip(dtype="half")
    with pytest.raises(ValueError, match=r"`max_length` must be set to 2 .. 77 for .*, got 78"):
        clip(max_length=78)
    with pytest.raises(ValueError, match=r"2 .. 77 for .*, got 1"):  # its tokenizer does not cut off its own two
        clip(max_length=1)
    with pytest.raises(ValueError, match="got 0"):
        t5(max_length=0)
    with pytest.raises(ValueError, match="`tokenizer` must say where"):
        TransformersText(clip().model)
    with pytest.raises(ValueError, match="of another model: it knows 722 tokens, T5EncoderModel 201"):
        t5(tokenizer=str(TINY / "sdxl" / "tokenizer"))
    for captions in ("a cat", [], [1]):
        with pytest.raises(ValueError, match="`captions` must be a list of one string or more"):
            clip()(captions)
    shutil.copytree(TINY / "sd3", tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "tokenizer_3" / "tokenizer_config.json"
    settings.write_text(re.sub(r'"model_max_length": \d+,', "", settings.read_text()))
    with pytest.raises(
        ValueError, match=r"`max_length` must be set to 1 .. 100000 for T5EncoderModel, got \d+ by default"
    ):
        TransformersText(f"random:{tmp_path}", "text_encoder_3")
    for name, message in (("Nothing", "class 'Nothing', which"), ("T5Model", "T5Model gives no hidden states of text")):
        config = json.loads((TINY / "sd3" / "text_encoder_3" / "config.json").read_text())
        (tmp_path / "text_encoder_3" / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(ValueError, match=message):
            TransformersText(f"random:{tmp_path}", "text_encoder_3", max_length=8)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[text\]": .*transformers'):
        clip()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lpl-lightning\[text\]": .*open_clip'):
        OpenCLIPText("ViT-B-32")


def test_the_text_of_a_model_of_images_too_is_that_of_its_language_model() -> None:
    """As Qwen2.5-VL's, which Qwen-Image is conditioned by; the vocabulary is in a config within its config."""
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 722}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    encoder = TransformersText(model, tokenizer=str(TINY / "sdxl" / "tokenizer"), use_mask=True)
    found = encoder(["a cat", "two dogs running"])
    assert found.tokens is not None
    assert found.mask is not None
    ids = encoder.tokenizer(["a cat", "two dogs running"], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model.language_model(**ids).last_hidden_state
    torch.testing.assert_close(found.tokens[found.mask], expected[found.mask])
    assert (encoder.token_dim, encoder.max_length) == (16, 77)


TOWER: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}


@pytest.fixture
def towers(tmp_path: Path) -> Iterator[Any]:
    """open_clip with small models, one of each layout."""
    open_clip = pytest.importorskip("open_clip")
    factory: Any = sys.modules["open_clip.factory"]
    known, paths = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    folder = tmp_path / "configs"
    folder.mkdir()
    custom = {"custom_text": True}
    variants: dict[str, dict[str, Any]] = {
        "tiny-plain": TOWER,
        "tiny-custom": TOWER | custom | {"text_cfg": TOWER["text_cfg"] | {"proj_bias": True, "no_causal_mask": True}},
        "tiny-cls": TOWER | custom | {"text_cfg": TOWER["text_cfg"] | {"embed_cls": True}},
    }
    for name, config in variants.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield open_clip
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(known)
    factory._MODEL_CONFIG_PATHS[:] = paths


@pytest.mark.parametrize("name", ["tiny-plain", "tiny-custom"])
def test_open_clip_gives_what_its_model_gives(name: str, towers: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = towers.create_model(name).eval()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "tower.safetensors")
    tower = getattr(model, "text", model)
    seen: dict[int, Tensor] = {}
    tower.ln_final.register_forward_hook(lambda m, args, output: seen.update({-1: output}))
    for layer in (-2, -3):
        tower.transformer.resblocks[layer + 1].register_forward_pre_hook(
            lambda m, args, layer=layer: seen.update({layer: args[0]})
        )
    expected = model.encode_text(towers.get_tokenizer(name)(CAPTIONS))
    for layer in (-1, -2, -3):
        encoder = OpenCLIPText(name, str(tmp_path / "tower.safetensors"), layer=layer)
        assert not any("visual" in n for n, _ in encoder.named_modules())
        assert (encoder.token_dim, encoder.pooled_dim) == (32, 24)
        found = encoder(CAPTIONS)
        torch.testing.assert_close(found.pooled, expected)
        torch.testing.assert_close(found.tokens, seen[layer])
        assert found.mask is None
    random = OpenCLIPText(name, layer=-1)
    assert not torch.allclose(random(CAPTIONS).pooled, expected)
    assert random.fingerprint() != encoder.fingerprint()
    assert nn.ModuleList([random]).state_dict() == {}
    nn.ModuleList([random]).load_state_dict({})
    half = OpenCLIPText(name, str(tmp_path / "tower.safetensors"), tokens=False, dtype="bfloat16")(CAPTIONS)
    assert half.tokens is None
    torch.testing.assert_close(half.pooled.float(), expected, atol=0.05, rtol=0.05)
    assert OpenCLIPText(name, pooled=False)(CAPTIONS).pooled is None


def test_open_clip_says_what_is_wrong(towers: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model_name`='ViT-Q', `pretrained`=None: .*not found"):
        OpenCLIPText("ViT-Q")
    with pytest.raises(ValueError, match=r"`pretrained`='laion9b': .*is not a known tag"):
        OpenCLIPText("tiny-plain", "laion9b")
    with pytest.raises(ValueError, match="must have a CLIP's text tower, got TextTransformer"):
        OpenCLIPText("tiny-cls")
    with pytest.raises(ValueError, match="`layer`=-4 must be -3 to -1"):
        OpenCLIPText("tiny-plain", layer=-4)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWER}))
    with pytest.raises(ValueError, match="Required pretrained weights"):
        OpenCLIPText(f"local-dir:{tmp_path}")
    encoder = OpenCLIPText("tiny-plain")
    with pytest.warns(UserWarning, match="OpenCLIPText takes 16 tokens: 6 of a caption are dropped"):
        encoder(["cat " * 20])
