"""Each backbone gets what the pipeline of its family gives it, in the units that it takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import backbones
import pytest
import torch
from backbones import BACKBONES, CLASSES, POOLED_DIM, TOKEN_DIM, denoiser
from diffusers import FluxPipeline
from torch import Tensor, nn

from lpl_lightning import ClassLabels, ClassTokens, Denoiser, FluxDenoiser, PixArtDenoiser, SanaDenoiser, UNetDenoiser
from lpl_lightning.conditioning import Condition, Conditioner, ConditionShape

B = 3
Z = torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.0, 500.0, 999.0])


def condition(length: int = 5) -> Condition:
    generator = torch.Generator().manual_seed(1)
    return Condition(
        class_labels=torch.tensor([0, 2, CLASSES]),
        tokens=torch.randn(B, length, TOKEN_DIM, generator=generator),
        mask=torch.arange(length)[None] < torch.tensor([[length], [3], [1]]),
        pooled=torch.randn(B, POOLED_DIM, generator=generator),
        time_ids=torch.tensor([[64.0, 48, 0, 8, 32, 32]]).repeat(B, 1),
    )


def by_hand(name: str, net: Any, c: Any) -> Tensor:
    """The call that the family's pipeline makes, written out."""
    out: Any
    match name:
        case "DiT":
            out = net(Z, timestep=T, class_labels=c.class_labels, return_dict=False)[0][:, :4]
        case "SD3":
            out = net(Z, c.tokens, c.pooled, T, return_dict=False)[0]
        case "PixArt":
            sizes = {"resolution": None, "aspect_ratio": None}
            out = net(Z, c.tokens, timestep=T, encoder_attention_mask=c.mask.float(), added_cond_kwargs=sizes)
            out = out.sample.chunk(2, dim=1)[0]
        case "UNet (SD 1.5)":
            out = net(Z, T, c.tokens, encoder_attention_mask=c.mask.float(), return_dict=False)[0]
        case "UNet (SDXL)":
            added = {"text_embeds": c.pooled, "time_ids": c.time_ids}
            out = net(Z, T, c.tokens, encoder_attention_mask=c.mask.float(), added_cond_kwargs=added).sample
        case "Sana":
            out = net(Z, c.tokens, timestep=T * net.config.timestep_scale, encoder_attention_mask=c.mask.float()).sample
        case "Flux":
            packed = FluxPipeline._pack_latents(Z, B, 4, 8, 8)
            places = FluxPipeline._prepare_latent_image_ids(B, 4, 4, "cpu", torch.float32)
            out = net(
                packed, c.tokens, c.pooled, timestep=T / 1000, img_ids=places, txt_ids=torch.zeros(c.tokens.shape[1], 3)
            ).sample
            out = FluxPipeline._unpack_latents(out, 64, 64, 8)
    return cast(Tensor, out)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_call_is_that_of_the_familys_pipeline(name: str) -> None:
    model, c = denoiser(name), condition()
    with torch.no_grad():
        out = model(Z, T, c)
        torch.testing.assert_close(out, by_hand(name, model.backbone, c), atol=1e-6, rtol=1e-5)
    assert out.shape == Z.shape
    assert out.std() > 1e-3


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "DiT"])
def test_the_condition_reaches_the_prediction(name: str) -> None:
    model, c = denoiser(name), condition()
    assert c.tokens is not None
    with torch.no_grad():
        out = model(Z, T, c)
        changed = c.tokens.clone()
        changed[:, 0] += 1
        assert not torch.allclose(out, model(Z, T, Condition(c.class_labels, changed, c.mask, c.pooled, c.time_ids)))
        # Behind the end of a caption, where the backbone looks at masks, nothing matters.
        hidden = torch.where(c.mask[..., None], c.tokens, 7.0)  # type: ignore[index]
        same = model(Z, T, Condition(c.class_labels, hidden, c.mask, c.pooled, c.time_ids))
    assert torch.allclose(out, same, atol=1e-5) == (name not in ("SD3", "Flux"))


def test_sdxl_is_conditioned_on_sizes_and_pooled_text() -> None:
    model, c = denoiser("UNet (SDXL)"), condition()
    assert model.needs == ConditionShape(token_dim=TOKEN_DIM, pooled_dim=POOLED_DIM, time_ids=True)
    with torch.no_grad():
        out = model(Z, T, c)
        assert c.time_ids is not None
        assert not torch.allclose(out, model(Z, T, Condition(None, c.tokens, c.mask, c.pooled, c.time_ids + 16)))
        assert c.pooled is not None
        assert not torch.allclose(out, model(Z, T, Condition(None, c.tokens, c.mask, c.pooled + 1, c.time_ids)))


def test_distilled_flux_gets_its_guidance() -> None:
    net = backbones.flux(guidance_embeds=True)
    c = condition()
    low, high = FluxDenoiser(net, guidance=1.0), FluxDenoiser(net, guidance=4.0)
    with torch.no_grad():
        assert not torch.allclose(low(Z, T, c), high(Z, T, c))
        packed = FluxPipeline._pack_latents(Z, B, 4, 8, 8)
        places = FluxPipeline._prepare_latent_image_ids(B, 4, 4, "cpu", torch.float32)
        text = torch.zeros(5, 3)
        expected = net(packed, c.tokens, c.pooled, T / 1000, places, text, guidance=torch.full((B,), 4.0)).sample
        torch.testing.assert_close(high(Z, T, c), FluxPipeline._unpack_latents(expected, 64, 64, 8))


def test_pixart_for_1024_px_is_told_the_size() -> None:
    net = backbones.pixart(use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24)
    wide = torch.randn(B, 4, 8, 16)
    told = {"resolution": torch.tensor([[64.0, 128.0]] * B), "aspect_ratio": torch.tensor([[0.5]] * B)}
    c = condition()
    expected = net(wide, c.tokens, timestep=T, encoder_attention_mask=c.mask, added_cond_kwargs=told).sample[:, :4]
    torch.testing.assert_close(PixArtDenoiser(net)(wide, T, c), expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_checkpointed_blocks_have_the_same_gradients(name: str) -> None:
    plain, c = denoiser(name).train(), condition()
    checkpointed = denoiser(name, gradient_checkpointing=True).train()
    gradients, runs = [], []
    for model in (plain, checkpointed):
        ran: list[str] = []
        for module in model.backbone.modules():
            if type(module).__name__.endswith(("TransformerBlock", "ResnetBlock2D")):
                module.register_forward_pre_hook(lambda module, _, ran=ran: ran.append(type(module).__name__))
        z = Z.clone().requires_grad_()
        model(z, T, c).square().mean().backward()
        runs.append(len(ran))
        gradients.append([z.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert 0 < runs[0] < runs[1], "blocks are run again in the backward pass"
    assert len(gradients[0]) == len(gradients[1]) > 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BACKBONES)
def test_repeated_blocks_alone_are_compiled(name: str) -> None:
    model = denoiser(name, compile=True)
    compiled = [n for n, m in model.backbone.named_modules() if m._compiled_call_impl is not None]
    blocks = [n for n in compiled if type(model.backbone.get_submodule(n)).__name__.endswith("Block")]
    assert blocks
    assert "" not in compiled
    assert not [n for n in compiled for outer in compiled if n.startswith(f"{outer}.")]
    assert list(model.state_dict()) == list(denoiser(name).state_dict())


def test_of_blocks_inside_blocks_the_outer_ones_are_compiled() -> None:
    model = denoiser("SD3", compile=["JointTransformerBlock", "Attention"])
    compiled = [m for m in model.backbone.modules() if m._compiled_call_impl is not None]
    assert {type(m).__name__ for m in compiled} == {"JointTransformerBlock"}


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    plain, compiled, c = denoiser("SD3"), denoiser("SD3", compile=["JointTransformerBlock"]), condition()
    with torch.no_grad():
        torch.testing.assert_close(plain(Z, T, c), compiled(Z, T, c), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("SD3", "_native_math"), ("UNet (SD 1.5)", "_native_math")])
def test_an_attention_back_end_by_name(name: str, kind: str) -> None:
    """Seen in what the profiler says was run, also where checkpointing runs it again."""
    c = condition()

    def ran(model: Denoiser) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.train()(Z, T, c).mean().backward()
        return {event.key for event in profile.key_averages()}

    flash, plain = "aten::_scaled_dot_product_flash_attention_for_cpu", denoiser(name)
    chosen = denoiser(name, attention=kind, gradient_checkpointing=True)
    if name == "SD3":  # the UNet's masks keep it from that kernel
        assert flash in ran(plain)
    assert flash not in ran(chosen)
    torch.testing.assert_close(plain(Z, T, c), chosen(Z, T, c), atol=1e-5, rtol=1e-4)
    assert copy.deepcopy(chosen)(Z, T, c).shape == Z.shape


def test_an_attention_back_end_that_the_model_dispatches_itself() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = denoiser("Flux", attention="_native_math")
    found = {m.processor._attention_backend for m in model.backbone.modules() if hasattr(m, "processor")}
    assert found == {AttentionBackendName._NATIVE_MATH}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_pipelines_folder_gives_the_backbone_alone(name: str, tmp_path: Path) -> None:
    model = denoiser(name)
    folder = "unet" if isinstance(model, UNetDenoiser) else "transformer"
    model.backbone.save_pretrained(tmp_path / folder)
    (tmp_path / "model_index.json").write_text("{}")
    loaded = type(model)(str(tmp_path), subfolder=folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(loaded.state_dict()[key].dtype))
    assert loaded.backbone.training, "as a module that is built is"
    drawn = type(model)(f"random:{tmp_path}", subfolder=folder)
    assert (model.is_pretrained, loaded.is_pretrained, drawn.is_pretrained) == (False, True, False)
    public = [{k: v for k, v in m.backbone.config.items() if not k.startswith("_")} for m in (drawn, loaded)]
    assert public[0] == public[1]
    own = model.state_dict()
    assert any(not torch.equal(tensor, own[key]) for key, tensor in drawn.state_dict().items())


def test_a_backbone_of_another_class_or_place_is_refused(tmp_path: Path) -> None:
    backbones.sd3().save_pretrained(tmp_path / "transformer")
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: UNetDenoiser(backbones.sd3()),
            ValueError,
            "calls a UNet2DConditionModel, got a SD3Transformer2DModel",
        ),
        (lambda: UNetDenoiser(str(tmp_path), subfolder="transformer"), ValueError, "got a SD3Transformer2DModel"),
        (lambda: UNetDenoiser(str(tmp_path)), FileNotFoundError, "no config.json.*is it in a subfolder"),
        (lambda: UNetDenoiser(str(tmp_path), subfolder="unet"), FileNotFoundError, "in its subfolder 'unet'"),
        (lambda: UNetDenoiser(f"{tmp_path}/nothing"), FileNotFoundError, "`backbone`=.* does not exist"),
        (lambda: UNetDenoiser(backbones.unet(), subfolder="unet"), ValueError, "`backbone` is a module itself"),
        (lambda: UNetDenoiser(backbones.unet(), dtype="half"), ValueError, "`dtype` must be one of"),
        (
            lambda: UNetDenoiser(backbones.unet(), compile=["Block"]),
            ValueError,
            r"no blocks of the classes \['Block'\]",
        ),
        (lambda: UNetDenoiser(backbones.unet(), attention="flash"), ValueError, "`attention`='flash'.*PyTorch's"),
        (lambda: UNetDenoiser(backbones.unet(num_class_embeds=4)), ValueError, "The UNet has num_class_embeds=4"),
        (lambda: SanaDenoiser(backbones.sana(guidance_embeds=True)), ValueError, "distilled Sana"),
        (lambda: SanaDenoiser(backbones.sana(), attention="xformers"), ValueError, "in the place of the linear one"),
        (
            lambda: FluxDenoiser(backbones.flux(axes_dims_rope=(4, 4, 6))),
            ValueError,
            r"`axes_dims_rope`=\[4, 4, 6\] must add up to attention_head_dim = \d+",
        ),
        (lambda: FluxDenoiser(backbones.flux(out_channels=4)), ValueError, "`out_channels`=4 must equal .* = 16"),
        (lambda: UNetDenoiser(backbones.unet(time_cond_proj_dim=8)), ValueError, "The UNet has time_cond_proj_dim=8"),
    ]
    for build, error, message in cases:
        with pytest.raises(error, match=message):
            build()


class Texts(Conditioner):
    """Gives what it is told to."""

    def __init__(self, gives: ConditionShape) -> None:
        super().__init__(0.1)
        self._gives = gives

    @property
    def gives(self) -> ConditionShape:
        return self._gives

    def forward(self, batch: Any, batch_size: int, drop: Tensor | None = None) -> Condition:
        return Condition()


def test_conditions_that_do_not_fit_are_refused() -> None:
    xl = ConditionShape(token_dim=TOKEN_DIM, pooled_dim=POOLED_DIM, time_ids=True)
    cases: list[tuple[str, Conditioner, str]] = [
        ("DiT", Texts(xl), "must be conditioned by ClassLabels, got Texts"),
        ("SD3", ClassLabels(CLASSES), "attends to tokens: condition it by ClassTokens or Captions"),
        ("SD3", Texts(ConditionShape(token_dim=7, pooled_dim=POOLED_DIM)), "`token_dim`=7 .* must be 24.* missing"),
        ("SD3", Texts(ConditionShape(token_dim=TOKEN_DIM)), "`pooled_dim`=None .* must be 20.* missing"),
        ("Sana", ClassTokens(CLASSES, TOKEN_DIM, 9), "takes no pooled vector: leave `pooled_dim` out"),
        ("UNet (SDXL)", ClassTokens(CLASSES, TOKEN_DIM, POOLED_DIM), "set `size_conditions: true`"),
        ("UNet (SDXL)", Texts(ConditionShape(token_dim=TOKEN_DIM, pooled_dim=POOLED_DIM)), "size_conditions"),
    ]
    for name, conditioner, message in cases:
        with pytest.raises(ValueError, match=message):
            denoiser(name).check(4, 8, conditioner)
    for name in ("SD3", "PixArt", "UNet (SD 1.5)", "UNet (SDXL)", "Flux", "Sana"):
        denoiser(name).check(4, 8, Texts(xl))
    with pytest.raises(ValueError, match="takes latents of 4 channels, the autoencoder makes 16"):
        denoiser("Flux").check(16, 8, Texts(xl))
    for name, size in (("Flux", 5), ("UNet (SD 1.5)", 5), ("PixArt", 5)):
        with pytest.raises(ValueError, match="latents are 5 wide, no multiple of 2"):
            denoiser(name).check(4, size, Texts(xl))


def test_another_model_of_diffusers_is_an_adapter_of_a_few_lines() -> None:
    """The one of configs/README.md, against its own call."""
    from conftest import ROOT

    text = (ROOT / "configs" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    names: dict[str, Any] = {}
    exec(code, names)
    from diffusers import AuraFlowTransformer2DModel

    net = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=TOKEN_DIM,
        pos_embed_max_size=16,
    )
    mine: Denoiser = names["AuraFlowDenoiser"](net)
    mine.check(4, 8, ClassTokens(CLASSES, TOKEN_DIM))
    c = condition()
    expected = net(Z, encoder_hidden_states=c.tokens, timestep=T / 1000).sample
    torch.testing.assert_close(mine(Z, T, c), expected)
    assert isinstance(mine, nn.Module)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_trained_weight_gets_a_gradient(name: str) -> None:
    """So that DDP need not look for unused ones."""
    model = denoiser(name)
    model(Z, T, condition()).square().mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
