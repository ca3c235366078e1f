"""``lpl sweep``: how metrics depend on sampling steps, guidance or the decay of averaged weights."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

from lpl_lightning.arguments import at_least
from lpl_lightning.callbacks import Evaluation
from lpl_lightning.evaluation.report import Report, formatted, write_whole
from lpl_lightning.evaluation.settings import digest
from lpl_lightning.module import LatentDiffusionModule
from lpl_lightning.pretrained import chosen_state, read_checkpoint
from lpl_lightning.replay import ReplayingTrainer

__all__ = ["Sweep", "SweepingTrainer"]

PANELS = 3
"""Plots in a row."""


@dataclass
class Sweep:
    """Reports by what was swept.

    Attributes:
        argument: What was swept, such as ``num_steps``.
        settings: Its values; None of ``ema`` are the weights as they were trained.
        reports: One of each.
        source: What the checkpoint is called, or ``weights`` without one.
    """

    argument: str
    settings: list[float | None]
    reports: list[Report]
    source: str = "weights"

    @property
    def shared(self) -> dict[str, Any]:
        """How the images of all reports were made, but for what was swept."""
        first, *others = [report.generation for report in self.reports]
        return {
            key: said
            for key, said in first.items()
            if key != self.argument and all(key in other and other[key] == said for other in others)
        }

    @property
    def stem(self) -> str:
        """Name of the files, which no other sweep of this or another checkpoint has."""
        of = [self.settings, self.shared, [report.made for report in self.reports]]
        return f"sweep_{self.argument}_{self.source}-{digest(of)}"

    @property
    def names(self) -> list[str]:
        """Names of the values that all reports have."""
        return [name for name in self.reports[0].values if all(name in report.values for report in self.reports)]

    def column(self, name: str) -> list[float]:
        """A value of each report."""
        return [report.values[name].value for report in self.reports]

    def write(self, folder: Path) -> Path:
        """Write a table as Markdown, CSV and JSON and, with matplotlib, a plot, under the name ``stem``.

        Returns:
            Path of the Markdown.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.stem
        reports = [{"setting": s, "report": r.as_dict()} for s, r in zip(self.settings, self.reports, strict=True)]
        about = {"argument": self.argument, "source": self.source, "shared": self.shared}
        write_whole(folder / f"{stem}.json", json.dumps(about | {"reports": reports}, indent=1))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow([self.argument, *self.names])
        columns = [self.column(name) for name in self.names]
        writer.writerows(zip(map(_said, self.settings), *columns, strict=True))
        write_whole(folder / f"{stem}.csv", table.getvalue())
        drawn = self._plot(folder / f"{stem}.png")
        return write_whole(folder / f"{stem}.md", self.markdown(f"{stem}.png" if drawn else None))

    def markdown(self, plot: str | None = None) -> str:
        """The values as a table, a row a setting."""
        counts = {report.images["count"] for report in self.reports}
        images = f"{', '.join(map(str, sorted(counts)))} images a row"
        lines = [f"# Sweep of `{self.argument}`", "", f"{images}, against {self.reports[0].reference.get('name')}.", ""]
        lines += ["| " + " | ".join([self.argument, *self.names]) + " |", "|---" * (1 + len(self.names)) + "|"]
        for setting, report in zip(self.settings, self.reports, strict=True):
            values = [formatted(report.values[name].value) for name in self.names]
            lines.append("| " + " | ".join([_said(setting), *values]) + " |")
        if plot is not None:
            lines += ["", f"![{self.argument}]({plot})"]
        lines += ["", "## Shared by all rows", ""]
        lines += [
            f"- {key}: {said if isinstance(said, str) else json.dumps(said)}" for key, said in self.shared.items()
        ]
        return "\n".join(lines) + "\n"

    def _plot(self, path: Path) -> bool:
        try:
            figures: Any = import_module("matplotlib.figure")
        except ModuleNotFoundError:
            rank_zero_info(f"{path.name} is not drawn: `pip install matplotlib` for plots.")
            return False
        rows = -(-len(self.names) // PANELS)
        figure = figures.Figure(figsize=(4 * PANELS, 2.8 * rows), layout="constrained")
        places = range(len(self.settings))
        panels = figure.subplots(rows, PANELS, squeeze=False).flatten()
        for axes in panels[len(self.names) :]:
            axes.set_axis_off()
        for axes, name in zip(panels, self.names, strict=False):
            axes.plot(places, self.column(name), marker="o")  # evenly: steps from 10 to 250, decays near 1
            axes.set_xticks(places, [_said(setting) for setting in self.settings])
            better = self.reports[0].values[name].better
            axes.set_title(name if better is None else f"{name} ({better} is better)", fontsize="small")
            axes.set_xlabel(self.argument)
        figure.savefig(path, dpi=120)
        return True


def _said(setting: float | None) -> str:
    return "as trained" if setting is None else f"{setting:g}"


class SweepingTrainer(ReplayingTrainer):
    """Lightning's trainer, with ``sweep``, ``replay`` and ``profile`` beside its own commands."""

    def sweep(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        num_steps: Sequence[int] | None = None,
        guidance_scale: Sequence[float] | None = None,
        ema: Sequence[float | None] | None = None,
    ) -> Sweep:
        """Evaluate a model under several settings, as ``test`` does under one: give one of them a list.

        Number of images, metrics and real images are those of ``evaluation``. Each setting has its report, which a
        sweep that was stopped finds again; the table of all, or of those that were finished, with a plot, lies beside
        them.

        Args:
            model: The model.
            datamodule: Its data.
            ckpt_path: A checkpoint of its; without one its weights are taken as they are.
            num_steps: Numbers of sampling steps, such as [10, 25, 50, 100, 250].
            guidance_scale: Scales of classifier-free guidance, such as [1, 1.5, 2, 3].
            ema: Decays of averages that the checkpoint holds, of ``EMA(decay, also=[...])``; null for the weights as
                they were trained.

        Returns:
            The reports.

        Raises:
            ValueError: None or several of the lists are given, or the model or checkpoint has no such thing, or no
                images are asked for.
        """
        given = {"num_steps": num_steps, "guidance_scale": guidance_scale, "ema": ema}
        lists = {name: list(values) for name, values in given.items() if values is not None}
        if len(lists) != 1 or not all(lists.values()):
            raise ValueError(
                f"One of {', '.join(f'`{name}`' for name in given)} must be a list, got {lists or 'none'}."
            )
        ((argument, settings),) = lists.items()
        if num_steps is not None:
            at_least(1, **{f"num_steps[{i}]": steps for i, steps in enumerate(num_steps)})
        if len(set(settings)) < len(settings):
            raise ValueError(f"`{argument}` must hold each setting once, got {settings}.")
        if not isinstance(model, LatentDiffusionModule):
            raise ValueError(f"`model` must be a LatentDiffusionModule, got {type(model).__name__}.")
        if guidance_scale is not None and getattr(model.conditioner, "num_classes", None) == 0:
            raise ValueError("`guidance_scale`: the model knows no classes or captions to be guided by.")
        for steps in num_steps or ():
            sampler = copy.copy(model.sampler)
            sampler.num_steps = steps
            sampler.check(model.noise)
        if getattr(self, "fast_dev_run", False) or isinstance(self.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError("A sweep needs its files and this process: no `fast_dev_run`, and no spawned strategy.")
        if ema is not None:
            if ckpt_path is None:
                raise ValueError("`ema` needs `ckpt_path`, a checkpoint that holds averages.")
            checkpoint = read_checkpoint(ckpt_path, "ckpt_path")
            for decay in ema:
                chosen_state(checkpoint, ckpt_path, decay)
        evaluation = self._evaluation()
        at_least(1, **{"evaluation.num_images": evaluation.num_images})
        found = Sweep(argument, settings, [], "weights" if ckpt_path is None else Path(ckpt_path).stem)
        dirname, before = evaluation.dirname, getattr(model.sampler, argument, None)
        limit, self.limit_test_batches = self.limit_test_batches, 1
        try:
            for setting in settings:
                rank_zero_info(f"Sweep: {argument} {_said(setting)}.")
                if dirname is not None:
                    evaluation.dirname = str(Path(dirname) / f"{argument}-{_said(setting)}".replace(" ", "-"))
                if ema is None:
                    setattr(model.sampler, argument, setting)
                    self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
                else:
                    model.load_weights(cast(str, ckpt_path), setting)
                    evaluation.origin = (Path(cast(str, ckpt_path)), setting)
                    self.test(model, datamodule=datamodule, verbose=False)
                assert evaluation.report is not None  # no fast_dev_run
                found.reports.append(evaluation.report)
        finally:
            self.limit_test_batches, evaluation.dirname, evaluation.origin = limit, dirname, None
            if ema is None:
                setattr(model.sampler, argument, before)
            found.settings = settings[: len(found.reports)]  # where one has ended it, those before it
            if self.is_global_zero and found.reports and evaluation.folder is not None:
                # Beside the folders of images, in each of which lies a report.
                path = found.write(evaluation.folder.parent.parent if dirname is None else Path(dirname).expanduser())
                print(found.markdown())
                rank_zero_info(f"Sweep: {path}")
        return found

    def _evaluation(self) -> Evaluation:
        callbacks: list[Any] = cast(Any, self).callbacks
        known = [callback for callback in callbacks if isinstance(callback, Evaluation)]
        known = [callback for callback in known if callback.every_n_steps is None and callback.stage == "test"]
        if len(known) > 1:
            raise ValueError("`trainer.callbacks` holds several Evaluations of `lpl test`: leave one.")
        if not known:
            known = [Evaluation()]
            callbacks += known
        return known[0]
