"""The study of what LPL does to small models of photos: which are trained, and what measures them.

    python notebooks/study.py plan main                        # the commands of an experiment, to be run by hand
    python notebooks/study.py run main depth --photos PHOTOS --squeezenet squeezenet1_0.pth
    python notebooks/study.py run ceilings --photos PHOTOS --squeezenet squeezenet1_0.pth --autoencoder taesd
    python notebooks/study.py run thin --profile ...           # the steps' cost too
    python notebooks/study.py compare                          # with LPL against without, run by run
    python notebooks/study.py collect                          # what has been measured so far, as notebooks/*.csv
    python notebooks/study.py table                            # with LPL against without, over seeds
    python notebooks/study.py grid                             # images of the same seeds, as notebooks/results_grid.png

PHOTOS has ``train`` and ``val``, each with a folder a class. The autoencoder is the one that lies beside this file,
unless ``--anew`` asks for one of your own. ``run`` makes what is missing and nothing twice: stopped and called again,
it goes on, also within a training. ``--pretraining 1`` starts from models that were pre-trained with another seed, in a
folder beside ``--out``. ``--scale gpu`` lays ``configs/study/gpu.yaml`` over all models, ``--scale gpu-128``
``configs/study/imagenette.yaml`` too, for photos of 128 px in an ``--out`` of their own, ``--jobs 8`` runs so many
commands at a time, as many small models as it takes to fill a GPU, and ``--minutes 9`` begins none later.
Commands run in the repository's folder, with ``PYTHONPATH=notebooks``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SPECTRA, DIFFERENCES = (ROOT / "notebooks" / f"{name}.csv" for name in ("results", "spectra", "differences"))
GRID = ROOT / "notebooks" / "results_grid.png"
AUTOENCODER = ROOT / "notebooks" / "autoencoder"
BASE = "configs/study/mmdit.yaml"
SEEDS = (1, 2, 3)
LOGGED = ("loss_diffusion", "gate_share", "lpl_weight", "lpl_gradient_ratio", "lpl_variance_ratio", "lpl_masked")
"""Beginnings of names of what is collected from the trainings' logs, too."""
PRELOADED = ["lightning.pytorch", "torchvision", "diffusers", "lpl_lightning.cli"]
PROCESSES = ("flow", "ddpm_v", "ddpm_epsilon")
OTHERS = {
    "dit": ("configs/flow.yaml", "configs/study/dit.yaml"),
    "taesd3": ("configs/flow.yaml", "configs/study/taesd3.yaml"),
    "taesd": ("configs/flow.yaml", "configs/study/taesd.yaml"),
}
"""Config files of models that are not the MMDiT on the study's autoencoder, by what stands in a process's place."""
TINY = ("taesd3", "taesd")
"""Of these, the ones on another autoencoder, whose folder an option of that name gives."""


@dataclass(frozen=True)
class Setting:
    """How a run's images are made.

    Attributes:
        images: How many.
        ema: Decay of the average of the weights that is measured, or ``trained`` for the weights as they were trained.
        num_steps: Of sampling.
        guidance: Scale of classifier-free guidance; 1 is none.
    """

    images: int
    ema: str
    num_steps: int
    guidance: float = 2.0

    @classmethod
    def of(cls, report: dict[str, Any]) -> Setting:
        """That of a report's images."""
        made = report["generation"]
        return cls(report["images"]["count"], str(made["ema"] or "trained"), made["num_steps"], made["guidance_scale"])

    def __str__(self) -> str:
        """As names of tasks and comparisons say it."""
        usual = f"{self.images}-{self.ema}-{self.num_steps}"
        return usual if self.guidance == 2 else f"{usual}-guidance-{self.guidance:g}"


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        pretrain: Optimizer steps before.
        steps: Of post-training.
        short: Of post-training where one choice is compared with others.
        setting: How images are made, unless that is what is compared.
        choice: How they are made where one choice is compared with others.
        fewer: The same where that is done for several averages or numbers of sampling steps, too.
        overlays: Config files that are laid over the models'.
        side: Of the photos, in pixels.
        pretraining: Seed of the trainings before.
    """

    pretrain: int
    steps: int
    short: int
    setting: Setting
    choice: Setting
    fewer: Setting
    overlays: tuple[str, ...] = ()
    side: int = 64
    pretraining: int = 0


SCALES = {
    "cpu": Scale(
        4000,
        500,
        250,
        setting=Setting(5000, "0.995", 10),
        choice=Setting(5000, "0.99", 10),
        fewer=Setting(2000, "0.99", 10),
    ),
    "gpu": Scale(10000, 3000, 1500, *3 * (Setting(10000, "0.995", 50),), ("configs/study/gpu.yaml",)),
}
SCALES["gpu-128"] = replace(
    SCALES["gpu"], side=128, overlays=(*SCALES["gpu"].overlays, "configs/study/imagenette.yaml")
)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of its folder.
        process: Overlay of the noise process, or one of ``OTHERS``.
        seed: Of all that is drawn.
        steps: Optimizer steps.
        start: Optimizer step of pre-training that it starts from; None from scratch.
        loss: Options of ``LatentPerceptualLoss``; None trains without it.
        callback: Options of ``LPLCallback``.
        rival: Overlay that is laid over in the place of LPL's.
        options: Further ones of the command line.
        at: Optimizer step after which it is measured; None for the last.
        settings: How images are made; none for the scale's.
    """

    name: str
    process: str
    seed: int
    steps: int
    start: int | None = None
    loss: dict[str, Any] | None = None
    callback: dict[str, Any] = field(default_factory=dict)
    rival: str | None = None
    options: tuple[str, ...] = ()
    at: int | None = field(default=None, compare=False)
    settings: tuple[Setting, ...] = field(default=(), compare=False)


def pretrained(process: str, scale: Scale) -> Run:
    """What the others start from."""
    return Run(f"pretrain-{process}", process, scale.pretraining, scale.pretrain)


def post(scale: Scale, name: str, process: str = "flow", seed: int = 1, **options: Any) -> Run:
    """A post-training; without LPL unless ``loss`` is given."""
    defaults = {"start": scale.pretrain, "steps": scale.steps}
    return Run(f"{process}-{name}-{seed}", process, seed, **(defaults | options))


def experiments(scale: Scale) -> dict[str, list[Run]]:
    """All of them, by name; runs of the same name are one."""
    by_50 = replace(scale.setting, num_steps=50)
    losses = {"none": None, "lpl": {}}
    pair = [post(scale, name, loss=loss) for name, loss in losses.items()]

    def short(name: str, process: str = "flow", seed: int = 1, **options: Any) -> Run:
        """A post-training where one choice is compared with others."""
        found = post(scale, name, process, seed, **({"steps": scale.short} | options))
        return replace(found, settings=(scale.choice,))

    def briefly(process: str = "flow", seed: int = 1) -> list[Run]:
        """What choices are compared with."""
        return [short(f"{name}-short", process, seed, loss=loss) for name, loss in losses.items()]

    def variants(values: dict[str, dict[str, Any]]) -> list[Run]:
        return [*briefly(), *(short(name, **({"loss": {}} | given)) for name, given in values.items())]

    def choose(name: str, key: str, values: list[Any]) -> dict[str, dict[str, Any]]:
        return {f"{name}-{value}": {"loss": {key: value}} for value in values}

    floors = choose("relative-eps", "relative_eps", [0.0, 0.01, 1.0])
    thresholds = choose("threshold", "threshold", [0.5, 1.0, 6.0, 20.0, 1e6])
    modes = choose("statistics", "statistics", ["predicted_detached", "target", "separate", "none"])
    weights = choose("depth-weights", "depth_weights", ["exponential", "uniform"])
    shares = {f"share-{share}": {"loss": {}, "callback": {"target_share": share}} for share in (0.05, 0.1, 0.4, 0.6)}
    fixed = {  # the weight that `auto` finds for LPL as it is, from the same step on
        f"weight-0.2-{name}": {"loss": loss, "callback": {"weight": 0.2, "start_step": scale.short // 5}}
        for name, loss in {
            "threshold-1.0": {"threshold": 1.0},
            "threshold-6.0": {"threshold": 6.0},
            "depth-1": {"depth": 1},
        }.items()
    }
    thin = {
        "keep-0.25": {"callback": {"loss": {"subset": {"keep": 0.25}}}},
        "every-4": {"callback": {"every_n_steps": 4}},
        "budget-0.15": {"callback": {"budget": 0.15}},
    }
    steps = tuple(replace(scale.fewer, num_steps=count) for count in (5, 10, 20, 50))
    decays = tuple(replace(scale.fewer, ema=decay) for decay in ("trained", "0.99", "0.995", "0.998", "0.999"))
    early = scale.pretrain // 4
    start = replace(pretrained("flow", scale), at=early, settings=(scale.choice,))

    main = [
        post(scale, name, process, seed, loss=loss)
        for process in PROCESSES
        for seed in SEEDS
        for name, loss in losses.items()
    ]
    found = {
        "main": main,
        "main_by_50": [replace(one, settings=(by_50,)) for one in main],
        **{
            name: [replace(one, settings=(scale.choice, steps[-1])) for one in others]
            for name, others in {
                "dit": briefly("dit"),
                "taesd": briefly("taesd"),
                "taesd3": [
                    *(run for seed in SEEDS[:2] for run in briefly("taesd3", seed)),
                    *(short(name, "taesd3", **given) for name, given in floors.items()),
                    short("relative-eps-0.0", "taesd3", seed=2, loss={"relative_eps": 0.0}),
                    short("share-0.1", "taesd3", **shares["share-0.1"]),
                ],
                "min_snr": [
                    short(f"min-snr-{name}", "ddpm_v", loss=loss, options=("--model.noise.min_snr_gamma=5",))
                    for name, loss in losses.items()
                ],
                "relative_eps": variants(choose("relative-eps", "relative_eps", [0.1])),
            }.items()
        },
        "statistics": variants(modes),
        "depth": variants(choose("depth", "depth", [1, 2, 3])),
        "depth_weights": variants(weights),
        "threshold": variants(thresholds),
        "weight": variants(shares),
        "fixed": variants(fixed),
        "share": [
            replace(post(scale, "share-0.1", process, **shares["share-0.1"]), settings=(by_50,))
            for process in PROCESSES[1:]
        ],
        "mask": variants(choose("mask", "mask_outliers", [False])),
        "rivals": [
            *variants({"rgb": {"loss": {"preset": "rgb"}}}),
            *(short(name, rival=name) for name in ("decoded", "denoiser")),
        ],
        "thin": [*variants(thin), replace(short("tiny", rival="tiny"), settings=(scale.choice, steps[-1]))],
        "start": [
            *briefly(),
            *(
                short(f"{name}-from-{begin}", loss=loss, start=begin)
                for begin in (early, 2 * early)
                for name, loss in losses.items()
            ),
        ],
        "sampling": [
            replace(one, settings=steps if seed == SEEDS[0] else steps[-1:])
            for seed in SEEDS
            for one in briefly(seed=seed)
        ]
        + [replace(short("none-longer", seed=seed, steps=3 * scale.short), settings=steps[-1:]) for seed in SEEDS]
        + [replace(short(name, **given), settings=steps[-1:]) for name, given in (modes | shares | thresholds).items()],
        "guidance": [
            *(
                replace(one, settings=tuple(replace(steps[-1], guidance=scale) for scale in (1.0, 2.0, 3.0, 5.0)))
                for one in briefly()
            ),
            *(
                replace(one, settings=(replace(by_50, guidance=1.0), by_50))
                for one in main
                if (one.process, one.seed) == ("ddpm_epsilon", SEEDS[0])
            ),
        ],
        "averages": [replace(one, settings=decays) for one in pair],
        "scratch": [start, replace(start, name="flow-lpl-scratch", loss={}, steps=early)],
        "longer": [
            run
            for seed in SEEDS
            for run in (
                *briefly(seed=seed),
                *(replace(short("none-longer", seed=seed, steps=3 * scale.short), at=n * scale.short) for n in (2, 3)),
            )
        ],
    }
    return found


def overlays(run: Run, scale: Scale) -> list[str]:
    """Config files of a run, in their order."""
    of_process = OTHERS.get(run.process, (f"configs/{run.process}.yaml",))
    files = [BASE, *of_process, *scale.overlays]
    added = run.rival if run.rival is not None else "lpl" if run.loss is not None else None
    return [*files, *([f"configs/study/{added}.yaml"] if added else [])]


def fit(run: Run, scale: Scale, given: argparse.Namespace) -> list[str]:
    """The command that trains it."""
    out = given.out
    words = ["lpl", "fit", *(word for file in overlays(run, scale) for word in ("-c", file))]
    words += [f"--seed_everything={run.seed}", f"--trainer.max_steps={run.steps}", "--ckpt_path=last"]
    words += [f"--trainer.logger.init_args.save_dir={out}", f"--trainer.logger.init_args.name={run.name}"]
    words += ["--trainer.enable_progress_bar=false", f"--data.root={latents(out, run.process)}"]
    words += [f"--model.autoencoder.model={decoder(given, run.process)}"]
    kept = scale.pretrain // 4 if run.start is None else scale.short // 2
    rules: dict[str, Any] = {"lightning.pytorch.callbacks.ModelCheckpoint": {"every_n_train_steps": kept}}
    if run.start is not None:
        words.append(f"--model.weights={checkpoint(pretrained(run.process, scale), out, run.start)}")
    if run.loss is not None:
        callback = {key: value for key, value in run.callback.items() if key != "loss"}
        rules["lpl_lightning.LatentPerceptualLoss"] = {**run.loss, **run.callback.get("loss", {})}
        rules["lpl_lightning.LPLCallback"] = callback
    if run.rival is not None:
        rules |= {"STUDY_AUTOENCODER": str(decoder(given, run.process)), "squeezenet1_0.pth": str(given.squeezenet)}
        rules |= {"STUDY_DENOISER": str(checkpoint(pretrained(run.process, scale), out))}
    return [*words, f"--stand_ins={json.dumps({name: value for name, value in rules.items() if value})}", *run.options]


def checkpoint(run: Run, out: Path, step: int | None = None) -> Path:
    """What a run has left at a step, by default the one that is measured. A run goes on in another folder."""
    name = f"checkpoints/step={step or run.at or run.steps}.ckpt"
    found = [folder / name for folder in versions(out / run.name) if (folder / name).is_file()]
    return found[-1] if found else out / run.name / "version_0" / name


def versions(folder: Path) -> list[Path]:
    """What a run has left each time that it was begun or went on, in this order."""
    return sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def autoencoder(photos: Path, out: Path) -> list[str]:
    """The command that trains the autoencoder."""
    words = ["lpl", "fit", "-c", "configs/study/autoencoder.yaml", "--ckpt_path=last"]
    words += [f"--data.root={photos / 'train'}", f"--data.val_root={photos / 'val'}"]
    return [*words, f"--trainer.logger.init_args.save_dir={out}", "--trainer.enable_progress_bar=false"]


def encode(process: str, given: argparse.Namespace) -> list[str]:
    """The command that makes the latents."""
    words = ["lpl", "encode", *(word for file in (BASE, *OTHERS.get(process, ())) for word in ("-c", file))]
    words += ["--data=lpl_lightning.data.ImageFolderDataModule", f"--data.root={given.photos / 'train'}"]
    words += [f"--data.val_root={given.photos / 'val'}", "--data.horizontal_flip=true"]
    words += [f"--data.image_size={SCALES[given.scale].side}"]
    words += [f"--model.autoencoder.model={decoder(given, process)}", "--data.batch_size=64"]
    return [*words, f"--out={latents(given.out, process)}"]


def latents(out: Path, process: str) -> Path:
    """Folder of the latents."""
    return out / (f"latents-{process}" if process in TINY else "latents")


def encoded(folder: Path) -> bool:
    """Whether all latents are there: the manifest is, from the first of them on."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["finished"] is True


def decoder(given: argparse.Namespace, process: str = "") -> Path:
    """Folder of the autoencoder."""
    if process in TINY:
        return Path(getattr(given, process))
    if not given.anew:
        return AUTOENCODER
    found = [folder / "autoencoder" for folder in versions(given.out / "autoencoder")]
    ended = [folder for folder in found if folder.is_dir()]
    return ended[-1] if ended else given.out / "autoencoder" / "version_0" / "autoencoder"


def test(run: Run, scale: Scale, given: argparse.Namespace, split: str, setting: Setting) -> list[str]:
    """The command that measures a run against one of the two sets of photos."""
    files = overlays(replace(run, loss=None, rival=None), scale)
    words = ["lpl", "test", *(word for file in files for word in ("-c", file))]
    words += [f"--ckpt_path={checkpoint(run, given.out)}", f"--ema={setting.ema}"]
    words += [f"--data.root={latents(given.out, run.process)}"]
    words += [f"--model.autoencoder.model={decoder(given, run.process)}"]
    words += ["--evaluation.suite=configs/study/metrics.yaml"]
    words += [f"--evaluation.reference={given.photos / split}", f"--evaluation.num_images={setting.images}"]
    words += [f"--stand_ins={json.dumps({'squeezenet1_0.pth': str(given.squeezenet)})}"]
    words += [f"--model.sampler.num_steps={setting.num_steps}", f"--model.sampler.guidance_scale={setting.guidance}"]
    return [*words, "--trainer.enable_progress_bar=false", *run.options]


def ceiling(model: Path, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The commands that make what an autoencoder gives back of the photos, and that measure it."""
    folder, photos = given.out / "reconstructed", given.photos / "val"
    made = ["python", "notebooks/reconstruct.py", str(photos), str(folder / model.name), f"--model={model}"]
    words = ["lpl", "evaluate", f"--images={folder / model.name}", f"--reference={photos}"]
    words += [f"--suite={folder / 'metrics.yaml'}", f"--out={given.out / f'ceiling-{model.name}'}"]
    return [*made, f"--values={folder / f'{model.name}.json'}"], words


def profile(run: Run, scale: Scale, given: argparse.Namespace) -> list[str]:
    """The command that measures what a step of a run costs, against one without LPL."""
    words = fit(run, scale, given)
    kept = [word for word in words[2:] if not word.startswith("--ckpt_path")]
    return ["lpl", "profile", *kept, "--steps=5", f"--output={given.out / f'{run.name}.json'}"]


def reports(out: Path) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """Run, contents and folder of each report there is."""
    found = [*out.glob("*/version_*/evaluation/*/*/report.json"), *out.glob("ceiling-*/report.json")]
    for path in sorted(found):
        yield path.relative_to(out).parts[0], json.loads(path.read_text()), path.parent


def tested(out: Path) -> set[tuple[Any, ...]]:
    """Of each report there is, the run, its step, the photos and how images were made."""
    found = set()
    for name, report, _ in reports(out):
        if made := report["generation"]:
            found.add((name, made["global_step"], report["reference"]["name"], Setting.of(report)))
    return found


@dataclass(frozen=True)
class Task:
    """A command to be run.

    Attributes:
        name: Of its log.
        words: What gives the command, once those that it needs have ended: it names files of theirs.
        needs: Names of tasks that have to end before.
        alone: Whether nothing may run beside it.
    """

    name: str
    words: Callable[[], list[str]]
    needs: tuple[str, ...] = ()
    alone: bool = False


def tasks(runs: Iterable[Run], scale: Scale, given: argparse.Namespace) -> Iterator[Task]:
    """What is missing of runs, each task once for each time that a run asks for it."""
    out, known = given.out, tested(given.out)
    for run in runs:
        yield from prepare(run.process, given)
        before = pretrained(run.process, scale)
        made = (f"fit-{before.name}", "encode", f"encode-{run.process}")
        for one in [before, run] if run.start is not None else [run]:
            if not checkpoint(one, out).is_file():
                yield Task(f"fit-{one.name}", partial(fit, one, scale, given), made[one == before :])
        for setting in run.settings or (scale.setting,):
            step, last = run.at or run.steps, f"fit-{run.name}"
            # One split after the other: the second measures the images of the first.
            for split in given.against:
                said = f"test-{run.name}-{step}-{setting}-{split}"
                if (run.name, step, str(given.photos / split), setting) not in known:
                    yield Task(said, partial(test, run, scale, given, split, setting), (last,))
                last = said
        # A budget asks for its cost, and a profile is of what LPL costs before one is applied.
        compared = (run.loss is not None or run.rival) and run.seed == SEEDS[0] and "budget" not in run.callback
        if given.profile and compared and not (out / f"{run.name}.json").is_file():
            yield Task(f"profile-{run.name}", partial(profile, run, scale, given), made, alone=True)


def prepare(process: str, given: argparse.Namespace) -> Iterator[Task]:
    """What is missing of the autoencoder and the latents."""
    if process not in TINY and not decoder(given, process).is_dir():
        yield Task("autoencoder", partial(autoencoder, given.photos, given.out))
    if not encoded(latents(given.out, process)):
        name = latents(given.out, process).name.replace("latents", "encode")
        yield Task(name, partial(encode, process, given), ("autoencoder",))


def ceilings(given: argparse.Namespace) -> Iterator[Task]:
    """The same for autoencoders: the study's, and others."""
    yield from prepare("flow", given)
    for path in (None, *given.autoencoder):
        name = (path or decoder(given)).name
        found = partial(lambda path: ceiling(path or decoder(given), given), path)
        if not (given.out / "reconstructed" / f"{name}.json").is_file():
            yield Task(f"reconstruct-{name}", partial(lambda found: found()[0], found), ("autoencoder",))
        if not (given.out / f"ceiling-{name}" / "report.json").is_file():
            yield Task(f"evaluate-{name}", partial(lambda found: found()[1], found), (f"reconstruct-{name}",))


def others(name: str) -> dict[str, tuple[str, ...]]:
    """The runs that one is compared with, the first that there is of each, by how the comparison's name ends.

    One with LPL, with that without; one with a choice of its own, with LPL as it is and with none.
    """
    process, *kind, seed = name.split("-")
    if not kind:  # of a pre-training
        return {}
    if "lpl" in kind:
        return {"": (f"pretrain-{process}" if seed == "scratch" else name.replace("-lpl", "-none"),)}
    if kind[0] == "none" and "longer" not in kind:
        return {}
    ends = {"": "lpl", "-none": "none"}
    return {end: (f"{process}-{which}-short-{seed}", f"{process}-{which}-{seed}") for end, which in ends.items()}


def comparisons(out: Path) -> Iterator[Task]:
    """What compares each run with its other ones, made and measured alike, where that has not been done.

    After as many steps; one that went on for longer than there is of the other, with the last of it.
    """
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for name, report, folder in reports(out):
        if made := report["generation"]:
            setting = f"{Setting.of(report)}-{Path(report['reference']['name']).name}"
            found.setdefault((name, setting), {})[made["global_step"]] = folder
    for (name, setting), folders in found.items():
        for end, names in others(name).items():
            against = next((found[one, setting] for one in names if (one, setting) in found), {})
            for step, folder in folders.items():
                said = f"{name}-{step}-{setting}{end}"
                baseline = against.get(step, against[max(against)] if against and "longer" in name else None)
                if baseline and not (out / "comparisons" / said / "comparison.json").is_file():
                    words = ["lpl", "compare", f"--runs=[{baseline},{folder}]", f"--out={out / 'comparisons' / said}"]
                    yield Task(f"compare-{said}", partial(list, words))


def work(todo: list[Task], out: Path, jobs: int, minutes: float) -> None:
    """Run commands, so many at a time, each as soon as those that it needs have ended, in this order otherwise.

    One that fails takes with it those that need it. All are forks of one process that has imported everything. Stopped
    by a signal, it hands that on, so that trainings save themselves.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: dict[Any, Task] = {}
    failed: list[str] = []
    end = time.monotonic() + 60 * minutes
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while todo or running:
            if time.monotonic() > end:
                todo = []
            waited_for = {task.name for task in [*todo, *running.values()]}
            for task in list(todo):
                full = len(running) >= (1 if task.alone else jobs) or any(task.alone for task in running.values())
                if any(need in failed for need in task.needs):
                    failed.append(task.name)
                    todo.remove(task)
                elif not full and waited_for.isdisjoint(task.needs):
                    todo.remove(task)
                    words = task.words()
                    print(shlex.join(words), flush=True)
                    process = context.Process(target=execute, args=(words, out / "logs" / f"{task.name}.log"))
                    process.start()
                    running[process] = task
            connection.wait([process.sentinel for process in running], timeout=1.0)
            for process in [process for process in running if process.exitcode is not None]:
                task = running.pop(process)
                if process.exitcode:
                    print(f"{task.name} ended with {process.exitcode}: see {out / 'logs' / task.name}.log", flush=True)
                    failed.append(task.name)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    if failed:
        sys.exit(f"These failed, or need one that did: {', '.join(failed)}. See {out / 'logs'}.")


def execute(words: list[str], log: Path) -> None:
    """Run a command in this process; what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "notebooks"))
    if words[0] == "python":
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
        return
    sys.argv = words
    from lpl_lightning.cli import main as lpl

    lpl()


def logged(out: Path) -> Iterator[tuple[str, int, str, float]]:
    """Run, last step, name and mean over the second half of post-training of each value of ``LOGGED`` there is.

    Of trainings that have been measured; the log of another may end anywhere.
    """
    measured = {name for name, *_ in reports(out)}
    for folder in sorted({path.parent.parent for path in out.glob("*/version_*/metrics.csv")}):
        if folder.name.count("-") < 2 or folder.name not in measured:  # pre-training, the autoencoder, or unfinished
            continue
        values: dict[str, dict[int, float]] = {}
        for version in versions(folder):  # later ones go on, and may repeat steps
            if not (version / "metrics.csv").is_file():
                continue
            with (version / "metrics.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    for name in filter(lambda name: name.startswith(LOGGED) and row[name], row):
                        values.setdefault(name, {})[int(row["step"])] = float(row[name])
        for name, by_step in sorted(values.items()):
            half = [value for step, value in by_step.items() if 2 * step >= max(by_step)]
            # What was not drawn between two log entries is not a number.
            if drawn := [value for value in half if math.isfinite(value)]:
                yield folder.name, max(by_step), f"log_{name}", sum(drawn) / len(drawn)


def collect(out: Path) -> None:
    """Write reports, logs and costs as tables: a row a value, and a row a frequency of a spectrum.

    What the tables hold stays in them, but for values that have been measured anew: of the same run of a folder of the
    same name, made and measured alike.
    """
    rows, spectra = [], []
    for name, report, folder in reports(out):
        made = report["generation"] or dict.fromkeys(("global_step", "ema", "num_steps", "guidance_scale"))
        setting = [name, made["global_step"], made["ema"], made["num_steps"], made["guidance_scale"]]
        against = [report["images"]["count"], Path(report["reference"]["name"]).name, report["reference"]["count"]]
        rows += [[*setting, *against, value, found["value"]] for value, found in report["values"].items()]
        if against[1] == "val" and (folder / "spectra.csv").is_file() and made["num_steps"]:
            heads, *by_frequency = csv.reader((folder / "spectra.csv").read_text().splitlines())
            spectra += [[*setting, against[0], *values] for values in by_frequency]
    for path in sorted((out / "reconstructed").glob("*.json")):
        for value, number in json.loads(path.read_text()).items():
            rows.append([f"ceiling-{path.stem}", *[None] * 5, "val", None, f"reconstruction_{value}", number])
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text())
        ratio = found["average_step_s"] / found["blocks"][0]["step_s"]
        rows.append([path.stem, *[None] * 7, "step_time_over_none", ratio])
    rows += [[name, step, *[None] * 6, value, number] for name, step, value, number in logged(out)]
    of = ["run", "step", "ema", "num_steps", "guidance"]
    compared = []
    for path in sorted((out / "comparisons").glob("*/comparison.json")):
        for value, row in json.loads(path.read_text())["rows"].items():
            for cell in row["cells"].values():
                if cell["difference"] is not None:
                    interval = cell["difference_interval"] or {"low": None, "high": None}
                    of_value = [cell["difference"], interval["low"], interval["high"], cell["verdict"]]
                    compared.append([path.parent.name, value, *of_value])
    # With how many of the columns say which value a row has.
    tables = [(RESULTS, 9, [*of, "images", "against", "photos", "value", "is"], rows)]
    tables += [(SPECTRA, 7, [*of, "images", *heads], spectra)] if spectra else []
    heads = ["comparison", "value", "difference", "low", "high", "verdict"]
    tables += [(DIFFERENCES, 2, heads, compared)] if compared else []
    for path, keys, head, body in tables:
        kept: list[list[str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                _, *kept = csv.reader(file)
        by_value = {}
        for row in [*kept, *([out.name, *row] for row in body)]:
            words = ["" if word is None else str(word) for word in row]
            by_value[tuple(words[: 1 + keys])] = words
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["folder", *head])
            writer.writerows(by_value.values())


def table(path: Path, first: str = "none", second: str = "lpl") -> str:
    """Runs with LPL against those without, paired by seed, from what was collected.

    Differences have 95 % intervals of Student's t over seeds: where the mean over post-trainings lies, where those of
    ``lpl compare`` say what other images of the same model would give. A value of one seed alone has none.
    """
    from scipy import stats  # of the extra `dev`: machines that only train need it not

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        process, name, seed = row["run"].rsplit("-", 2) if row["run"].count("-") == 2 else ("", "", "")
        if process in PROCESSES and name in (first, second):
            made = (row[key] for key in ("against", "images", "ema", "num_steps", "guidance", "value"))
            kind = (row["folder"], process, *made)
            found.setdefault(kind, {})[f"{name} {seed}"] = float(row["is"])
    heads = ("folder", "process", "against", "steps", "value", "seeds", first, second, "difference", "")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (folder, process, against, _, _, steps, _, value), of_runs in sorted(found.items()):
        seeds = sorted(
            seed for name, seed in map(str.split, of_runs) if name == first and f"{second} {seed}" in of_runs
        )
        if not seeds:
            continue
        one, other = ([of_runs[f"{name} {seed}"] for seed in seeds] for name in (first, second))
        means = sum(one) / len(one), sum(other) / len(other)
        said = ""
        if len(seeds) > 1:
            interval = stats.ttest_rel(other, one).confidence_interval(0.95)
            said = f"[{interval.low:.4g}, {interval.high:.4g}]"
        numbers = f"{means[0]:.4g} | {means[1]:.4g} | {means[1] - means[0]:+.4g} {said}"
        share = f"{100 * (means[1] / means[0] - 1):+.1f} %" if means[0] else ""
        lines.append(f"| {folder} | {process} | {against} | {steps} | {value} | {len(seeds)} | {numbers} | {share} |")
    return "\n".join(lines)


def grid(out: Path, scale: Scale, columns: int = 8, gap: int = 2) -> None:
    """Draw the first images of the main comparison's first seed.

    Of each process four rows: by 10 and by 50 sampling steps, without LPL and with it. A column has one seed and class.
    """
    from PIL import Image

    folders = {(name, Setting.of(report)): folder for name, report, folder in reports(out) if report["generation"]}
    settings = [replace(scale.setting, num_steps=count) for count in (10, 50)]
    rows = [
        (f"{process}-{name}-{SEEDS[0]}", setting)
        for process in PROCESSES
        for setting in settings
        for name in ("none", "lpl")
    ]
    if missing := [f"{name} by {setting.num_steps} steps" for name, setting in rows if (name, setting) not in folders]:
        sys.exit(f"Not measured yet, in {out}: {', '.join(missing)}. `study.py run main main_by_50` makes them.")
    pitch = scale.side + gap
    drawn = Image.new("RGB", (columns * pitch - gap, len(rows) * pitch - gap), "white")
    for row, found in enumerate(rows):
        of_run = sorted((folders[found].parent / "images").glob("*/*.png"), key=lambda path: path.name)
        for column, path in enumerate(of_run[:columns]):
            with Image.open(path) as image:
                drawn.paste(image, (column * pitch, row * pitch))
    drawn.save(GRID, optimize=True)


def rooted(given: str) -> Path:
    """A path of the command line, as it is called from the repository's folder."""
    path = Path(os.path.abspath(given))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main() -> None:
    """Plan, run, collect or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*experiments(SCALES["cpu"])]
    parser.add_argument("action", choices=("plan", "run", "compare", "collect", "table", "grid"))
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"of {', '.join(names)}, ceilings")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--photos", type=rooted, default=Path("photos"))
    parser.add_argument("--squeezenet", type=rooted, default=Path("squeezenet1_0.pth"))
    for name in TINY:
        parser.add_argument(
            f"--{name}", type=rooted, default=Path(name), help="folder, for the experiment of that name"
        )
    parser.add_argument("--out", type=rooted, default=Path("runs/study"))
    parser.add_argument(
        "--pretraining", type=int, default=0, metavar="SEED", help="of the models that others start from"
    )
    parser.add_argument("--anew", action="store_true", help="with an autoencoder of your own, which is trained first")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no command begins")
    parser.add_argument(
        "--autoencoder", type=rooted, action="append", default=[], help="folder, for ceilings; repeatable"
    )
    parser.add_argument("--profile", action="store_true", help="measure what steps cost too, on a quiet machine")
    parser.add_argument("--against", nargs="*", choices=("val", "train"), default=["val", "train"], help="photos")
    parser.add_argument("--only", default="", help="runs whose names hold this")
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.pretraining:
        given.out = given.out.with_name(f"{given.out.name}-pretraining-{given.pretraining}")
    if given.action == "collect":
        collect(given.out)
        return
    if given.action == "compare":
        work(list(comparisons(given.out)), given.out, given.jobs, given.minutes)
        return
    if given.action == "table":
        print(table(RESULTS))
        return
    if given.action == "grid":
        grid(given.out, SCALES[given.scale])
        return
    if unknown := set(given.experiments) - {*names, "ceilings"}:
        parser.error(f"There is no experiment {', '.join(sorted(unknown))}. Known: {', '.join(names)}, ceilings.")
    scale = replace(SCALES[given.scale], pretraining=given.pretraining)
    asked: dict[str, Task] = {}
    for name in given.experiments or ["main"]:
        runs = [run for run in experiments(scale).get(name, []) if given.only in run.name]
        for task in ceilings(given) if name == "ceilings" else tasks(runs, scale, given):
            asked.setdefault(task.name, task)
    if "ceilings" in given.experiments:  # also of a plan, whose commands read it
        (given.out / "reconstructed").mkdir(parents=True, exist_ok=True)
        suite = (ROOT / "configs/study/metrics.yaml").read_text()
        suite = suite.replace("weights: squeezenet1_0.pth", f"weights: {given.squeezenet.absolute()}")
        (given.out / "reconstructed" / "metrics.yaml").write_text(suite)  # `lpl evaluate` has no stand-ins
    if given.action == "plan":
        print(*(shlex.join(task.words()) for task in asked.values()), sep="\n")
        return
    work(list(asked.values()), given.out, given.jobs, given.minutes)


if __name__ == "__main__":
    main()
