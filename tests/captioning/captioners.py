"""Small vision-language models with random weights and tokenizers of their own, saved as hub repositories are."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

transformers: Any = import_module("transformers")  # whose types are not complete

WORDS = ("a", "red", "green", "blue", "cat", "dog", "bird", "tree", "sits", "runs", "on", "grass", "roof", ",", ".")
TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def byte_tokenizer(special: list[str], begins: bool = False, **names: Any) -> Any:
    """All bytes, and words with the space before them as one token, as in BART's; as in LLaMA's, <s> may be added."""
    vocabulary = {token: index for index, token in enumerate(special)}
    for character in sorted(ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for character in word:
            if left + character not in vocabulary:
                vocabulary[left + character] = len(vocabulary)
                merges.append((left, character))
            left += character
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=None))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if begins:
        tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def florence(folder: Path, seed: int = 0) -> Any:
    """Florence-2 of one layer a part, over images of 16 px."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = byte_tokenizer(
        special,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessor(
        size={"height": 16, "width": 16}, do_center_crop=False, crop_size={"height": 16, "width": 16}
    )
    images.image_seq_length = 2
    processor = transformers.Florence2Processor(images, tokenizer, post_processor_config={"pure_text": {}})
    config = transformers.Florence2Config(
        text_config=transformers.BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=128,
            forced_eos_token_id=2, init_std=1.0,
        ).to_dict(),
        vision_config={
            "depths": (1,), "patch_size": (7,), "patch_stride": (16,), "patch_padding": (3,), "patch_prenorm": (False,),
            "embed_dim": (16,), "num_heads": (2,), "num_groups": (2,), "window_size": 4, "projection_dim": 16,
            "initializer_range": 1.0,
        },
        image_token_id=special.index("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Florence2ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def blip(folder: Path, seed: int = 0, ends_at_once: bool = False) -> Any:
    """BLIP of one layer a part, over images of 16 px, which captions without a prompt too."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, bos_token="[DEC]")
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    config = transformers.BlipConfig(
        text_config={
            "vocab_size": len(vocabulary), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 5,
            "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "initializer_range": 1.0,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8, "initializer_range": 1.0,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.BlipForConditionalGeneration(config).eval()
    if ends_at_once:
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[3] = 1e4
    model.save_pretrained(folder)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return model


def llava(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> Any:
    """LLaVA of one layer a part, over images of 16 px, by default with a chat template that begins with <s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = byte_tokenizer(special, begins=True, **names)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=16, initializer_range=1.0, initializer_factor=20.0,
        ).to_dict(),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=0, pad_token_id=1, eos_token_id=2, initializer_range=1.0,
        ).to_dict(),
        image_token_id=special.index("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def qwen(folder: Path, seed: int = 0) -> Any:
    """Qwen2-VL of one layer a part, whose images take as many tokens as they are large."""
    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    special = ["<pad>", "</s>", *marks]
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="</s>")
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=8, merge_size=2)
    video = transformers.Qwen2VLVideoProcessor(size=size, patch_size=8, merge_size=2)
    template = TEMPLATE.replace("<s>", "").replace("<image>", "".join(marks[:3]))
    processor = transformers.Qwen2VLProcessor(images, tokenizer, video, chat_template=template)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1,
            "pad_token_id": 0, "initializer_range": 1.0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 8,
            "initializer_range": 1.0,
        },
        vision_start_token_id=2, image_token_id=3, vision_end_token_id=4, video_token_id=5,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def photo(side: int, seed: int) -> Image.Image:
    """A smooth random photo."""
    drawn = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(drawn.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def make_photos(folder: Path, count: int = 9) -> Path:
    """Photos of several sizes, a third of them in a sub-folder, and a file that is none."""
    (folder / "sub").mkdir(parents=True)
    for number in range(count):
        photo(16 + number, number).save(folder / ("sub" if number % 3 == 2 else "") / f"{number}.png")
    (folder / "notes.csv").write_text("no image")
    return folder


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
