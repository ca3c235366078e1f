from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import tiny_kl, tiny_taesd
from families import FAMILIES, scrambled, tiny_asymmetric, tiny_dc, tiny_flux2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpl_lightning import Autoencoder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    expected = model.state_dict()
    state = loaded.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def released(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an AutoencoderKL under the names of the latent-diffusion release."""
    levels = 3
    rules: list[tuple[str, Any]] = [
        (r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block"),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block"),
        (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        # Its attention is made of 1 x 1 convolutions.
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        state[name] = (tensor[:, :, None, None] if is_attention else tensor).contiguous()
    return state


@pytest.mark.parametrize("name", ["asymmetric", "flux2", "vq", "dc", "rae", "wan22", "qwen"])
def test_every_family_loads_from_a_folder_and_from_one_file(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    model.save_pretrained(tmp_path / "vae")
    z = torch.randn(FAMILIES[name].z)
    expected = Autoencoder(model).decode(z)
    for autoencoder in (
        Autoencoder(str(tmp_path / "vae")),
        Autoencoder(str(tmp_path), subfolder="vae"),
        Autoencoder(str(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")),
    ):
        assert type(autoencoder.model) is type(model)
        assert_same(autoencoder.model, model)
        torch.testing.assert_close(autoencoder.decode(z), expected)


def test_a_config_is_given_in_any_way(tmp_path: Path) -> None:
    model = scrambled(tiny_taesd(scaling_factor=0.7))
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    folder = tmp_path / "pipeline" / "vae"
    for config in (folder, folder / "config.json"):
        assert_same(Autoencoder(str(file), config=str(config)).model, model)
    assert_same(Autoencoder(str(file), subfolder="vae", config=str(tmp_path / "pipeline")).model, model)
    (folder / "config.json").rename(tmp_path / "config.json")
    assert Autoencoder(str(file)).scale.item() == torch.tensor(0.7)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_released_file_is_converted_without_network(prefix: str, tmp_path: Path) -> None:
    model = scrambled(tiny_kl(scaling_factor=0.5))
    state = {prefix + name: tensor for name, tensor in released(model).items()}
    if prefix:
        state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    assert not set(state) & {name for name in model.state_dict() if "resnets" in name}
    save_file(state, tmp_path / "vae.safetensors")
    model.save_config(tmp_path)
    loaded = Autoencoder(str(tmp_path / "vae.safetensors"))
    assert_same(loaded.model, model)
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(loaded.decode(z), Autoencoder(model).decode(z))


def test_a_released_file_of_another_model_is_refused(tmp_path: Path) -> None:
    """diffusers would leave what it does not find as it was made."""
    model = tiny_kl()
    state = released(model)
    model.save_config(tmp_path)
    missing = {name: tensor for name, tensor in state.items() if "decoder.up.1" not in name}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"missing.safetensors are of another model: \d+ weights are missing"):
        Autoencoder(str(tmp_path / "missing.safetensors"))
    save_file(released(tiny_kl(latent_channels=16)), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors are of another model: diffusers cannot convert them"):
        Autoencoder(str(tmp_path / "wide.safetensors"))


def test_attention_under_its_old_names_loads(tmp_path: Path) -> None:
    model = scrambled(tiny_kl())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any(".query." in key for key in state)
    save_file(state, tmp_path / "old.safetensors")
    model.save_config(tmp_path)
    assert_same(Autoencoder(str(tmp_path / "old.safetensors")).model, model)


@pytest.mark.parametrize("make", [tiny_asymmetric, tiny_dc])
def test_a_file_of_another_model_is_refused(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_config(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "decoder.conv_in.bias"}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 weights are missing, such as 'decoder.conv_in.bias'"):
        Autoencoder(str(tmp_path / "w.safetensors"))
    save_file(model.state_dict() | {"decoder.conv_in.bias": torch.zeros(99)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'decoder.conv_in.bias': expected .* got \(99,\)"):
        Autoencoder(str(tmp_path / "w.safetensors"))


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_kl()
    model.save_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded: expected config.json and safetensors weights"):
        Autoencoder(str(tmp_path))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = model.state_dict()
    del state["decoder.conv_in.bias"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"1 weights are missing, such as 'decoder.conv_in.bias'"):
        Autoencoder(str(tmp_path))
    save_file(state | {"decoder.conv_in.bias": torch.zeros(99)}, weights)
    with pytest.raises(ValueError, match="expected config.json and safetensors weights that fit"):
        Autoencoder(str(tmp_path))
    weights.write_bytes(b"not safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match="cannot be loaded"):
        Autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NoSuchAutoencoder"}))
    with pytest.raises(ValueError, match="'NoSuchAutoencoder', which is no model in the installed diffusers"):
        Autoencoder(str(tmp_path))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".pth", ".bin", ".pt"):
        torch.save({"a": Malicious(tmp_path / "ran")}, tmp_path / f"w{suffix}")
        with pytest.raises(ValueError, match=r"must be a \.safetensors file .* can run code when they are read"):
            Autoencoder(str(tmp_path / f"w{suffix}"))
        with pytest.raises(FileNotFoundError, match="does not exist"):
            Autoencoder(str(tmp_path / f"nowhere{suffix}"))
    tiny_kl().save_config(tmp_path)
    for weights in ({"a": Malicious(tmp_path / "ran")}, tiny_kl().state_dict()):  # not even harmless ones
        torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match=r"Pickled weights \(\.bin\) are not read"):
            Autoencoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")
def test_what_only_the_hub_has_is_one_clear_error_without_it(tmp_path: Path) -> None:
    save_file(released(tiny_kl()), tmp_path / "alone.safetensors")
    file = str(tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone.safetensors' has no config.json beside it.* Give `config`"):
        Autoencoder(file)
    with pytest.raises(FileNotFoundError, match="`config`='nobody/nothing' holds no config"):
        Autoencoder(file, config="nobody/nothing")
    with pytest.raises(FileNotFoundError, match="`model`='nobody/nothing' cannot be loaded: .*the hub did not give it"):
        Autoencoder("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="`config`='./nowhere' does not exist"):
        Autoencoder(file, config="./nowhere")
    with pytest.raises(FileNotFoundError, match="in its subfolder 'vae'"):
        Autoencoder(file, config=str(tmp_path), subfolder="vae")


def cached(tmp_path: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the hub's cache that stands for a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")
def test_a_hub_id_gives_the_model_or_a_files_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled(tiny_kl(scaling_factor=0.5))
    model.save_pretrained(cached(tmp_path, "someone/pipeline", monkeypatch) / "vae")
    assert_same(Autoencoder("someone/pipeline", subfolder="vae").model, model)
    save_file(model.state_dict(), tmp_path / "alone.safetensors")
    autoencoder = Autoencoder(str(tmp_path / "alone.safetensors"), subfolder="vae", config="someone/pipeline")
    assert_same(autoencoder.model, model)
    assert autoencoder.scale.item() == 0.5


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")
def test_without_a_config_diffusers_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot place it takes for Stable Diffusion 1.5, here a tiny one in the cache."""
    model = scrambled(tiny_kl(scaling_factor=0.5))
    model.save_config(cached(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5", monkeypatch) / "vae")
    state = released(model)
    file = tmp_path / "alone.safetensors"
    save_file(state, file)
    autoencoder = Autoencoder(str(file))
    assert_same(autoencoder.model, model)
    assert autoencoder.scale.item() == 0.5
    save_file({name: tensor for name, tensor in state.items() if "encoder" not in name}, file)
    with pytest.raises(ValueError, match=r"alone.safetensors are of another model: \d+ weights are missing"):
        Autoencoder(str(file))


def test_a_config_that_has_no_use_is_refused(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config`=.* is for a single .safetensors file"):
        Autoencoder(str(tmp_path), config=str(tmp_path))
    with pytest.raises(ValueError, match="`model` is a module itself"):
        Autoencoder(tiny_kl(), subfolder="vae")
    (tmp_path / "broken.safetensors").write_bytes(b"0")
    with pytest.raises(ValueError, match="broken.safetensors' cannot be read as safetensors"):
        Autoencoder(str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_stored_bfloat16_loads_as_float32_unless_asked(dtype: Any, expected: torch.dtype, tmp_path: Path) -> None:
    model = scrambled(tiny_kl()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "vae")
    save_file(released(model), tmp_path / "released.safetensors")
    for source in (
        tmp_path / "vae",
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
        tmp_path / "released.safetensors",
    ):
        stored = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
        is_released = source.name == "released.safetensors"
        config = str(tmp_path / "vae") if is_released else None
        autoencoder = Autoencoder(str(source), config=config, dtype=dtype)
        state = autoencoder.model.state_dict()
        assert {tensor.dtype for tensor in state.values()} == {expected}
        assert all(torch.equal(state[name], tensor.to(expected)) for name, tensor in stored.items())
        assert autoencoder.scale.dtype == torch.float32


def test_stored_float64_is_kept_where_asked(tmp_path: Path) -> None:
    model = scrambled(tiny_kl()).double()
    with torch.no_grad():
        model.decoder.conv_in.bias.fill_(0.1)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert Autoencoder(str(source), dtype="float64").model.decoder.conv_in.bias[0].item() == 0.1
        assert Autoencoder(str(source)).dtype == torch.float32


def test_statistics_are_read_before_a_lower_precision_rounds_them(tmp_path: Path) -> None:
    model = tiny_flux2()
    model.bn.running_mean.fill_(0.1)
    model.save_pretrained(tmp_path)
    autoencoder = Autoencoder(str(tmp_path), dtype="bfloat16")
    assert autoencoder.dtype == torch.bfloat16
    assert autoencoder.shift[0].item() == model.bn.running_mean[0].item()
