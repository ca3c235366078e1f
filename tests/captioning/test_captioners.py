"""Captions of each family against the models called by hand, as their documentation does, one image at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import blip, florence, llava, photo, qwen, transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from lpl_lightning.captioning.models import Captioner, Decoding, find_model, load_processor, probe
from lpl_lightning.captioning.prompts import Prompt

TOKENS = 12
SIZES = [(40, 40), (24, 40), (90, 40), (16, 16), (61, 33)]
Family = Callable[[Path], Any]


def pictures() -> list[Image.Image]:
    return [photo(64, number).resize(size) for number, size in enumerate(SIZES)]


def captioner(folder: Path, prompt: str | None = None, **decoding: Any) -> Captioner:
    chosen: dict[str, Any] = {"max_new_tokens": TOKENS, "num_beams": None, "temperature": None, "seed": 0} | decoding
    asked = Prompt(load_processor(folder, "m"), prompt)
    probe(asked, "m")
    return Captioner(folder, "m", asked, Decoding(**chosen), torch.float32, torch.device("cpu"))


def captions(found: Captioner, images: list[Image.Image]) -> list[str]:
    return [text for text, _ in found(found.prompt(images), [image.size for image in images], "")]


def by_hand(folder: Path, image: Image.Image, prompt: str | None, **options: Any) -> str:
    """What the families' pages in transformers' documentation do."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    options |= {"max_new_tokens": TOKENS, "do_sample": False}
    if isinstance(model, transformers.Florence2ForConditionalGeneration):
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        text = processor.batch_decode(model.generate(**inputs, **options), skip_special_tokens=False)[0]
        return str(processor.post_process_generation(text, task=prompt, image_size=image.size)[prompt])
    if isinstance(model, transformers.BlipForConditionalGeneration):
        inputs = processor(image, **({} if prompt is None else {"text": prompt}), return_tensors="pt")
        text = processor.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
        return str(text).removeprefix(prompt or "").strip()
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "prompt", "asked"),
    [
        (florence, None, "<MORE_DETAILED_CAPTION>"),
        (florence, "<CAPTION>", "<CAPTION>"),
        (blip, None, None),
        (blip, "a red cat", "a red cat"),
        (llava, None, "Describe this image in detail."),
        (qwen, "What is it?", "What is it?"),
    ],
)
def test_captions_of_a_batch_are_those_by_hand(
    tmp_path: Path, family: Family, prompt: str | None, asked: str | None, num_beams: int
) -> None:
    family(tmp_path)
    images = pictures()
    expected = [" ".join(by_hand(tmp_path, image, asked, num_beams=num_beams).split()) for image in images]
    assert len(set(expected)) >= 4, "the tests' model must tell images apart"
    found = captioner(tmp_path, prompt, num_beams=num_beams)
    assert found.prompt.asked == asked
    assert captions(found, images) == expected
    # Neither the others nor the place in a batch change a caption, nor rows that only fill it up.
    assert captions(found, images[::-1]) == expected[::-1]
    assert [text for text, _ in found(found.prompt([*images[:2], images[0]]), SIZES[:2], "")] == expected[:2]


def test_a_prompt_without_a_template_is_given_as_it_is(tmp_path: Path) -> None:
    model = llava(tmp_path, template=None)
    with pytest.raises(ValueError, match=r"`prompt`='Describe it.' cannot be given to `model`='m' with an image"):
        captioner(tmp_path, "Describe it.")
    found = captioner(tmp_path, "USER: <image> Describe it.")
    assert not found.prompt.is_chat
    (image, *_) = pictures()
    inputs = found.prompt.processor(image, "USER: <image> Describe it.", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert captions(found, [image]) == [" ".join(found.prompt.tokenizer.decode(tokens).split())]


def test_tasks_that_give_no_text_are_refused(tmp_path: Path) -> None:
    florence(tmp_path)
    processor = load_processor(tmp_path, "m")
    with pytest.raises(ValueError, match=r"`prompt`='<OD>' does not give text.*<CAPTION>, <DETAILED_CAPTION>"):
        Prompt(processor, "<OD>")


def test_captions_are_one_line(tmp_path: Path) -> None:
    florence(tmp_path)
    prompt = Prompt(load_processor(tmp_path, "m"))
    tokens = prompt.tokenizer(" a red cat\n\n on\u2028 grass ", return_tensors="pt").input_ids[0]
    padded = torch.cat([torch.tensor([0]), tokens, torch.tensor([2, 1, 1])])
    assert prompt.text(padded, (8, 8)) == "a red cat on grass"


def test_what_reaches_the_bound_is_told_from_what_ends(tmp_path: Path) -> None:
    blip(tmp_path / "long")
    blip(tmp_path / "empty", ends_at_once=True)
    found = captioner(tmp_path / "empty")
    assert found(found.prompt(pictures()), SIZES, "") == [("", False)] * 5
    # Texts end at different lengths: those that the model itself ends are not long.
    found = captioner(tmp_path / "long", "a", max_new_tokens=30)
    model = found.model
    for image, (_, is_long) in zip(pictures(), found(found.prompt(pictures()), SIZES, ""), strict=True):
        ids = model.generate(**found.prompt([image]), max_new_tokens=30, do_sample=False)[0]
        assert is_long == (3 not in ids.tolist())


def test_drawn_captions_depend_on_the_seed_alone(tmp_path: Path) -> None:
    florence(tmp_path)
    images = pictures()

    def drawn(seed: int, seed_of: str = "0.png") -> list[str]:
        torch.seed()  # what the process has drawn before must not matter
        found = captioner(tmp_path, temperature=1.5, seed=seed)
        before = torch.get_rng_state()
        texts = [text for text, _ in found(found.prompt(images), SIZES, seed_of)]
        assert torch.equal(torch.get_rng_state(), before)
        return texts

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, "1.png")


def test_lower_precision(tmp_path: Path) -> None:
    florence(tmp_path)
    asked = Prompt(load_processor(tmp_path, "m"))
    decoding = Decoding(TOKENS, 1, None, 0)
    found = Captioner(tmp_path, "m", asked, decoding, torch.bfloat16, torch.device("cpu"))
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
    assert all(captions(found, pictures()))


# Where models come from


def test_folders_without_safe_weights_are_refused(tmp_path: Path) -> None:
    model = florence(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must hold config.json and .safetensors weights.*\.bin files are not"):
        find_model(str(tmp_path / "m"), None)
    with pytest.raises(FileNotFoundError, match=r"`model`='./nowhere' does not exist"):
        find_model("./nowhere", None)
    with pytest.raises(ValueError, match=r"`revision`='main' is of a hub id, but `model`="):
        find_model(str(tmp_path / "m"), "main")


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    transformers.BertModel(
        transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`model`='b' must have a processor of images and text"):
        load_processor(find_model(str(tmp_path / "bert"), None), "b")
    florence(tmp_path / "m")
    asked = Prompt(load_processor(tmp_path / "m", "m"))
    with pytest.raises(ValueError, match=r"`model`='b' cannot be loaded as a model from images and text to text"):
        Captioner(tmp_path / "bert", "b", asked, Decoding(4, 1, None, 0), torch.float32, torch.device("cpu"))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    florence(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "image_projection" in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=rf"cannot be loaded .*1 weights are missing, such as .*{re.escape(gone)}"):
        captioner(tmp_path)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    florence(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert all(captions(captioner(tmp_path), pictures()))
    assert not (tmp_path / "ran").exists()


def test_hub_ids_are_found_where_they_were_downloaded_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as huggingface_hub lays it out, without network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--captions"
    florence(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert find_model("someone/captions", revision) == repository / "snapshots" / commit
    with pytest.raises(FileNotFoundError, match=r"`model`='someone/else' cannot be had from the Hugging Face hub"):
        find_model("someone/else", None)


def test_a_commit_that_is_there_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in huggingface_hub 1.33: it asks for a commit's list of files, and what httpx raises is no OSError."""
    florence(tmp_path)

    there = {"someone/captions"}

    def download(model: str, *, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            there.add(model)  # in part
            raise RuntimeError("Name or service not known")
        if model not in there:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("someone/captions", "0123456789abcdef0123456789abcdef01234567") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"`model`='someone/else' cannot be had .*Name or service not known"):
        find_model("someone/else", None)
