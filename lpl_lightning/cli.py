"""The ``lpl`` command: one LightningCLI over any module and any data.

``lpl fit | validate | test | predict | sweep | encode | profile | replay -c CONFIG.yaml [-c OVERLAY.yaml] [--KEY]``.
Files given later are laid over those before them; ``callbacks+:`` in one appends to the list of the last. Commands that
need no trainer (``WITHOUT_TRAINER``), such as ``lpl export --ckpt CKPT --out DIR``, are functions with their arguments.

What the package refuses is one line on the terminal; with ``LPL_TRACEBACK=1`` in the environment, Python's traceback.
"""

from __future__ import annotations

import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.arguments import raised_in, refused_by_loader
from lpl_lightning.autoencoder_module import AutoencoderModule
from lpl_lightning.callbacks import (
    EMA,
    AccumulatedGradients,
    BestCheckpoints,
    Evaluation,
    ImagesPerSecond,
    ImageWriter,
    LossByNoise,
    Preemption,
    RunSummary,
    SaveRunConfig,
    UnfinishedValidation,
)
from lpl_lightning.captioning import caption_images
from lpl_lightning.checkpoints import SafeCheckpointIO, check_settings
from lpl_lightning.chosen_checkpoint import check_inherited, find_checkpoint
from lpl_lightning.command_arguments import check_files, check_one_each, named
from lpl_lightning.command_texts import COMMANDS, TITLES
from lpl_lightning.encoding import EncodingTrainer
from lpl_lightning.evaluation import compare, evaluate_folder
from lpl_lightning.export import export_checkpoint
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.own_files import find_own_modules
from lpl_lightning.packaged_configs import with_packaged_configs
from lpl_lightning.parser_errors import REFUSALS, TRACEBACK, plain_refusals, refuse_arguments, shows_tracebacks
from lpl_lightning.processes import threads_at_rest
from lpl_lightning.stand_ins import StandIns, put_all_stand_ins

__all__ = ["LPLCLI", "main"]

WITHOUT_TRAINER: dict[str, Callable[..., object]] = {
    "export": export_checkpoint,
    "evaluate": evaluate_folder,
    "compare": compare,
    "caption": caption_images,
}
"""Commands that need no trainer, by name."""

EVALUATIONS = ("validate", "test", "predict")
"""Commands that look at a checkpoint."""


class LPLCLI(LightningCLI):
    """LightningCLI with what every run of this package has: images per second, and files from ``predict``.

    Beside Lightning's commands there are ``profile``, ``replay``, ``sweep`` and ``encode``; see ``EncodingTrainer``.
    """

    def __init__(
        self, model_class: Any = None, datamodule_class: Any = None, *, args: ArgsType = None, **options: Any
    ) -> None:
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        self._words = [str(word) for word in words]
        super().__init__(model_class, datamodule_class, args=args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and which arguments of the trainer's methods are no options of theirs."""
        own = ("profile", "sweep", "encode", "replay")
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in own}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **{name: {"description": said} for name, said in COMMANDS.items()} | kwargs)
        listed = cast(Any, parser)._subcommands_action._choices_actions
        for command in listed:
            command.help = COMMANDS.get(command.dest, command.help)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        first = self._words[:1]
        if first != [subcommand] and (first in (["-h"], ["--help"]) or {*first} & {*self.subcommands()}):
            # Is listed, and no more: a command's arguments take longer to add than they do to read.
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in EVALUATIONS:
            said = "Decay of the average of EMA to take from the checkpoint, or 'trained' for the weights as trained."
            parser.add_argument("--ema", type=float | Literal["trained"] | None, default=None, help=said)
        if subcommand in ("profile", "sweep", "encode", "replay"):
            # So that the config that a run has saved can be given.
            for name in ("weights_only", *(("ckpt_path",) if subcommand in ("profile", "encode") else ())):
                parser.add_argument(f"--{name}", type=Any, default=None, help="Not looked at.")
        _prints_stand_ins(parser)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that are always there, under keys of their own."""
        parser.add_lightning_class_args(ImagesPerSecond, "throughput")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.add_lightning_class_args(ImageWriter, "writer")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(Evaluation, "validation")
        parser.add_lightning_class_args(LossByNoise, "loss_by_noise")
        parser.add_lightning_class_args(AccumulatedGradients, "accumulated_gradients")
        parser.add_lightning_class_args(UnfinishedValidation, "unfinished_validation")
        parser.add_lightning_class_args(BestCheckpoints, "best_checkpoints")
        parser.add_lightning_class_args(Preemption, "preemption")
        for name, title in TITLES.items():
            cast(Any, parser).groups[name].title = title
        parser.set_defaults({"validation.stage": "validate", "validation.num_images": 64})
        parser.add_argument(
            "--stand_ins",
            type=StandIns,
            default={},
            help="What stands in for what: a folder for a hub id, arguments for those of a class wherever it is named.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and put the stand-ins in place of what they stand in for; a refusal is one line."""
        self._names_checkpoint = any(word.partition("=")[0] == "--ckpt_path" for word in self._words)
        try:
            self._parse(parser, args)
        except ArgumentError as error:
            of_all = [action for one in self._subcommand_parsers.values() for action in one._actions]
            known = {name for action in of_all for name in action.option_strings}
            refuse_arguments(error, [*sorted(known), *self._subcommand_parsers, *WITHOUT_TRAINER])

    def _parse(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        for said in put_all_stand_ins(config):
            rank_zero_info(f"Stand-in: {said}")
        if config.stand_ins:
            self.config = parser.parse_object(self.config)

    def instantiate_classes(self) -> None:
        """Build the parts, with errors that say what a part refuses."""
        with plain_refusals():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with checkpoints that are whole and run no code, and one summary."""
        given, summary = (self._get(self.config_init, key) for key in ("trainer", "summary"))
        asked = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks]
        check_one_each(asked)
        if summary.start is None:
            summary.start = given.enable_model_summary is not False
        if summary.start and not any(isinstance(callback, ModelSummary) for callback in asked):
            kwargs.setdefault("enable_model_summary", False)  # Lightning's table would say less of the same
        trainer: pl.Trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Look at hyperparameters, and at the checkpoint to go on from."""
        check_settings(self.model, "model")
        check_settings(self.datamodule, "data")
        self._find_checkpoint("fit")

    def before_validate(self) -> None:
        """Choose the average that is asked for."""
        self._refuse_in_training("validate", "validation")
        self._find_checkpoint("validate")
        self._choose_average("validate")

    def before_predict(self) -> None:
        """Refuse to generate from a model that nothing has trained, or that generates nothing."""
        if isinstance(self.model, AutoencoderModule):
            raise ValueError(
                "`lpl predict` generates images, which an AutoencoderModule does not: `lpl test` reconstructs the test "
                "images and measures what comes back."
            )
        self._find_checkpoint("predict")
        self._choose_average("predict")
        self._refuse_untrained("predict")

    def before_test(self) -> None:
        """The same, unless only the loss is asked for."""
        self._refuse_in_training("test", "evaluation")
        self._find_checkpoint("test")
        self._choose_average("test")
        if self.config.test.evaluation.num_images:
            self._refuse_untrained("test", " For the loss alone, set `--evaluation.num_images 0`.")

    def before_sweep(self) -> None:
        """The same."""
        self._refuse_in_training("sweep", "evaluation")
        self._find_checkpoint("sweep")
        self._refuse_untrained("sweep")

    def before_replay(self) -> None:
        """Find the last checkpoint, if it is asked for; the last that a config names is no other than the record's."""
        if self.config.replay.ckpt_path == "last":
            found = find_checkpoint(self.trainer, self.model, "replay", "last") if self._names_checkpoint else None
            self.config_init.replay.ckpt_path = self.config.replay.ckpt_path = found

    def _refuse_in_training(self, command: str, key: str) -> None:
        if self.config[command][key].every_n_steps is not None:
            raise ValueError(
                f"`{key}.every_n_steps` evaluates during training, which `lpl {command}` is not: leave it out here."
            )

    def _find_checkpoint(self, command: str) -> None:
        config = self.config[command]
        of_run = False
        if command != "fit" and not self._names_checkpoint:
            configs = [Path(one.absolute) for one in config.get("config") or []]
            of_run = check_inherited(command, config.ckpt_path, configs)
        found = find_checkpoint(self.trainer, self.model, command, config.ckpt_path, of_run)
        self.config_init[command].ckpt_path = found
        if command != "fit":  # whose saved config is to go on with the last, too
            config.ckpt_path = found

    def _choose_average(self, command: str) -> None:
        ema = self.config[command].ema
        if ema is None:
            return
        if self.config[command].ckpt_path is None:
            raise ValueError("`ema` says which weights of a checkpoint to take: give `--ckpt_path` too.")
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, EMA)]
        # First, so that the others find it in place.
        callbacks.insert(0, EMA(evaluate=ema) if ema == "trained" else EMA(decay=ema))

    def _refuse_untrained(self, command: str, remedy: str = "") -> None:
        if (
            isinstance(self.model, LatentDiffusionModule)
            and not self.model.weights
            and not self.model.denoiser.is_pretrained
            and not self.config[command].ckpt_path
        ):
            raise ValueError(
                f"`lpl {command}` needs trained weights: give `--ckpt_path` a checkpoint, or `--model.weights` a "
                f"checkpoint or .safetensors file.{remedy}"
            )

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it was given.

        Lightning would lay the checkpoint's own hyperparameters over it, so that a setting of the command line (a
        sampler's steps, say) would be ignored, and a checkpoint of another model would replace the configured one
        without a word.
        """


def _prints_stand_ins(parser: LightningArgumentParser) -> None:
    """Have ``--print_config``, which ends the parsing, print a config with its stand-ins in place."""
    own = cast(Any, parser)
    dump: Callable[..., str] = own.dump

    def dumped(cfg: Namespace, **options: Any) -> str:
        if hasattr(own.parent_parser, "print_config"):
            put_all_stand_ins(cfg)
        return dump(cfg, **options)

    own.dump = dumped


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments as a list of strings or a config as a dictionary; by default those of the process, of which what
            the package refuses ends the process with one line.
    """
    if args is not None:
        _run(args)
        return
    try:
        _run(None)
    except (*REFUSALS, RuntimeError, MisconfigurationException) as error:
        # The system's own errors have a number, and say too little without a traceback.
        is_ours = isinstance(error, REFUSALS) and raised_in(error).startswith("lpl_lightning")
        is_refusal = is_ours or isinstance(error, MisconfigurationException)  # which Lightning refuses by
        said = str(error) if is_refusal and getattr(error, "errno", None) is None else refused_by_loader(error)
        if shows_tracebacks() or not said:
            raise
        print(f"lpl: error: {said}", file=sys.stderr)
        raise SystemExit(1) from None


@threads_at_rest()
def _run(args: ArgsType) -> None:
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        given = with_packaged_configs(given)
        if args is None:
            sys.argv[1:] = given  # where Lightning looks, in the processes that it starts too
        else:
            args = given
        check_files(given)
        if given[:1] not in (["compare"], ["caption"], ["export"]):  # whose arguments name no classes
            find_own_modules(given)
    if isinstance(given, list) and given and given[0] in WITHOUT_TRAINER:
        name, *rest = given
        command = WITHOUT_TRAINER[name]
        try:
            with plain_refusals():
                words = named(name, rest)
                auto_cli(command, args=words, as_positional=False, prog=f"lpl {name}", exit_on_error=False)
        except ArgumentError as error:
            refuse_arguments(error, [f"--{option}" for option in signature(command).parameters])
        return
    # Lightning warns of every module in eval mode, which a frozen autoencoder is on purpose, and of a call of its own.
    silent = [r".*module\(s\) in eval mode at the start of training", r".*LeafSpec.*is deprecated"]
    if isinstance(given, list) and given[:1] != ["fit"]:  # and of scores that only further training reads
        silent.append("The dirpath has changed")
        if args is None:  # Lightning's own handler notes it, for loops that do not look, and then calls this one
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for message in silent:
        warnings.filterwarnings("ignore", message=message)
    LPLCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=EncodingTrainer,
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        parser_kwargs={
            "exit_on_error": False,
            "description": "Train latent diffusion and flow models with the Latent Perceptual Loss, and measure them.",
            "epilog": f"Without a trainer: lpl {' | '.join(WITHOUT_TRAINER)}; see lpl COMMAND --help. "
            f"{TRACEBACK}=1 in the environment shows where an error comes from.",
        },
        args=args,
    )
