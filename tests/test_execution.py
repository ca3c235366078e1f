from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from conftest import tiny_kl
from families import FAMILIES
from torch import Tensor, nn

from lpl_lightning import Autoencoder
from lpl_lightning.execution import Execution, StageRunner
from lpl_lightning.stages import Stage

SETTINGS: dict[str, Execution] = {
    "auto": Execution(),
    "channels_first": Execution(channels_last=False, fold_upsampling=True),
    "checkpoint": Execution(checkpoint=True),
}


def gradient(autoencoder: Autoencoder, z: Tensor, runner: StageRunner | None) -> tuple[list[Tensor], Tensor]:
    """Features of a latent and the gradient at it of a fixed function of them."""
    leaf = z.clone().requires_grad_()
    maps = autoencoder.features(leaf, runner=runner)
    (found,) = torch.autograd.grad([m.sin().sum() for m in maps], leaf)
    return maps, found


def held(autoencoder: Autoencoder, z: Tensor, settings: Execution) -> int:
    """Bytes that the graph of the features holds besides the weights."""
    storages: dict[int, int] = {}
    kept = []
    weights = {p.untyped_storage().data_ptr() for p in autoencoder.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.extend(autoencoder.features(z, runner=StageRunner(settings)))
    return sum(storages.values())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_features_and_gradients_are_the_same(name: str, settings: str) -> None:
    autoencoder = Autoencoder(FAMILIES[name].model().double())
    z = torch.randn(FAMILIES[name].z, dtype=torch.float64)
    runner = StageRunner(SETTINGS[settings])
    expected, expected_gradient = gradient(autoencoder, z, None)
    for _ in range(2):
        found, found_gradient = gradient(autoencoder, z, runner)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-8, atol=1e-9)


def test_hooked_modules_run_the_same() -> None:
    torch.manual_seed(0)
    model: Any = tiny_kl().double()
    autoencoder = Autoencoder(
        model, feature_modules=["decoder.mid_block", "decoder.up_blocks.0", "decoder.up_blocks.1"]
    )
    z = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    runner = StageRunner(Execution())
    for found, expected in zip(gradient(autoencoder, z, runner), gradient(autoencoder, z, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert runner._folded._made


def test_channels_last_is_kept_through_the_decoder_and_only_where_asked() -> None:
    for settings, last in ((Execution(), True), (Execution(channels_last=False), False)):
        model: Any = tiny_kl()
        maps = Autoencoder(model).features(torch.randn(1, 4, 4, 4), runner=StageRunner(settings))
        # The first map comes out of an attention, which has channels last either way.
        assert all(m.is_contiguous(memory_format=torch.channels_last) is last for m in maps[1:])
        assert model.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is last


def test_the_encoder_of_a_model_within_another_is_left_as_it_is() -> None:
    whole = nn.ModuleDict({"vae": tiny_kl()})
    runner = StageRunner(Execution())
    runner.prepare(torch.randn(1, 4, 4, 4), whole)
    laid_out = {
        name.split(".")[1]
        for name, parameter in whole.named_parameters()
        if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last) and parameter.shape[2] > 1
    }
    assert laid_out == {"decoder"}


def test_weights_laid_out_in_inference_mode_can_be_used_in_training() -> None:
    autoencoder = Autoencoder(tiny_kl())
    runner = StageRunner(Execution())
    z = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        autoencoder.features(z, runner=runner)
    gradient(autoencoder, z, runner)


def test_a_checkpointed_stage_holds_its_input_alone() -> None:
    """Of each stage's activations only the map that goes into it is held."""
    autoencoder = Autoencoder(tiny_kl())
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    inputs = [z, *autoencoder.features(z)[:-1]]
    bytes_of_inputs = sum(m.numel() * 4 for m in inputs)
    checkpointed = held(autoencoder, z, Execution(checkpoint=True, fold_upsampling=False))
    assert checkpointed <= bytes_of_inputs + 2 * z.numel() * 4
    assert held(autoencoder, z, Execution(fold_upsampling=False)) > 3 * bytes_of_inputs


def test_weights_loaded_later_are_used() -> None:
    torch.manual_seed(0)
    autoencoder, runner = Autoencoder(tiny_kl().double()), StageRunner(Execution())
    z = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    autoencoder.features(z, runner=runner)
    autoencoder.model.load_state_dict(tiny_kl().double().state_dict())
    torch.testing.assert_close(autoencoder.features(z, runner=runner), autoencoder.features(z), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_another_model_in_the_same_place_is_run_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    autoencoder, runner = Autoencoder(tiny_kl().double()), StageRunner(Execution(compile=True))
    z = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    autoencoder.features(z, runner=runner)
    autoencoder.model = tiny_kl().double()
    torch.testing.assert_close(autoencoder.features(z, runner=runner), autoencoder.features(z), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.slow
def test_stages_compiled_in_inference_mode_can_be_used_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of channels so many that convolutions of enlarged maps are folded."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    autoencoder = Autoencoder(tiny_kl(block_out_channels=(128,) * 3))
    runner = StageRunner(Execution(compile=True))
    z = torch.randn(1, 4, 2, 2)
    with torch.inference_mode():
        autoencoder.features(z.clone(), runner=runner)
    for found, expected in zip(gradient(autoencoder, z, runner), gradient(autoencoder, z, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert runner._folded._made


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.slow
def test_stages_are_no_changing_shapes_of_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile takes to change it compiles for all shapes, which is slower, and fails for some decoders."""
    torch._dynamo.reset()
    changing: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        changing.append(any(isinstance(one, torch.SymInt) for one in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    autoencoder, runner = Autoencoder(tiny_kl()), StageRunner(Execution(compile=True))
    gradient(autoencoder, torch.randn(2, 4, 4, 4), runner)
    assert len(changing) > 3
    assert not any(changing)
    gradient(autoencoder, torch.randn(3, 4, 4, 4), runner)
    assert any(changing), "a batch's size does"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
def test_static_stages_are_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than torch.compile keeps versions of one function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    block = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    runner = StageRunner(Execution(compile=True, static_shapes=True))
    torch._dynamo.utils.counters.clear()
    maps = [torch.randn(1, 4, 4, side) for side in range(4, 12)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for z in maps * 2:
            for leaf in (z, z.clone().requires_grad_()):
                torch.testing.assert_close(runner(Stage("block", block), leaf, leaf), block(z))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 * len(maps), "with a gradient and without"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_stages_are_the_stages(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More stages than torch.compile keeps versions of one function, with a gradient and without."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    autoencoder = Autoencoder(tiny_kl(**blocks, block_out_channels=(4,) * 5).double())
    z = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    runner = StageRunner(Execution(compile=True, static_shapes=True))
    expected, expected_gradient = gradient(autoencoder, z, None)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        with torch.no_grad():
            torch.testing.assert_close(autoencoder.features(z, runner=runner), expected, rtol=1e-9, atol=1e-9)
        for _ in range(2):
            found, found_gradient = gradient(autoencoder, z, runner)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-8, atol=1e-9)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert runner._folded._made
    assert counters["stats"]["unique_graphs"] == 2 * len(autoencoder.stages[:-1]), (
        "compiled once with a graph, once without"
    )


CHECKPOINTING = [name for name in FAMILIES if FAMILIES[name].model()._supports_gradient_checkpointing]


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_a_model_that_checkpoints_its_own_blocks_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name].model().double()
    z = torch.randn(FAMILIES[name].z, dtype=torch.float64)
    expected = gradient(Autoencoder(model), z, None)
    runner = StageRunner(Execution())
    gradient(Autoencoder(model), z, runner)
    for switch in (model.enable_gradient_checkpointing, model.disable_gradient_checkpointing):
        switch()
        for settings in (runner, StageRunner(Execution(checkpoint=True))):
            for found, one in zip(gradient(Autoencoder(model), z, settings), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-8, atol=1e-9)


def test_blocks_that_a_model_checkpoints_elsewhere_are_still_run_as_frozen_ones() -> None:
    """Its middle runs its own parts again; blocks that the decoder's ``forward`` would run again are called here."""
    model: Any = tiny_kl()
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    before = held(Autoencoder(model), z, Execution())
    model.enable_gradient_checkpointing()
    assert held(Autoencoder(model), z, Execution()) < 1.1 * before


def test_copies_make_their_own_parts() -> None:
    runner = StageRunner(Execution(chunk_size=3))
    autoencoder = Autoencoder(tiny_kl())
    autoencoder.features(torch.randn(1, 4, 4, 4), runner=runner)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert other.execution == runner.execution
        assert not other._folded._made


def test_settings_are_read_by_name_and_bad_ones_are_named() -> None:
    assert Execution.of(None) == Execution()
    assert Execution.of({"chunk_size": 2, "compile": True}) == Execution(chunk_size=2, compile=True)
    bad: list[tuple[Any, str]] = [
        ({"chunks": 2}, r"`execution` must have settings among streamed, .* got \['chunks'\]"),
        ("fast", "`execution` must be an Execution or settings by name"),
        ({"chunk_size": 0}, "`chunk_size` must be 1 or more"),
        ({"chunk_size": "all"}, "`chunk_size` must be a number of samples or 'auto', got 'all'"),
        ({"chunk_size": 1.5}, "`chunk_size` must be a number of samples"),
        ({"compile": "auto"}, "`compile` must be true or false, got 'auto'"),
        ({"channels_last": "yes"}, "`channels_last` must be true or false or 'auto', got 'yes'"),
    ]
    for value, message in bad:
        with pytest.raises(ValueError, match=message):
            Execution.of(value)
