r"""What does the Latent Perceptual Loss cost? The measurements behind every figure about it.

Time, of a decoder with SDXL's shape and random weights:

    python notebooks/cost.py decoder [--side 128] [--batch 4] [--repeats 5] [--compile] [--example lpl_loss.py]

times the floor (two partial passes of the decoder, the estimate's with a graph, and one for the gradient of its input),
the loss with its gradient in several executions, its outlier mask, and the public example if its file is given. Ways
take turns in one process, forwards and backwards, so that other load meets all alike. "first two s" are two calls
before, with all that is done once, such as compiling. Ratios are of medians and, in brackets, of minima. Floors run on
weights and maps with channels last and on contiguous ones; "/ floor" is over the fastest. The mask's rows are of the
maps that the paper's preset masks, ours in the layout that the default has on this device, the other on contiguous
maps.

Memory, with the same options:

    python notebooks/cost.py memory [...]

prints each way's peak above what is held once weights and latents are there, each in a process of its own, after a call
with a tiny model, which loads libraries. On a CPU memory is what is resident; on a GPU, what tensors take.

Everything around the loss:

    python notebooks/cost.py overhead [--steps 60] [--config configs/quickstart.yaml]

compares steps of the config's run, without LPL and pictures, with those of a loop written by hand. Both load their own
batches. The loop's blocks run inside the one fit, between two of its batches, on a copy of the model: they alternate
within seconds, so that other load meets both, and neither start nor end of a fit counts. A step of ours lasts from
batch end to batch end and so holds all that Lightning, the module, callbacks and loggers do. The first block of each,
and each block's first step, are left out. Ratios are of neighbouring blocks' medians.

Random crops (``subset={"crop": ...}``), whose expectation is near the exact loss:

    python notebooks/cost.py crops [--data FOLDER] [--autoencoder NAME]

prints the bias of loss and gradient, by averaging over all parts that may be drawn, and the share of positions decoded.
Gradients are those of all images as one vector; "a sample's cosine" is of each image's own, the median.
Estimates are latents of images plus normal noise of so many times the latents' standard deviation. FOLDER holds images
or one sub-folder of them a class; by default shapes. Halos that make a window of the whole latent, which is exact, are
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from lpl_lightning import (
    Autoencoder,
    FlowMatching,
    ImageFolderDataModule,
    LatentDiffusionModule,
    LatentPerceptualLoss,
    ShapesDataModule,
)
from lpl_lightning.cli import LPLCLI
from lpl_lightning.execution import Execution
from lpl_lightning.losses.comparison import FINEST, Comparison, Part
from lpl_lightning.losses.options import LossOptions
from lpl_lightning.losses.outliers import odd_kernel, outliers
from lpl_lightning.losses.streaming import stream
from lpl_lightning.losses.subset import Crop, draw_crop

Loss = Callable[[Tensor, Tensor], Tensor]
SDXL, TINY = (128, 256, 512, 512), (32, 32, 32, 32)
DEPTH = 5  # the middle block and four others
REMOVED = ("LPLCallback", "SampleGrid")  # callbacks that the overhead is measured without
LEVELS, HALOS = (0.1, 0.3, 1.0), (0, 2, 4, 8)


@dataclass(frozen=True)
class Way:
    """How a loss is computed.

    Attributes:
        execution: Of our loss; None is the public example.
        checkpointed: Whether the example computes activations again.
    """

    execution: Execution | None = None
    checkpointed: bool = False

    def channels_last(self, device: torch.device) -> bool:
        """Whether weights lie with channels last."""
        if self.execution is None:
            return False
        chosen = self.execution.channels_last
        return device.type == "cpu" if chosen == "auto" else chosen

    def loss(self, model: AutoencoderKL, example: str | None) -> Loss:
        """The mean loss as a function of z0_hat and z0."""
        if self.execution is not None:
            ours = LatentPerceptualLoss(Autoencoder(model), execution=self.execution)
            return lambda z0_hat, z0: ours(z0_hat, z0).mean()
        theirs = runpy.run_path(str(example))["LatentPerceptualLoss"](model, grad_ckpt=self.checkpointed)
        return lambda z0_hat, z0: theirs.get_loss(z0_hat.to(model.dtype), z0.to(model.dtype)).mean()


def ways_of(given: argparse.Namespace, few: bool = False) -> dict[str, Way]:
    """The ways to compare; few are those that differ in memory."""
    cpu = torch.device(given.device).type == "cpu"
    plain = {"channels_last": False, "fold_upsampling": False}
    settings: dict[str, dict[str, Any]] = {"default": {}, "chunks of 1": {"chunk_size": 1}}
    if not few:
        settings[f"fold_upsampling {'off' if cpu else 'on'}"] = {"fold_upsampling": not cpu}
        settings[f"channels_last {'off' if cpu else 'on'}"] = {"channels_last": not cpu}
        if given.compile:
            settings["compiled"] = {"compile": True}
    settings["not streamed"] = {"streamed": False}
    settings["four passes, whole batch"] = {"streamed": False, "checkpoint": True, **plain}
    ways = {name: Way(Execution(**values)) for name, values in settings.items()}
    if given.example:
        ways |= {"example, checkpointed": Way(checkpointed=True), "example": Way()}
    return ways


def build(given: argparse.Namespace, channels_last: bool, channels: tuple[int, ...] = SDXL) -> AutoencoderKL:
    """An autoencoder with random weights, the same each time."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = {"block_out_channels": channels, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32}
    model: Any = AutoencoderKL(down_block_types=down, up_block_types=up, scaling_factor=0.13025, **shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # nn.Module's own `to`: that of diffusers' models warns of float32 parts even where there are none.
    nn.Module.to(model, given.device, getattr(torch, given.dtype)).to(memory_format=layout)
    return model.eval().requires_grad_(False)


def latents(given: argparse.Namespace, batch: int, side: int) -> tuple[Tensor, Tensor]:
    """An estimate and a clean latent."""
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, batch, 4, side // 8, side // 8, generator=generator).to(given.device)
    return z0 + 0.3 * noise, z0


def value_and_gradient(loss: Loss, z0_hat: Tensor, z0: Tensor) -> float:
    """Compute a loss and its gradient at z0_hat."""
    value = loss(z0_hat.detach().requires_grad_(), z0)
    value.backward()
    return value.item()


def floor(
    features: Callable[[Tensor], list[Tensor]], chunk: int, z0_hat: Tensor, z0: Tensor, ones: list[Tensor]
) -> None:
    """Two passes of the decoder and one for the gradient, of given gradients at its maps."""
    for rows in torch.arange(len(z0)).split(chunk):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        with torch.no_grad():
            targets = features(z0[part])  # held, as the loss must
        leaf = z0_hat[part].detach().requires_grad_()
        torch.autograd.grad(features(leaf), leaf, [one[part] for one in ones])
        del targets


def floors(model: AutoencoderKL, layout: str, z0_hat: Tensor, z0: Tensor) -> dict[str, Callable[[], object]]:
    """The floor a sample at a time, and of the whole batch."""
    autoencoder = Autoencoder(model)
    if layout == "channels last":
        z0_hat, z0 = (z.contiguous(memory_format=torch.channels_last) for z in (z0_hat, z0))
    features = partial(autoencoder.features, depth=DEPTH)
    with torch.no_grad():
        ones = [torch.randn_like(phi) for phi in features(z0)]
    sizes = {"chunks of 1": 1, "whole batch": len(z0)}
    return {f"floor, {layout}, {name}": partial(floor, features, n, z0_hat, z0, ones) for name, n in sizes.items()}


def kthvalue_outliers(maps: Tensor, quantile: float, widening: float, dilation: int, erosion: int) -> Tensor:
    """The outlier mask as it is usually written: two kthvalue and two max_pool2d."""
    flat = maps.flatten(2)
    positions = flat.shape[-1]
    lower = flat.kthvalue(max(1, int(quantile * positions)), dim=-1).values[..., None, None]
    upper = flat.kthvalue(max(1, int((1 - quantile) * positions)), dim=-1).values[..., None, None]
    margin = widening * flat.std(dim=-1)[..., None, None]
    inliers = ((lower - margin < maps) & (maps < upper + margin)).to(maps.dtype)
    inliers = F.max_pool2d(inliers, dilation, 1, dilation // 2)
    return -F.max_pool2d(-inliers, erosion, 1, erosion // 2) == 0


def masked_maps(model: AutoencoderKL, z: Tensor) -> list[tuple[Any, ...]]:
    """Arguments of the mask for each map that the paper's preset masks."""
    options = LossOptions.of("paper")
    with torch.no_grad():
        maps = Autoencoder(model).features(z, DEPTH)
    found = []
    for phi in maps:
        if phi.shape[-1] / maps[0].shape[-1] > options.mask_upscale:
            kernels = (
                odd_kernel(options.of_map(name, 0, DEPTH), phi.shape[-1] / (FINEST * options.reference_side))
                for name in ("dilation", "erosion")
            )
            found.append((phi.float(), options.quantile, options.widening, *kernels))
    return found


def masks(models: dict[bool, AutoencoderKL], cpu: bool, z0_hat: Tensor) -> dict[str, Callable[[], object]]:
    """The outlier mask alone, ours and the usual one."""
    ours, usual = masked_maps(models[cpu], z0_hat), masked_maps(models[False], z0_hat)
    for a, b in zip(ours, usual, strict=True):
        differ = (outliers(*a) != kthvalue_outliers(*b)).float().mean().item()
        if differ > 1e-3:  # rounding moves a value over the bound now and then
            raise RuntimeError(f"The two masks differ at {differ:.2%} of positions.")
    return {
        "outlier mask": lambda: [outliers(*a) for a in ours],
        "outlier mask by kthvalue and max_pool2d": lambda: [kthvalue_outliers(*b) for b in usual],
    }


def seconds(run: Callable[[], object], device: str) -> tuple[float, object]:
    """How long a call takes, and what it gives."""
    wait(device)
    start = time.perf_counter()
    found = run()
    wait(device)
    return time.perf_counter() - start, found


def wait(device: str | torch.device) -> None:
    """Wait for an accelerator."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def decoder(given: argparse.Namespace) -> None:
    """Time the floor, the loss in each way and the mask."""
    device = torch.device(given.device)
    models = {last: build(given, last) for last in (True, False)}
    z0_hat, z0 = latents(given, given.batch, given.side)
    runs = {**floors(models[True], "channels last", z0_hat, z0), **floors(models[False], "contiguous", z0_hat, z0)}
    floor_names = list(runs)
    for name, way in ways_of(given).items():
        loss = way.loss(models[way.channels_last(device)], given.example)
        runs[name] = partial(value_and_gradient, loss, z0_hat, z0)
    runs |= masks(models, device.type == "cpu", z0_hat)
    # Twice: a compiled decoder may be compiled anew where the first call has left something behind.
    first = {name: [seconds(run, given.device) for _ in range(2)] for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(given.repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            taken[name].append(seconds(runs[name], given.device)[0])
    fastest = min(floor_names, key=lambda name: median(taken[name]))
    contiguous = min(floor_names[2:], key=lambda name: median(taken[name]))
    over = {"floor": fastest, "contiguous floor": contiguous}
    over |= {name: name for name in ("default", "four passes, whole batch", "example, checkpointed", "example")}
    rows = []
    for name, times in taken.items():
        value = first[name][0][1]
        row: dict[str, Any] = {"way": name, "median s": median(times), "min s": min(times)}
        row["first two s"] = sum(call[0] for call in first[name])
        row["loss"] = value if isinstance(value, float) else ""
        for title, other in over.items():
            if other in taken:
                ratios = median(times) / median(taken[other]), min(times) / min(taken[other])
                row[f"/ {title}"] = f"{ratios[0]:.3f} ({ratios[1]:.3f})"
        rows.append(row)
    report(given, rows, {"seconds": taken, "fastest floors": [fastest, contiguous]})


def resident(kind: str) -> int:
    """Resident bytes of this process: now (``VmRSS``) or at their peak (``VmHWM``)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(kind):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(given: argparse.Namespace, way: Way) -> int:
    """Most bytes held above the start while a loss and its gradient are computed, twice."""
    device = torch.device(given.device)
    tiny = way.loss(build(given, way.channels_last(device), TINY), given.example)
    value_and_gradient(tiny, *latents(given, 1, 32))
    loss = way.loss(build(given, way.channels_last(device)), given.example)
    z0_hat, z0 = latents(given, given.batch, given.side)
    del tiny
    gc.collect()
    wait(device)
    with contextlib.suppress(OSError, AttributeError):  # what is free is not held, and could be used unseen
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):  # forget the peak so far, where the system lets us
            Path("/proc/self/clear_refs").write_text("5")
        start = resident("VmRSS")
    for _ in range(2):
        value_and_gradient(loss, z0_hat, z0)
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")) - start


def memory(given: argparse.Namespace) -> None:
    """Print the peak of each way, each of a process of its own."""
    ways = ways_of(given, few=True)
    if given.way:
        print(peak_of(given, ways[given.way]))
        return
    # An allocator that is set to keep or to map more would change what is resident.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    peaks = {}
    for name in ways:
        command = [sys.executable, *sys.argv, "--way", name]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        peaks[name] = int(done.stdout.split()[-1])
    rows = []
    for name, peak in peaks.items():
        row: dict[str, Any] = {"way": name, "peak above the start, MB": peak / 1e6}
        for other in ("four passes, whole batch", "example, checkpointed", "example"):
            if other in peaks:
                row[f"/ {other}"] = peak / peaks[other]
        row["/ (not streamed / batch)"] = peak / (peaks["not streamed"] / given.batch)
        rows.append(row)
    report(given, rows, {"bytes": peaks})


def bare_loop(
    module: LatentDiffusionModule, data: pl.LightningDataModule, clip: float | None, device: torch.device
) -> Iterator[None]:
    """Train in float32, without Lightning and this package's module: a step each time that it is asked for one.

    Args:
        module: What the networks and the optimizer are taken from.
        data: What the loader is taken from.
        clip: Norm at which gradients are clipped; None clips nothing.
        device: Where it runs.
    """
    if not isinstance(module.noise, FlowMatching):
        raise ValueError(f"The loop written by hand knows FlowMatching alone, got {type(module.noise).__name__}.")
    module.to(device).train()
    vae, conditioner, backbone = module.autoencoder.model, module.conditioner, module.denoiser.backbone
    shift, scale = (x.view(1, -1, 1, 1) for x in (module.autoencoder.shift, module.autoencoder.scale))
    found: Any = module.configure_optimizers()
    optimizer, scheduler = (
        (found["optimizer"], found["lr_scheduler"]["scheduler"]) if isinstance(found, dict) else (found, None)
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loader = data.train_dataloader()
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with torch.no_grad():
            encoded = vae.encode(batch["image"].to(device, non_blocking=True))
            z = encoded.latent_dist.sample() if hasattr(encoded, "latent_dist") else encoded.latents
            z0 = (z - shift) * scale
        t = module.noise.time_distribution(torch.rand(len(z0))).to(device)
        noise = torch.randn_like(z0)
        z_t = (1 - t.view(-1, 1, 1, 1)) * z0 + t.view(-1, 1, 1, 1) * noise
        condition = conditioner(batch, len(z0), torch.rand(len(z0)) < conditioner.dropout)
        velocity = backbone(
            z_t, encoder_hidden_states=condition.tokens, pooled_projections=condition.pooled, timestep=1000 * t
        ).sample
        F.mse_loss(velocity, noise - z0).backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        yield


class Alternate(pl.Callback):
    """Times steps of a run, and between blocks of them as many of the bare loop.

    Args:
        bare: The loop, made once the run's device is known.
        block: Steps of a block.
    """

    def __init__(self, bare: Callable[[torch.device], Iterator[None]], block: int) -> None:
        self.make, self.block = bare, block
        self.bare: Iterator[None] | None = None
        self.ours: list[list[float]] = [[]]
        self.theirs: list[list[float]] = []
        self.last: float | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the time; at the end of a block run one of the bare loop."""
        wait(pl_module.device)
        if self.last is not None:
            self.ours[-1].append(time.perf_counter() - self.last)
        if len(self.ours[-1]) == self.block:
            self.bare = self.bare or self.make(pl_module.device)
            step = partial(next, self.bare)
            self.theirs.append([seconds(step, str(pl_module.device))[0] for _ in range(self.block)])
            self.ours.append([])
        self.last = time.perf_counter()


def overhead(given: argparse.Namespace) -> None:
    """Compare steps of a run without LPL with those of a loop written by hand."""
    config = yaml.safe_load(Path(given.config).read_text())
    trainer = config["trainer"]
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"].split(".")[-1] not in REMOVED]
    # One step before the first block, from whose end it is timed; one block that is left out.
    trainer["max_steps"] = 1 + given.block * (1 + -(-given.steps // given.block))
    with tempfile.TemporaryDirectory() as folder:
        trainer["logger"]["init_args"]["save_dir"] = trainer["default_root_dir"] = folder
        of_any: dict[str, Any] = {"subclass_mode_model": True, "subclass_mode_data": True}
        of_any |= {"auto_configure_optimizers": False, "run": False, "args": config}
        cli: Any = LPLCLI(pl.LightningModule, pl.LightningDataModule, **of_any)
        bare = partial(bare_loop, copy.deepcopy(cli.model), cli.datamodule, cli.trainer.gradient_clip_val)
        alternate = Alternate(bare, given.block)
        cli.trainer.callbacks.append(alternate)
        cli.trainer.fit(cli.model, cli.datamodule)
    pairs = list(zip(alternate.ours, alternate.theirs, strict=False))[1:]
    times = {
        "ours": [[1000 * x for x in ours[1:]] for ours, _ in pairs],
        "bare": [[1000 * x for x in theirs[1:]] for _, theirs in pairs],
    }
    steps = {name: [x for block in blocks for x in block] for name, blocks in times.items()}
    ratios = [median(ours) / median(bare) for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    quarters = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    rows: list[dict[str, Any]] = [
        {"loop": name, "median ms": median(x), "min ms": min(x), "/ bare": median(x) / median(steps["bare"])}
        for name, x in steps.items()
    ]
    rows.append({"loop": f"blocks' ratios, median ({quarters[0]:.3f} to {quarters[2]:.3f})", "/ bare": median(ratios)})
    report(given, rows, {"milliseconds": times, "ratios": ratios})


def images_of(folder: str | None, side: int, count: int) -> Tensor:
    """Images (count, 3, side, side) in [-1, 1]: shapes, or out of a folder from its first to its last."""
    data = (
        ShapesDataModule(side, val_images=count)
        if folder is None
        else ImageFolderDataModule(folder, val_root=folder, image_size=side, verify=False)
    )
    data.prepare_data()
    data.setup("validate")
    found: Any = data.dataset("val")
    return torch.stack([found[i * len(found) // count]["image"] for i in range(count)])


def all_parts(sides: tuple[int, ...], crop: int, halo: int) -> list[Crop]:
    """All that ``draw_crop`` draws from, each as likely; none where the window is the whole latent."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Crop] = {}
    while (drawn := draw_crop(sides, crop, halo, generator=generator)) is not None:
        found[str(drawn)] = drawn
        if len(found) == drawn.parts:
            return list(found.values())
    return []


def crops(given: argparse.Namespace) -> None:
    """Print how far the expectation over random crops is from the exact loss and gradient."""
    autoencoder = Autoencoder(given.autoencoder)
    loss = LatentPerceptualLoss(autoencoder, relative_eps=given.relative_eps)
    comparison = Comparison(loss.options, loss.compared, loss.stages)
    with torch.no_grad():
        images = images_of(given.data, given.latent_side * autoencoder.downscale, given.batch)
        z0 = autoencoder.encode(images, generator := torch.Generator().manual_seed(0))
    noise = torch.randn(z0.shape, generator=generator) * z0.std()

    def measured(z0_hat: Tensor, crop: Crop | None) -> tuple[float, Tensor]:
        part = Part(None, comparison.names, (1.0,) * len(loss.compared), crop)
        found, gradient = stream(autoencoder.features, comparison, z0_hat, z0, [part], chunk_size=8)
        assert gradient is not None
        return found.parts.sum(dim=0).mean().item(), gradient.double()

    titles = ["error", "crop", "halo", "parts", "positions decoded", "bias of loss", "bias of gradient"]
    titles += ["cosine", "a sample's cosine"]
    rows: list[dict[str, Any]] = []
    for level, crop, halo in itertools.product(LEVELS, given.crops, HALOS):
        if not (parts := all_parts(tuple(z0.shape[2:]), crop, halo)):
            continue
        z0_hat = z0 + level * noise
        exact, exact_gradient = measured(z0_hat, None)
        values, gradients = zip(*(measured(z0_hat, part) for part in parts), strict=True)
        gradient = torch.stack(gradients).mean(dim=0)
        bias = (gradient - exact_gradient).norm() / exact_gradient.norm()
        cosines = [
            torch.cosine_similarity(gradient.flatten(axis), exact_gradient.flatten(axis), dim=axis).median().item()
            for axis in (0, 1)
        ]
        found = (len(parts), parts[0].enlarged ** -2, sum(values) / len(values) / exact - 1, bias.item(), *cosines)
        rows.append(dict(zip(titles, (level, crop, halo, *found), strict=True)))
    report(given, rows, {"latents": list(z0.shape)})


def report(given: argparse.Namespace, rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Print what was found as a table, and write all of it to a file if one is given."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}
    settings = {name: value for name, value in vars(given).items() if name not in ("run", "way", "json", "example")}
    print(", ".join(f"{name} {value}" for name, value in (settings | machine).items() if value is not None) + "\n")
    titles = list(rows[0])
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        cells = (row.get(title, "") for title in titles)
        print(f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    if given.json:
        found = {"settings": settings, "machine": machine, "rows": rows, **more}
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (decoder, memory, overhead, crops):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--json", help="file to write everything to")
        if run in (decoder, memory):
            command.add_argument("--side", type=int, default=128, help="of the images, in pixels")
            command.add_argument("--batch", type=int, default=4)
            command.add_argument("--repeats", type=int, default=5)
            command.add_argument("--device", default="cpu")
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
            command.add_argument("--compile", action="store_true", help="time the compiled decoder too")
            command.add_argument("--example", help="the public example's lpl_loss.py")
            command.add_argument("--way", help=argparse.SUPPRESS)
        elif run is overhead:
            command.add_argument("--steps", type=int, default=60, help="of each loop")
            command.add_argument("--block", type=int, default=6, help="steps of one loop in a row")
            command.add_argument("--config", default="configs/quickstart.yaml")
        else:
            command.add_argument("--data", help="folder of images; by default shapes")
            command.add_argument("--autoencoder", default="embedded:autoencoder_shapes")
            command.add_argument("--batch", type=int, default=8, help="images")
            command.add_argument("--relative_eps", type=float, default=0.0, help="of the loss")
            command.add_argument("--latent_side", type=int, default=32)
            command.add_argument("--crops", type=int, nargs="+", default=[16, 8], help="sides, in latent positions")
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
