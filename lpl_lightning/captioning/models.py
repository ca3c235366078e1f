"""Vision-language models of transformers that give text for images.

Florence-2 (Xiao et al., 2024, "Florence-2: Advancing a unified representation for a variety of vision tasks") is asked
by task tokens; models with a chat template, such as LLaVA and Qwen-VL, by a message of an image and a text; others,
such as BLIP, by the prompt as it is, or by none. Captions are what a model adds to the prompt, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpl_lightning.captioning.prompts import Prompt
from lpl_lightning.data.reading import reason
from lpl_lightning.file_names import check_indices
from lpl_lightning.pretrained import locate
from lpl_lightning.text_loading import optional

__all__ = ["Captioner", "Decoding", "find_model", "load_processor", "probe"]

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_LEFT_OUT = ["*/*", "consolidated*"]  # other precisions and formats; the same weights a second time
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from a model.

    Attributes:
        max_new_tokens: The most tokens of a caption.
        num_beams: Beams of the search; 1 takes the likeliest token each time; None leaves it to the model's settings.
        temperature: Draws tokens at random, at this temperature; None takes the likeliest.
        seed: Of what is drawn. Each batch has a seed of its own, from this one and the name of its first image.
    """

    max_new_tokens: int
    num_beams: int | None
    temperature: float | None
    seed: int


def find_model(model: str, revision: str | None) -> Path:
    """The folder of a model's files, downloaded from the hub where it is an id.

    Only safetensors are taken: pickled weights can run code. Without network it is found where it was downloaded to.

    Args:
        model: A folder that ``save_pretrained`` wrote, or a Hugging Face hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: There is none, or not with such weights.
        ValueError: ``revision`` is given for a folder, or an index of its weights names files elsewhere.
    """
    found = locate(model, "model")
    if isinstance(found, Path):
        if revision is not None:
            raise ValueError(
                f"`revision`={revision!r} is of a hub id, but `model`={model!r} is a folder. Leave it out."
            )
    else:
        found = _downloaded(found, revision)
    if not (found / "config.json").is_file() or not list(found.glob("*.safetensors")):
        raise FileNotFoundError(
            f"`model`={model!r} must hold config.json and .safetensors weights as save_pretrained writes them, but "
            f"{found} does not. Weights in .bin files are not read; of Florence-2 take "
            "florence-community/Florence-2-large."
        )
    check_indices(found)
    return found


def _downloaded(model: str, revision: str | None) -> Path:
    """The folder of a hub id's files."""
    hub = optional("huggingface_hub")
    options = {"revision": revision, "allow_patterns": _WANTED, "ignore_patterns": _LEFT_OUT}
    # Looked for before: what a download that breaks off leaves must not pass for the whole.
    there: str | None = None
    with suppress(OSError, ValueError):
        there = hub.snapshot_download(model, **options, local_files_only=True)
    try:
        return Path(hub.snapshot_download(model, **options))
    except Exception as error:  # also what httpx raises
        if there is not None:  # some releases ask the network for a commit, also where it is in the cache
            return Path(there)
        raise FileNotFoundError(
            f"`model`={model!r} cannot be had from the Hugging Face hub. Without network: download it elsewhere "
            f"and give its folder. ({error})"
        ) from error


def load_processor(folder: Path, model: str) -> Any:
    """Load what prepares images and text for a model.

    Raises:
        ValueError: There is none that takes both.
    """
    transformers = optional("transformers")
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ValueError(f"got a {type(processor).__name__}")
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`model`={model!r} must have a processor of images and text that transformers itself knows, such as "
            f"Florence2Processor; no code of the repository is run. ({reason(error)})"
        ) from error
    return processor


class Captioner:
    """A model that gives captions.

    Args:
        folder: Its files.
        model: What it was called, for the errors.
        prompt: How it is asked.
        decoding: How text is drawn from it.
        dtype: Precision of the weights.
        device: Where it runs.

    Raises:
        ValueError: It is of a class that gives no text for images, or its weights do not fit.
    """

    def __init__(
        self, folder: Path, model: str, prompt: Prompt, decoding: Decoding, dtype: torch.dtype, device: torch.device
    ) -> None:
        transformers = optional("transformers")
        options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "dtype": dtype}
        try:
            loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(
                str(folder), output_loading_info=True, **options
            )
            if lacking := sorted(info["missing_keys"]):
                raise ValueError(f"{len(lacking)} weights are missing, such as {lacking[0]!r}")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"`model`={model!r} cannot be loaded as a model from images and text to text: {error}"
            ) from error
        self.model: Any = loaded.to(device).eval()
        self.prompt, self.decoding, self.dtype, self.device = prompt, decoding, dtype, device
        settings = self.model.generation_config
        settings.max_length = None
        if decoding.temperature is None:
            for name in _SAMPLING:  # of which transformers would warn each time that they are not looked at
                setattr(settings, name, None)

    @torch.inference_mode()
    def __call__(
        self, inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]], seed_of: str
    ) -> list[tuple[str, bool]]:
        """Caption a batch.

        Args:
            inputs: What ``Prompt`` prepared; the rows after those of ``sizes`` fill it up, and are left out.
            sizes: Width and height in pixels of each image.
            seed_of: What the seed of this batch depends on, beside that of ``Decoding``.

        Returns:
            Of each image its caption, and whether it is as long as was allowed.
        """
        moved = {name: self._moved(value) for name, value in inputs.items()}
        options: dict[str, Any] = {"max_new_tokens": self.decoding.max_new_tokens, "do_sample": False}
        if self.decoding.num_beams is not None:
            options["num_beams"] = self.decoding.num_beams
        if self.decoding.temperature is not None:
            options |= {"do_sample": True, "temperature": self.decoding.temperature}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            digest = blake2b(f"{self.decoding.seed} {seed_of}".encode(errors="surrogateescape"), digest_size=6).digest()
            torch.manual_seed(int.from_bytes(digest, "big"))
            generated: Tensor = self.model.generate(**moved, **options)
        new = self.prompt.without_prompt(self.model, generated, moved.get("input_ids")).cpu()
        return [
            (self.prompt.text(tokens, size), self._is_long(tokens))
            for tokens, size in zip(new[: len(sizes)], sizes, strict=True)
        ]

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _is_long(self, tokens: Tensor) -> bool:
        """Whether a caption reached its bound. Some models are made to end there, so the last token says nothing."""
        if len(tokens) < self.decoding.max_new_tokens:
            return False
        ends = torch.tensor(self.prompt.ends(self.model))
        return not bool(torch.isin(tokens[: self.decoding.max_new_tokens - 1], ends).any())


def probe(prompt: Prompt, model: str) -> None:
    """Find out whether a processor takes images with a prompt at all, before each of them is said to be at fault.

    Raises:
        ValueError: It does not.
    """
    try:
        inputs = prompt([Image.new("RGB", (64, 48), "grey")] * 2)
        # Some releases of transformers let images pass that no mark of the prompt stands for.
        mark = getattr(prompt.processor, "image_token_id", None)
        if mark is not None and "input_ids" in inputs and not bool((inputs["input_ids"] == mark).any(dim=1).all()):
            raise ValueError("it has no mark for the image")
    except Exception as error:
        raise ValueError(
            f"`prompt`={prompt.asked!r} cannot be given to `model`={model!r} with an image ({reason(error)}). A "
            "model without a chat template may want a mark for the image in it, as in 'USER: <image> Describe it.'."
        ) from error
