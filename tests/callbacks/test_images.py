from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from test_mixin import Foreign
from test_module import trainer
from torch import Tensor, nn

from lpl_lightning import ClassTokens, ImageWriter, LatentDiffusionModule, LoRA, SampleGrid, Sampler, ShapesDataModule
from lpl_lightning.conditioning import Condition, Conditioner, ConditionShape

MakeModule = Callable[..., LatentDiffusionModule]


class Letters(Conditioner):
    """A token for each caption: the mean of its letters' embeddings."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.letters = nn.EmbeddingBag(128, 8)

    @property
    def gives(self) -> ConditionShape:
        return ConditionShape(token_dim=8, pooled_dim=8)

    def forward(self, batch: Mapping[str, Any], batch_size: int, drop: Tensor | None = None) -> Condition:
        captions = batch.get("caption", [""] * batch_size)
        dropped = [False] * batch_size if drop is None else drop.tolist()
        texts = ["" if null else caption for null, caption in zip(dropped, captions, strict=True)]
        codes = [torch.tensor([ord(letter) % 128 for letter in text], dtype=torch.int64) for text in texts]
        offsets = torch.tensor([0, *(len(code) for code in codes[:-1])]).cumsum(0)
        pooled = self.letters(torch.cat(codes), offsets)
        return Condition(tokens=pooled[:, None], pooled=pooled)


@pytest.fixture
def module(make_module: MakeModule) -> LatentDiffusionModule:
    return make_module(conditioner=ClassTokens(8, token_dim=8, pooled_dim=8))


def data(num_generate: int = 20, batch_size: int = 8, seed: int = 0, prompts: Path | None = None) -> ShapesDataModule:
    return ShapesDataModule(
        image_size=16,
        train_images=16,
        val_images=8,
        batch_size=batch_size,
        num_generate=num_generate,
        generate_seed=seed,
        prompts=prompts,
    )


def pictures(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            found[str(path.relative_to(folder))] = np.asarray(image)
    return found


def predict(module: LatentDiffusionModule, folder: Path, tmp_path: Path, **options: Any) -> None:
    run = trainer(tmp_path, callbacks=[ImageWriter(str(folder))])
    assert run.predict(module, data(**options)) is None, "images are not gathered in memory"


def test_predict_writes_class_balanced_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    predict(module, tmp_path / "out", tmp_path)
    images = pictures(tmp_path / "out")
    per_class = [len(list((tmp_path / "out" / f"{c:04d}").iterdir())) for c in range(8)]
    assert len(images) == 20
    assert per_class == [3, 3, 3, 3, 2, 2, 2, 2]
    expected = module.generate([9], [1])[0]
    written = torch.from_numpy(images["0001/000009.png"].copy()).permute(2, 0, 1)
    assert (written - (expected + 1) * 127.5).abs().max() <= 0.51


def test_predict_goes_on_where_it_stopped_with_the_same_images(module: LatentDiffusionModule, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    predict(module, whole, tmp_path)
    predict(module, parts, tmp_path, num_generate=11, batch_size=4)
    (parts / "0002" / "000002.png").unlink()
    untouched = parts / "0000" / "000000.png"
    before = untouched.stat().st_mtime_ns
    made: list[int] = []
    generate = module.generate

    def watched(seeds: Any, labels: Any = None, captions: Any = None) -> torch.Tensor:
        made.extend(seeds)
        return generate(seeds, labels, captions)

    module.generate = watched  # type: ignore[method-assign, assignment]
    predict(module, parts, tmp_path)
    assert made == [2, *range(11, 20)]
    assert untouched.stat().st_mtime_ns == before
    first, second = pictures(whole), pictures(parts)
    assert first.keys() == second.keys()
    for name, image in first.items():
        # A batch of another size may round otherwise: at most one level.
        assert np.abs(image.astype(int) - second[name].astype(int)).max() <= 1
    assert not list(parts.rglob("*.part"))


def test_images_of_other_settings_are_not_mixed_in(module: LatentDiffusionModule, tmp_path: Path) -> None:
    predict(module, tmp_path / "out", tmp_path, num_generate=2)
    module.sampler = Sampler(num_steps=3)
    with pytest.raises(ValueError, match=r"other settings \(guidance_scale, num_steps; see .*settings.json"):
        predict(module, tmp_path / "out", tmp_path)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["num_steps"] == 2


def test_images_of_other_weights_are_not_mixed_in(module: LatentDiffusionModule, tmp_path: Path) -> None:
    predict(module, tmp_path / "out", tmp_path, num_generate=2)
    with torch.no_grad():
        next(module.denoiser.parameters()).add_(0.1)
    with pytest.raises(ValueError, match=r"other settings \(weights_blake2b; see"):
        predict(module, tmp_path / "out", tmp_path)


def test_images_of_the_same_lora_on_another_base_are_not_mixed_in(
    module: LatentDiffusionModule, tmp_path: Path
) -> None:
    """What is frozen is in no state dict, and makes the images all the same."""
    pytest.importorskip("peft")
    LoRA(rank=2).prepare(module.denoiser)
    predict(module, tmp_path / "out", tmp_path, num_generate=2)
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module.denoiser.backbone.proj_out.bias.add_(0.1)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match=r"other settings \(weights_blake2b; see"):
        predict(module, tmp_path / "out", tmp_path)


def test_without_classes_all_images_lie_in_one_folder(make_module: MakeModule, tmp_path: Path) -> None:
    predict(make_module(conditioner=ClassTokens(0, token_dim=8, pooled_dim=8)), tmp_path / "out", tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["0000"]
    assert len(pictures(tmp_path / "out")) == 20


def texts(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in folder.rglob("*.txt")}


def test_captions_lie_beside_images_of_a_model_that_goes_by_them(make_module: MakeModule, tmp_path: Path) -> None:
    module, out = make_module(conditioner=Letters()), tmp_path / "out"
    predict(module, out, tmp_path)
    images = pictures(out)
    assert list(images) == [f"0000/{i:06d}.png" for i in range(20)]
    captions = data().sample_captions(20)
    assert len(set(captions)) > 1
    assert texts(out) == {f"0000/{i:06d}.txt": caption for i, caption in enumerate(captions)}
    expected = [(module.generate([9], captions=[caption])[0] + 1) * 127.5 for caption in captions[9:11]]
    written = torch.from_numpy(images["0000/000009.png"].copy()).permute(2, 0, 1)
    assert (written - expected[0]).abs().max() <= 0.51
    assert (written - expected[1]).abs().max() > 1


def test_captioned_images_go_on_where_they_stopped(make_module: MakeModule, tmp_path: Path) -> None:
    module, whole, parts = make_module(conditioner=Letters()), tmp_path / "whole", tmp_path / "parts"
    predict(module, whole, tmp_path)
    predict(module, parts, tmp_path, num_generate=11, batch_size=4)
    (parts / "0000" / "000002.png").unlink()
    predict(module, parts, tmp_path)
    assert texts(whole) == texts(parts)
    first, second = pictures(whole), pictures(parts)
    assert first.keys() == second.keys()
    for name, image in first.items():
        assert np.abs(image.astype(int) - second[name].astype(int)).max() <= 1


def test_images_of_other_prompts_are_not_mixed_in(make_module: MakeModule, tmp_path: Path) -> None:
    module, prompts, out = make_module(conditioner=Letters()), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("ein Kätzchen\na star", encoding="utf-8")
    predict(module, out, tmp_path, num_generate=3, prompts=prompts)
    assert [texts(out)[f"0000/{i:06d}.txt"] for i in range(3)] == ["ein Kätzchen", "a star", "ein Kätzchen"]
    for others in (None, prompts):
        prompts.write_text("ein Kätzchen\na moon", encoding="utf-8")
        with pytest.raises(ValueError, match=r"other settings \(prompts_blake2b; see"):
            predict(module, out, tmp_path, num_generate=3, prompts=others)


def test_a_model_that_goes_by_classes_knows_no_prompts(module: LatentDiffusionModule, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a star")
    predict(module, out, tmp_path, num_generate=2)
    predict(module, out, tmp_path, num_generate=3, prompts=prompts)
    assert texts(out) == {}
    assert list(pictures(out)) == [f"{i:04d}/{i:06d}.png" for i in range(3)]
    assert "prompts_blake2b" not in json.loads((out / "settings.json").read_text())


def test_grids_at_start_every_n_steps_and_end(module: LatentDiffusionModule, tmp_path: Path) -> None:
    run = trainer(
        tmp_path, max_steps=5, max_epochs=-1, callbacks=[SampleGrid(num_images=10, columns=5, every_n_steps=2)]
    )
    run.fit(module, data())
    grids = pictures(tmp_path / "samples")
    assert list(grids) == [f"step-{s:08d}.png" for s in (0, 2, 4, 5)]
    last = grids["step-00000005.png"]
    assert last.shape == (2 * 18 + 2, 5 * 18 + 2, 3)
    # The second row of five holds images 5 to 9; the last of them has seed 9 and label 9 % 8.
    expected = (module.eval().generate([9], [1])[0] + 1) * 127.5
    cell = torch.from_numpy(last[20:36, 74:90].copy()).permute(2, 0, 1)
    assert (cell - expected).abs().max() <= 1.5


def test_a_module_that_cannot_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="draws from a LatentDiffusionModule, got Foreign"):
        SampleGrid().setup(pl.Trainer(logger=False), Foreign(), "fit")
    with pytest.raises(ValueError, match="`every_n_steps` must be 1 or more"):
        SampleGrid(every_n_steps=0)


def test_images_of_another_autoencoder_or_precision_are_not_mixed_in(
    module: LatentDiffusionModule, tmp_path: Path
) -> None:
    predict(module, tmp_path / "out", tmp_path, num_generate=2)
    run = trainer(tmp_path, callbacks=[ImageWriter(str(tmp_path / "out"))], precision="bf16-mixed")
    with pytest.raises(ValueError, match=r"other settings \(trainer_precision; see"):
        run.predict(module, data())
    with torch.no_grad():
        module.autoencoder.model.decoder.conv_out.bias.add_(0.1)
    with pytest.raises(ValueError, match=r"other settings \(autoencoder; see"):
        predict(module, tmp_path / "out", tmp_path)


def test_images_that_nothing_tells_of_are_not_mixed_in(module: LatentDiffusionModule, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(module, out, tmp_path, num_generate=2)
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds images, such as 000\d/.*, but no settings.json .*--writer.dirname"):
        predict(module, out, tmp_path)
    assert not (out / "settings.json").exists()
    (out / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json, which says .*, is damaged .*--writer.dirname"):
        predict(module, out, tmp_path)
    # Pictures of another kind are no images of a model.
    other = tmp_path / "run" / "samples"
    other.mkdir(parents=True)
    (other / "step-00000001.png").write_bytes((out / "0000" / "000000.png").read_bytes())
    predict(module, tmp_path / "run", tmp_path, num_generate=2)


def spoil(module: LatentDiffusionModule, *bad: int) -> None:
    """Let images of some seeds hold a NaN."""
    generate = module.generate

    def spoiled(seeds: Any, labels: Any = None, captions: Any = None) -> torch.Tensor:
        images = generate(seeds, labels, captions)
        for place, seed in enumerate(seeds):
            if seed in bad:
                images[place, 0, 0, 0] = float("nan")
        return images

    module.generate = spoiled  # type: ignore[method-assign, assignment]


def test_images_that_are_not_finite_are_not_written(module: LatentDiffusionModule, tmp_path: Path) -> None:
    spoil(module, 109)
    with pytest.raises(ValueError, match=r"1 of 8 hold NaN or infinity: 9 \(seed 109\)\. "):
        predict(module, tmp_path / "out", tmp_path, seed=100)
    assert len(pictures(tmp_path / "out")) == 8


def test_a_grid_that_is_not_finite_is_warned_of(module: LatentDiffusionModule, tmp_path: Path) -> None:
    spoil(module, 5)
    run = trainer(tmp_path, max_steps=1, callbacks=[SampleGrid(num_images=6, columns=6)])
    with pytest.warns(UserWarning, match="At step [01], samples of the seeds 5 hold NaN or infinity: they are black"):
        run.fit(module, data())
    assert run.global_step == 1
    grid = pictures(tmp_path / "samples")["step-00000000.png"]
    assert grid[2:18, 92:108].max() == 0
    assert grid[2:18, 74:90].max() > 0
