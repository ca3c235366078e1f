"""Images per second of ``lpl caption``, from a folder and from tar shards, beside those of its model alone.

    python notebooks/captioning.py --photos PHOTOS
    python notebooks/captioning.py --photos PHOTOS --model florence-community/Florence-2-large --dtype bfloat16

Without ``--model`` it is a BLIP of one layer with random weights, over images of 384 px as a real one, so that little
of what is measured is the model. Each way runs ``--rounds`` times, in turn with the others, and medians are printed,
without what it takes to begin. "model alone" is called again and again with one batch, prepared beforehand. The last
column is the time of all CPU cores together, in all processes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from lpl_lightning.captioning import caption_images
from lpl_lightning.captioning.models import Captioner, Decoding, find_model, load_processor
from lpl_lightning.captioning.prompts import Prompt
from lpl_lightning.data.listing import images_below
from lpl_lightning.data.reading import load_rgb


def small_blip(folder: Path) -> str:
    """BLIP of one layer a part, with random weights; its captions are always as long as is allowed."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {token: number for number, token in enumerate([*special, *(f"word{i}" for i in range(1000))])}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(vocabulary), "encoder_hidden_size": 64, "max_position_embeddings": 512, **sizes, **ids}
    config = transformers.BlipConfig(text_config=text, vision_config={"image_size": 384, "patch_size": 128, **sizes})
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] = -1e4
    model.save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, bos_token="[DEC]")
    images = transformers.BlipImageProcessor(size={"height": 384, "width": 384})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def now() -> tuple[float, float]:
    """Seconds on the clock, and those that the cores have worked for this process and its children that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of images, at any depth")
    parser.add_argument("--model", help="hub id or folder")
    parser.add_argument("--count", type=int, default=512, help="images that are captioned")
    parser.add_argument("--shard_size", type=int, default=128, help="images of a shard")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        photos, shards = root / "photos", root / "shards"
        photos.mkdir()
        shards.mkdir()
        paths = images_below(Path(given.photos), "photos")[: given.count]
        for number, path in enumerate(paths):
            name = f"{number:09}{Path(path).suffix}"
            shutil.copy(path, photos / name)
            with tarfile.open(shards / f"{number // given.shard_size:05}.tar", "a") as shard:
                shard.add(path, name)
        model = given.model or small_blip(root / "model")
        files, device = find_model(model, None), torch.device(given.device)
        prompt = Prompt(load_processor(files, model))
        decoding = Decoding(given.max_new_tokens, None, None, 0)
        captioner = Captioner(files, model, prompt, decoding, getattr(torch, given.dtype), device)
        images = [load_rgb(path) for path in paths[: given.batch_size]]
        inputs, sizes = prompt(images), [image.size for image in images]

        def alone(limit: int) -> None:
            for _ in range(-(-limit // given.batch_size)):
                captioner(inputs, sizes, "")

        def captioned(source: Path) -> Callable[[int], None]:
            def run(limit: int) -> None:
                out = Path(tempfile.mkdtemp(dir=root))
                options = {name: getattr(given, name) for name in ("batch_size", "num_workers", "max_new_tokens")}
                caption_images(
                    str(source), model, str(out), limit=limit, dtype=given.dtype, device=given.device, **options
                )
                shutil.rmtree(out)

            return run

        ways = {"model alone": alone, "folder": captioned(photos), "shards": captioned(shards)}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                before = now()
                way(given.batch_size)
                begun = now()
                way(len(paths))
                (wall, cpu), more = now(), len(paths) - given.batch_size
                took[name].append(((wall - 2 * begun[0] + before[0]) / more, (cpu - 2 * begun[1] + before[1]) / more))
        for name, pairs in took.items():
            wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{name:12} {1 / wall:8.1f} images/s, an image {1000 * wall:6.2f} ms, of cores {1000 * cpu:6.2f} ms")


if __name__ == "__main__":
    main()
