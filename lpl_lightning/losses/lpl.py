r"""The Latent Perceptual Loss (Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives", ICLR 2025).

Equation 3, for one sample with decoder features :math:`\phi_l` of the clean latent :math:`z_0` and
:math:`\hat\phi_l` of its estimate :math:`\hat z_0`, both standardized (primed):

.. math::
    L = \delta_{nsr \le \tau} \sum_l \omega_l \frac{1}{C_l} \sum_c
        \frac{\| \rho_{l,c} \odot (\phi'_{l,c} - \hat\phi'_{l,c}) \|_2^2}{\| \rho_{l,c} \|_1}

with the gate of ``gate.py``, the standardization and weights of ``distance.py`` and the mask of ``outliers.py``. The
paper prints the norm without the division by the number of inliers; with it, as in the public code, a layer's share
does not grow with its area. The training loss is the mean over the *whole* batch, gated samples counting as zero, since
the gate stands inside the expectation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.draws import Draws
from lpl_lightning.execution import Execution, StageRunner
from lpl_lightning.losses.checks import check_latents, check_lists, normalizes
from lpl_lightning.losses.comparison import Compared, Comparison, Part
from lpl_lightning.losses.diagnostics import Diagnostics
from lpl_lightning.losses.distance import DepthWeights, Distance, Normalization, Statistics
from lpl_lightning.losses.gate import Threshold, described, gate_weight, relative_side
from lpl_lightning.losses.nonfinite import NonFiniteGuard
from lpl_lightning.losses.options import LossOptions, NonFinite, Preset, Reduction
from lpl_lightning.losses.streaming import (
    activation_bytes,
    attach_gradient,
    chunk_for,
    compare_whole,
    on_device_of,
    stream,
)
from lpl_lightning.losses.subset import Subset, depths_of, draw_crop
from lpl_lightning.noise import DDPM

__all__ = ["LatentPerceptualLoss"]


class LatentPerceptualLoss(nn.Module):
    """Distance between a clean latent and its estimate, seen by the autoencoder's decoder (eq. 3).

    It can serve any loop: ``loss + 3.0 * lpl(z0_hat, z0, noise_to_signal).mean()``. The decoder runs only for the
    samples that pass the gate, and only as deep as asked. An option that is not given is the preset's; values named
    below are of ``paper``. ``losses/README.md`` has the table of both, with their sources.

    Args:
        autoencoder: The frozen autoencoder whose decoder looks at the latents; a module that is none yet is made one,
            and so frozen, by ``Autoencoder(module)``.
        preset: ``paper``: the paper's choices. ``diffusers``: those of the public example's command line, number for
            number. ``rgb``: mean squared error of decoded images, the paper's baseline for its ablation of depth.
        depth: How many of the decoder's feature maps are compared, shallow to deep, at most all there are (the paper's
            5 are a middle block and four others; 0 compares none and is zero), or the names of stages, among them
            ``image``, the decoder's output. The paper's is 5.
        threshold: tau: samples with more noise, relative to the signal, are not compared. A noise-to-signal ratio
            sigma / alpha, or a ``Threshold`` in another unit, such as ``{"log_snr": -2.2}`` in a config. Infinity lets
            all pass. The paper's is 3.0, of three to six.
        reference_side: Side of the latents, in positions, that ``threshold``, ``dilation`` and ``erosion`` are meant
            for. Those of other sides have all three scaled in proportion, as the paper does: with 32, 3 is 6 for
            latents of 64 x 64. 0 turns it off. The paper's is 32.
        gate_softness: s: the gate falls from 1 at tau / s to 0 at tau * s. The paper's is 1.0, a hard gate.
        normalization: ``standardize``, the paper's, gives each channel zero mean and unit variance over positions;
            ``channel_norm``, the public example's, divides each position's vector of channels by its length.
        statistics: Whose means and variances, or lengths, serve for both maps: the estimate's as the gradient passes
            through them (``predicted``, the paper's words taken literally) or as constants (``predicted_detached``),
            those of the clean latent (``target``), each map its own (``separate``), or ``none``, no normalization.
        eps: Added to variances (by default 1e-5) or to norms (1e-10 for a map's own, 1e-6 for shared ones).
        relative_eps: Added to variances, times their mean over the map's channels. By default 0.1 for decoders without
            normalization layers, such as AutoencoderTiny's, whose channels may hardly vary, and 0.0 for others.
        distance: Of single values: ``mse``, the paper's, ``l1`` or ``huber``.
        huber_delta: Difference at which ``huber`` becomes linear, by default 1.0.
        depth_weights: Weights of the maps by r_l / r_1, how many times finer they are than the first:
            ``inverse_upscale``, the paper's, is r_1 / r_l, ``exponential`` 2^(-r_l / r_1), ``uniform`` 1; or a list
            with a weight for each compared map, shallow to deep.
        mask_outliers: Whether outliers are left out, as in the paper.
        mask_source: Whose outliers: those of the estimate's map (``predicted``, the paper's) or of the clean latent's
            (``target``).
        mask_upscale: Only maps more than so many times finer than the first are masked, by default 2.0.
        quantile: Inliers lie between this quantile of a channel and the one as far from the top, both widened. By
            default 0.02.
        widening: By how many standard deviations of the channel the two quantiles are widened, by default 2.0.
        dilation: Window that dilates the map of inliers, by default 3, in positions of a map 8 times as fine as a
            latent of ``reference_side`` (or as the first map, if that is 0); others have windows in proportion to their
            side, to the nearest odd number, which cover the same share of the image. A list gives each map's as it is.
        erosion: Window that erodes it afterwards, likewise, by default 5.
        mask_before_normalization: Whether the clean map's outliers are zero before it is normalized; by default not.
        position_reduction: ``mean`` over a channel's inliers, the default, or ``sum``, as the norm of eq. 3 is printed.
        depth_reduction: ``sum`` over maps, the paper's, or ``mean``.
        reduction: ``none``, the default, gives (B,); ``mean`` and ``sum`` a scalar over the whole batch;
            ``mean_passed`` the mean over the samples that passed, as the public example has it, whose weight then
            depends on how many did.
        post_quant_conv: Whether the latents pass the decoder's ``post_quant_conv``, if it has one; by default they do.
            The public example leaves it out.
        nonfinite: What to do where a value is not finite: ``raise`` an error that names stage and sample, the default,
            ``skip`` the step's LPL, or ``zero`` it for those samples.
        execution: How it is computed, an ``Execution`` or its settings by name; the value is the same.
        subset: What part of it is computed at a time, in training mode: a ``Subset`` or its settings; by default all.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | nn.Module,
        preset: Preset = "paper",
        depth: int | Sequence[str] | None = None,
        threshold: float | Threshold | None = None,
        reference_side: int | None = None,
        gate_softness: float | None = None,
        normalization: Normalization | None = None,
        statistics: Statistics | None = None,
        eps: float | None = None,
        relative_eps: float | None = None,
        distance: Distance | None = None,
        huber_delta: float | None = None,
        depth_weights: DepthWeights | Sequence[float] | None = None,
        mask_outliers: bool | None = None,
        mask_source: Literal["predicted", "target"] | None = None,
        mask_upscale: float | None = None,
        quantile: float | None = None,
        widening: float | None = None,
        dilation: int | Sequence[int] | None = None,
        erosion: int | Sequence[int] | None = None,
        mask_before_normalization: bool | None = None,
        position_reduction: Literal["mean", "sum"] | None = None,
        depth_reduction: Literal["sum", "mean"] | None = None,
        reduction: Reduction | None = None,
        post_quant_conv: bool | None = None,
        nonfinite: NonFinite | None = None,
        execution: Execution | None = None,
        subset: Subset | None = None,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name in LossOptions.__dataclass_fields__}
        self.autoencoder = autoencoder if isinstance(autoencoder, Autoencoder) else Autoencoder(autoencoder)
        self.preset = preset
        self.options = LossOptions.of(preset, normalizes(self.autoencoder.model), **given)
        self.stages = self.autoencoder.stage_names
        self.compared = self._compared(self.options.depth)
        check_lists(self.options, self.compared)
        self.execution = Execution.of(execution)
        if not self.autoencoder.in_stages and (self.execution.compile or self.execution.checkpoint):
            raise ValueError(
                "`execution`: `compile` and `checkpoint` need a decoder that runs in stages; with `feature_modules` it "
                "runs as it is. Leave them out."
            )
        self.subset = Subset.of(subset)
        self.subset.probabilities(len(self.compared))
        self.ddpm: DDPM | None = None
        self.draws: Draws | None = None  # of samples, for the subset; else PyTorch's own generator
        self._runner = StageRunner(self.execution)
        self._comparison = Comparison(self.options, self.compared, self.stages, self.autoencoder.is_video)
        self.guard = NonFiniteGuard(self.options.nonfinite)
        self._chunks: dict[object, int] = {}
        self.announced = False  # whether the log has said, or need not say, what is compared

    @property
    def comparison(self) -> Comparison:
        """What compares feature maps."""
        self._comparison.dtype = torch.promote_types(self.autoencoder.dtype, torch.float32)
        return self._comparison

    def tau(self, z: Tensor) -> float:
        """The threshold for latents such as ``z`` (B, C, *positions), as a noise-to-signal ratio."""
        return self.options.threshold.to_nsr(self.ddpm) * self._scale(z)

    def passes(self, noise_to_signal: Tensor, z: Tensor) -> Tensor:
        """Which samples pass the gate: (B,) bool, on the device of ``noise_to_signal`` (B,).

        Args:
            noise_to_signal: sigma / alpha of each sample.
            z: Latents (B, C, *positions), whose side the threshold is scaled with.
        """
        return gate_weight(noise_to_signal, self.tau(z), self.options.gate_softness) > 0

    def announce(self, z: Tensor) -> None:
        """Log the threshold in every unit, once.

        Args:
            z: Latents (B, C, *positions).
        """
        if self.announced:
            return
        self.announced = True
        tau = described(self.tau(z), z, self.autoencoder.is_video, self.options.reference_side, self.ddpm)
        floor = f" Variances have a floor, `relative_eps` {found:g}." if (found := self.options.floor) else ""
        rank_zero_info(f"LPL compares {', '.join(self.compared) or 'nothing'}; {tau}.{floor}")

    def flush(self) -> None:
        """Raise for the last call, if that is still to come; see ``NonFiniteGuard``."""
        self.guard.flush()

    def forward(self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None = None) -> Tensor:
        """Compute the loss of each sample.

        Args:
            z0_hat: Estimates of the clean latents (B, C, *positions), in the scale of the autoencoder's ``encode``.
            z0: Clean latents, likewise; no gradient flows to them.
            noise_to_signal: (B,) sigma / alpha of each sample; without it all pass the gate. On the CPU it costs no
                wait for an accelerator.

        Returns:
            (B,), or a scalar if ``reduction`` says so; zero where gated, always connected to ``z0_hat``; in the
            decoder's precision but at least float32.
        """
        return self.evaluate(z0_hat, z0, noise_to_signal)[0]  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def evaluate(
        self,
        z0_hat: Tensor,
        z0: Tensor,
        noise_to_signal: Tensor | None = None,
        diagnose: bool = False,
        reduction: Reduction | None = None,
    ) -> tuple[Tensor, Diagnostics | None]:
        """Compute the loss, and what can be seen of it; in a step that is compiled, ``execution`` alone compiles of it.

        Args:
            z0_hat: See ``forward``.
            z0: See ``forward``.
            noise_to_signal: See ``forward``.
            diagnose: Whether to give diagnostics, which costs a few reductions over the feature maps.
            reduction: In the place of the option of that name.

        Returns:
            The loss as of ``forward``, and the diagnostics or None.
        """
        check_latents(z0_hat, z0, noise_to_signal)
        self.announce(z0)
        comparison = self.comparison
        # An empty sum: zero, connected to the graph, and with a zero gradient even where z0_hat is not finite.
        losses = z0_hat.flatten(1)[:, :0].sum(dim=1).to(comparison.dtype)
        weight, passed, kept_hat, kept = self._gate(z0_hat, z0, noise_to_signal)
        parts = self._parts(kept, z0, noise_to_signal)
        if not parts:
            return self.options.reduce(losses, len(kept), reduction), None
        ungated, found = self._compare(kept_hat, kept, parts, diagnose, len(z0))
        finite = found.finite
        if weight is not None:
            finite = finite | (weight == 0)
            ungated = torch.where(weight > 0, ungated * weight, torch.zeros_like(ungated))
        counted, finite = self.guard(ungated, finite, comparison.places, kept_hat)
        losses = losses + counted if passed is None else losses.index_add(0, passed, counted)
        diagnostics = None
        if diagnose:
            relative_time = None
            if noise_to_signal is not None:
                nsr = on_device_of(z0, noise_to_signal.detach().to(comparison.dtype))
                relative_time = (1 - 1 / (1 + (nsr if passed is None else nsr[passed]))) / (1 - 1 / (1 + self.tau(z0)))
            past = None if weight is None else weight > 0
            diagnostics = Diagnostics.of(self.compared, found, finite, past, relative_time)
        counted_passed = len(kept) if passed is not None or weight is None else (weight > 0).sum().clamp_min(1)
        return self.options.reduce(losses, counted_passed, reduction), diagnostics

    def _compare(
        self, z0_hat: Tensor, z0: Tensor, parts: list[Part], diagnose: bool, batch: int
    ) -> tuple[Tensor, Compared]:
        """The losses (n,) of samples that have passed, connected to ``z0_hat``, and all that was found of them."""
        if not self.execution.streamed:
            found = compare_whole(self.features, self.comparison, z0_hat, z0, parts, diagnose)
            return found.parts.sum(dim=0), found
        with_gradient = torch.is_grad_enabled() and z0_hat.requires_grad
        chunk_size, fill = self.chunk_size(z0, batch), self.execution.static_shapes

        def too_large(size: int) -> None:
            self._chunks[self._kind(z0)] = math.ceil(size / 2)

        decoder = (self.features, self.comparison)
        found, gradient = stream(*decoder, z0_hat, z0, parts, chunk_size, fill, diagnose, with_gradient, too_large)
        losses = found.parts.sum(dim=0)
        return losses if gradient is None else attach_gradient(losses, z0_hat, gradient), found

    def _gate(
        self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Weights of samples, which ones they are, and their latents; no weights or samples where all count alike."""
        if noise_to_signal is None:
            # A view, so that what the guard hangs on it concerns nobody else.
            return None, None, z0_hat.view_as(z0_hat), z0
        dtype = self.comparison.dtype
        weight = gate_weight(noise_to_signal.detach(), self.tau(z0), self.options.gate_softness)
        if self.execution.static_shapes and weight.device.type != "cpu":
            return weight.to(dtype), None, z0_hat.view_as(z0_hat), z0
        chosen = weight.nonzero().squeeze(1)
        weight, passed = on_device_of(z0, weight[chosen].to(dtype)), on_device_of(z0, chosen)
        return weight, passed, z0_hat[passed], z0[passed]

    def features(self, z: Tensor, names: Sequence[str], runner: StageRunner | None = None) -> list[Tensor]:
        """The decoder's maps of latents (n, C, *positions), by names of stages; run as ``execution`` says."""
        skip = () if self.options.post_quant_conv else ("post_quant_conv",)
        return self.autoencoder.features(z, names, skip, runner or self._runner)

    def _parts(self, z0: Tensor, whole: Tensor, noise_to_signal: Tensor | None) -> list[Part]:
        """What is compared of samples that have passed: all of it, or in training the subset drawn."""
        count, maps, subset = len(z0), len(self.compared), self.subset if self.training else Subset()
        if count == 0 or maps == 0:
            return []
        probabilities = subset.probabilities(maps)
        u, generator = (None, None) if self.draws is None else (self.draws.subset, self.draws.shared_generator())
        if u is not None and noise_to_signal is not None and count < len(whole):
            u = u[self.passes(noise_to_signal.detach().cpu(), whole)]
        depths, crop = depths_of(count, probabilities, u=u), None
        if subset.crop is not None:
            crop = draw_crop(z0.shape[2:], subset.crop, subset.halo, self.autoencoder.is_video, generator)
        found = []
        for depth in sorted(set(depths.tolist()) - {0}, reverse=True):
            samples = (depths == depth).nonzero().squeeze(1)
            to = self.comparison.names[: self.comparison.names.index(self.compared[depth - 1]) + 1]
            found.append(Part(None if len(samples) == count else samples, to, tuple(probabilities), crop))
        return found

    def chunk_size(self, z0: Tensor, batch: int | None = None) -> int:
        """Most samples like these latents (n, C, *positions) to take at once, and no more than the whole batch."""
        key = self._kind(z0)
        if key not in self._chunks:
            if self.execution.chunk_size != "auto":
                return min(self.execution.chunk_size, batch or self.execution.chunk_size)
            single = len(z0) == 1 and not self.execution.static_shapes
            if self.execution.checkpoint or self.subset.crop is not None or single:
                return 1  # what a sample takes is not to be measured where that may be too much, or need not be
            plain = StageRunner(replace(self.execution, compile=False, checkpoint=False))
            found = activation_bytes(partial(self.features, runner=plain), z0, self.comparison.names, self.autoencoder)
            self._chunks[key] = chunk_for(found, z0.device)
        return min(self._chunks[key], batch or self._chunks[key])

    def _kind(self, z0: Tensor) -> object:
        return z0.shape[1:], z0.dtype, z0.device, self.autoencoder.dtype

    def _compared(self, depth: int | tuple[str, ...]) -> tuple[str, ...]:
        """Names of the stages to compare, in the decoder's order."""
        if isinstance(depth, int):
            return self.autoencoder.feature_names[:depth]
        if unknown := [name for name in depth if name not in self.stages]:
            raise ValueError(f"`depth` must name stages among {list(self.stages)}, got {unknown}.")
        return tuple(name for name in self.stages if name in depth)

    def _scale(self, z: Tensor) -> float:
        """Side of the latents over the side that the options are meant for."""
        return relative_side(z, self.autoencoder.is_video, self.options.reference_side)
