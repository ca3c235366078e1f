"""What was measured, as a table and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lpl_lightning.profiling.decoder import DecoderCost
from lpl_lightning.profiling.steps import StepRecorder

__all__ = ["Block", "Report"]

MB = 2**20


@dataclass
class Block:
    """Training steps of one kind.

    Attributes:
        name: Of what kind.
        seconds: Of each step.
        waits: Seconds that each step waited for its data.
        peak: The most memory while they ran, in bytes; None where it was not taken.
        above_start: How much of it was not there before their first.
        failure: What ended them early; None where nothing did.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    peak: int | None = None
    above_start: int | None = None
    failure: str | None = None

    def add(self, recorder: StepRecorder) -> None:
        """Add what was recorded of a run."""
        self.seconds += recorder.seconds
        self.waits += recorder.waits
        if recorder.memory is not None and recorder.memory.peak:
            self.peak, self.above_start = recorder.memory.peak, recorder.memory.above_start

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step."""
        return median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """With a unit in each name; MB are 2^20 bytes."""
        return {
            "name": self.name,
            "steps": len(self.seconds),
            "step_s": self.step_s,
            "step_min_s": min(self.seconds, default=None),
            "data_wait_s": median(self.waits) if self.waits else None,
            "peak_memory_mb": None if self.peak is None else self.peak / MB,
            "peak_memory_above_start_mb": None if self.above_start is None else self.above_start / MB,
            "failure": self.failure,
        }


@dataclass
class Report:
    """All that ``lpl profile`` found.

    Attributes:
        machine: Names and versions.
        config: What was run.
        blocks: Steps without LPL, with LPL, and the way of other implementations.
        every_n_steps: At how many steps the config has LPL once; here it is at each.
        samples_decoded: Mean samples of a batch that passed the gate.
        batch_size: Mean samples of a batch.
        decoder: By stage, and the floor.
        decoder_failure: Why there is no ``decoder``.
        notes: What a reader has to know, in sentences.
        complete: Whether all was measured that was to be.
    """

    machine: dict[str, Any]
    config: dict[str, Any]
    blocks: list[Block]
    every_n_steps: int = 1
    samples_decoded: float | None = None
    batch_size: float | None = None
    decoder: DecoderCost | None = None
    decoder_failure: str | None = None
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def lpl_share(self) -> float | None:
        """Share of a step with LPL that LPL takes: 1 - without / with."""
        over = _ratio(self.blocks[0], self.blocks[1])
        return None if over is None else 1 - over

    @property
    def average_step_s(self) -> float | None:
        """Seconds of a step on average, where LPL is not computed at each."""
        without, with_lpl = self.blocks[0].step_s, self.blocks[1].step_s
        if without is None or with_lpl is None:
            return None
        return without + (with_lpl - without) / self.every_n_steps

    def as_dict(self) -> dict[str, Any]:
        """With a unit in each name."""
        return {
            "complete": self.complete,
            "machine": self.machine,
            "config": self.config,
            "blocks": [block.as_dict() for block in self.blocks],
            "lpl_share_of_step": self.lpl_share,
            "every_n_steps": self.every_n_steps,
            "average_step_s": self.average_step_s,
            "whole_batch_over_lpl": _ratio(self.blocks[2], self.blocks[1]),
            "samples_decoded": self.samples_decoded,
            "batch_size": self.batch_size,
            "decoder": None if self.decoder is None else asdict(self.decoder),
            "decoder_failure": self.decoder_failure,
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def table(self) -> str:
        """Everything as lines of plain text."""
        machine, config = self.machine, self.config
        kind = machine["memory"]
        lines = [
            f"{machine['device_name']} ({machine['device']}), {machine['threads']} threads, torch {machine['torch']}, "
            f"lightning {machine['lightning']}, diffusers {machine['diffusers']}",
            f"batch {_number(self.batch_size)}, latents {' x '.join(map(str, config['latent_shape']))}, precision "
            f"{config['precision']}, weight {config['weight']:g}, comparing {', '.join(config['compared'])}",
            "",
            f"{'training step':<26}{'median ms':>10}{'min ms':>9}{'over LPL':>10}{'data ms':>9}{'peak MB':>9}"
            f"{'above start':>13}   memory: {kind}",
        ]
        lines += [self._line(block) for block in self.blocks]
        lines.append("")
        if self.lpl_share is not None:
            lines.append(f"LPL takes {self.lpl_share:.0%} of a step with it.")
        if self.every_n_steps > 1:
            lines.append(
                f"The config has it at every {self.every_n_steps} steps, of {_ms(self.average_step_s)} ms on average."
            )
        tau = config["threshold_noise_to_signal"]
        lines.append(
            f"Of the {_number(self.batch_size)} samples of a batch, {_number(self.samples_decoded)} pass the gate "
            f"({'there is none' if tau is None else f'sigma / alpha up to {tau:.4g}'}) and are decoded."
        )
        lines += [*self._decoder(), *self.notes]
        return "\n".join(lines)

    def _line(self, block: Block) -> str:
        found = block.as_dict()
        over = _ratio(block, self.blocks[1])
        cells = (
            f"{_ms(found['step_s']):>10}{_ms(found['step_min_s']):>9}{'-' if over is None else f'{over:.2f}':>10}"
            f"{_ms(found['data_wait_s']):>9}{_whole(found['peak_memory_mb']):>9}"
            f"{_whole(found['peak_memory_above_start_mb']):>13}"
        )
        return f"{block.name:<26}{cells}{'' if block.failure is None else f'   failed: {block.failure}'}"

    def _decoder(self) -> list[str]:
        cost = self.decoder
        if cost is None:
            return [] if self.decoder_failure is None else [f"The decoder's stages: failed: {self.decoder_failure}"]
        what = f"{cost.samples} sample{'s' if cost.samples > 1 else ''}, {cost.chunk_size} at once"
        lines = ["", f"{f'decoder, {what}':<36}{'forward ms':>12}{'gradient ms':>13}{'comparison ms':>15}"]
        for stage in cost.stages:
            lines.append(
                f"{stage.name:<36}{_ms(stage.forward_s):>12}{_ms(stage.input_gradient_s):>13}"
                f"{_ms(stage.comparison_s):>15}"
            )
        forward = sum(stage.forward_s for stage in cost.stages)
        gradient = sum(stage.input_gradient_s for stage in cost.stages)
        lines.append(f"{'all':<36}{_ms(forward):>12}{_ms(gradient):>13}{_ms(cost.comparison_s):>15}")
        lines.append("")
        lines.append(
            f"The loss of them and its gradient: {_ms(cost.loss_s)} ms. The floor, two partial forwards and one "
            f"input-gradient pass: {_ms(cost.floor_s)} ms. Ratio: {cost.loss_over_floor:.2f}."
        )
        return lines


def _ratio(block: Block, other: Block) -> float | None:
    """Time of a step over that of another kind."""
    return block.step_s / other.step_s if block.step_s is not None and other.step_s is not None else None


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f}" if seconds < 10 else f"{1000 * seconds:.0f}"


def _whole(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"
