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

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpl_lightning.autoencoder import Autoencoder
from lpl_lightning.losses.checks import check_latents, note_constant_channels
from lpl_lightning.losses.diagnostics import Diagnostics, MapRecord, record
from lpl_lightning.losses.distance import (
    DepthWeights,
    Distance,
    Normalization,
    Statistics,
    channel_normalize,
    depth_weight,
    masked_distance,
    standardize,
)
from lpl_lightning.losses.gate import Threshold, equivalents, gate_weight, latent_side
from lpl_lightning.losses.nonfinite import NonFiniteGuard
from lpl_lightning.losses.options import LossOptions, NonFinite, Preset, Reduction
from lpl_lightning.losses.outliers import inlier_mask, odd_kernel
from lpl_lightning.noise import DDPM

__all__ = ["LatentPerceptualLoss"]

FINEST = 8
"""The windows of the outlier mask are meant for maps so many times as fine as the latent, as the paper's finest are."""


class LatentPerceptualLoss(nn.Module):
    """Distance between a clean latent and its estimate, seen by the autoencoder's decoder (eq. 3).

    It can serve any loop: ``loss + 3.0 * lpl(z0_hat, z0, noise_to_signal).mean()``. The decoder runs only for the
    samples that pass the gate, and only as deep as asked. Every option but the first two is as the preset has it unless
    it is given; ``losses/README.md`` has the table of all of them, with their sources.

    Args:
        autoencoder: The frozen autoencoder whose decoder looks at the latents; a module that is none yet is made one,
            and so frozen, by ``Autoencoder(module)``.
        preset: ``paper``: the paper's choices. ``diffusers``: those of the public example's command line, number for
            number. ``rgb``: mean squared error of decoded images, the paper's baseline for its ablation of depth.
        depth: How many of the decoder's feature maps are compared, shallow to deep, at most all there are (the paper's
            5 are a middle block and four others; 0 compares none and is zero), or the names of stages, among them
            ``image``, the decoder's output.
        threshold: tau, a noise-to-signal ratio sigma / alpha, or a ``Threshold`` in another unit, such as
            ``{"log_snr": -2.2}`` in a config. Infinity gates nothing.
        reference_side: Side of the latents, in positions, that ``threshold``, ``dilation`` and ``erosion`` are meant
            for. Those of other sides have all three scaled in proportion, as the paper does: with 32, 3 is 6 for
            latents of 64 x 64. 0 turns it off.
        gate_softness: See ``gate_weight``: 1 is the paper's hard gate.
        normalization: ``standardize`` each channel over positions, or divide each position by its ``channel_norm``.
        statistics: Whose statistics normalize; see ``standardize`` and ``channel_normalize``.
        eps: Added to variances (by default 1e-5) or to norms (1e-10 for a map's own, 1e-6 for shared ones).
        relative_eps: Added to variances, times their mean over the map's channels; see ``standardize``. By default 0.
        distance: Of single values; see ``masked_distance``.
        huber_delta: Where ``huber`` becomes linear.
        depth_weights: See ``depth_weight``; or a list with a weight for each compared map.
        mask_outliers: Whether outliers are left out.
        mask_source: Whose outliers: the ``predicted`` map's or the ``target``'s.
        mask_upscale: Only maps more than so many times finer than the first are masked.
        quantile: See ``inlier_mask``.
        widening: See ``inlier_mask``.
        dilation: Window that dilates the map of inliers, in positions of a map 8 times as fine as a latent of
            ``reference_side`` (or as the first map, if that is 0); others have windows in proportion to their side, to
            the nearest odd number, which cover the same share of the image. A list gives each compared map's as it is.
        erosion: Window that erodes it afterwards, likewise.
        mask_before_normalization: Whether the clean map's outliers are set to zero before it is normalized.
        position_reduction: ``mean`` over a channel's inliers, or ``sum``, as the norm of eq. 3 is printed.
        depth_reduction: ``sum`` over maps, or ``mean``.
        reduction: ``none`` gives (B,); ``mean`` and ``sum`` a scalar over the whole batch; ``mean_passed`` the mean
            over the samples that passed, as the public example has it, whose weight then depends on how many did.
        post_quant_conv: Whether the latents pass the decoder's ``post_quant_conv``, if it has one. The public example
            leaves it out.
        nonfinite: What to do where a value is not finite; see ``NonFiniteGuard``.
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
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name in LossOptions.__dataclass_fields__}
        self.autoencoder = autoencoder if isinstance(autoencoder, Autoencoder) else Autoencoder(autoencoder)
        self.preset = preset
        self.options = LossOptions.of(preset, **given)
        self.stages = self.autoencoder.stage_names
        self.compared = self._compared(self.options.depth)
        for name in ("depth_weights", *(("dilation", "erosion") if self.options.mask_outliers else ())):
            self.options.of_map(name, 0, len(self.compared))
        self.ddpm: DDPM | None = None
        self._guard = NonFiniteGuard(self.options.nonfinite)
        self._announced = False
        self._seen = False

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
        if self._announced:
            return
        self._announced = True
        units = ", ".join(f"{name} {value:.4g}" for name, value in equivalents(self.tau(z), self.ddpm).items())
        scaled = f" ({self._scale(z):.4g} times that of side {self.options.reference_side})"
        rank_zero_info(
            f"LPL compares {', '.join(self.compared) or 'nothing'}; on latents of side {self._side(z):.4g} its "
            f"threshold is {units}{scaled if self._scale(z) != 1 else ''}."
        )

    def flush(self) -> None:
        """Raise for the last call, if that is still to come; see ``NonFiniteGuard``."""
        self._guard.flush()

    def forward(self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None = None) -> Tensor:
        """Compute the loss of each sample.

        Args:
            z0_hat: Estimates of the clean latents (B, C, *positions), scaled as the autoencoder's ``encode`` gives
                them.
            z0: Clean latents, likewise; no gradient flows to them.
            noise_to_signal: (B,) sigma / alpha of each sample; without it all pass the gate. On the CPU it costs no
                wait for an accelerator.

        Returns:
            (B,), or a scalar if ``reduction`` says so; zero where gated, always connected to ``z0_hat``; in the
            decoder's precision but at least float32.
        """
        return self.evaluate(z0_hat, z0, noise_to_signal)[0]

    def evaluate(
        self, z0_hat: Tensor, z0: Tensor, noise_to_signal: Tensor | None = None, diagnose: bool = False
    ) -> tuple[Tensor, Diagnostics | None]:
        """Compute the loss, and what can be seen of it.

        Args:
            z0_hat: See ``forward``.
            z0: See ``forward``.
            noise_to_signal: See ``forward``.
            diagnose: Whether to give diagnostics, which costs a few reductions over the feature maps.

        Returns:
            The loss as of ``forward``, and the diagnostics or None.
        """
        check_latents(z0_hat, z0, noise_to_signal)
        self.announce(z0)
        dtype = torch.promote_types(self.autoencoder.dtype, torch.float32)
        # An empty sum: zero, connected to the graph, and with a zero gradient even where z0_hat is not finite.
        losses = z0_hat.flatten(1)[:, :0].sum(dim=1).to(dtype)
        if noise_to_signal is None:
            # A view, so that what the guard hangs on it concerns nobody else.
            weight, passed, kept_hat, kept = None, None, z0_hat.view_as(z0_hat), z0
        else:
            weight = gate_weight(noise_to_signal.detach(), self.tau(z0), self.options.gate_softness)
            chosen = weight.nonzero().squeeze(1)
            weight, passed = _to(weight[chosen].to(dtype), z0), _to(chosen, z0)
            kept_hat, kept = z0_hat[passed], z0[passed]
        if len(kept) == 0 or not self.compared:
            return self._reduce(losses, len(kept)), None
        parts, records, origins = self._parts(kept_hat, kept, diagnose)
        ungated, finite = self._guard(parts.sum(dim=0), origins, kept_hat)
        if weight is None or passed is None or noise_to_signal is None:
            losses = losses + ungated
        else:
            losses = losses.index_add(0, passed, ungated * weight)
        found = None
        if diagnose:
            relative_time = None
            if noise_to_signal is not None:
                nsr = _to(noise_to_signal.detach()[chosen].to(dtype), z0)
                relative_time = (1 - 1 / (1 + nsr)) / (1 - 1 / (1 + self.tau(z0)))
            found = Diagnostics(records, parts.detach(), finite, relative_time)
        return self._reduce(losses, len(kept)), found

    def _parts(
        self, z0_hat: Tensor, z0: Tensor, diagnose: bool
    ) -> tuple[Tensor, dict[str, MapRecord], dict[str, Tensor]]:
        """The compared maps' parts (maps, B) of the loss of samples that have passed, and what the guard looks at."""
        options, count = self.options, len(self.compared)
        # The first map too, whose side the others' are measured by.
        names = list(dict.fromkeys((self.stages[0], *self.compared)))
        skip = () if options.post_quant_conv else ("post_quant_conv",)
        with torch.no_grad():
            targets = self.autoencoder.features(z0, names, skip)
        predictions = self.autoencoder.features(z0_hat, names, skip)
        first = self._side(predictions[0], z0.ndim)
        parts: list[Tensor] = []
        records: dict[str, MapRecord] = {}
        origins = {"the estimate z0_hat": z0_hat, "the clean latent z0": z0}
        with torch.autocast(z0.device.type, enabled=False):
            for name, predicted, target in zip(names, predictions, targets, strict=True):
                if name not in self.compared:
                    origins[self._place(name, names)] = predicted
                    continue
                predicted, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (predicted, target))
                if not self._seen and options.normalization == "standardize" and options.statistics != "none":
                    note_constant_channels(name, target, options.eps, options.relative_eps)
                index, side = len(parts), self._side(predicted, z0.ndim)
                mask = None
                if options.mask_outliers and side / first > options.mask_upscale:
                    mask = inlier_mask(
                        (predicted if options.mask_source == "predicted" else target).detach(),
                        options.quantile,
                        options.widening,
                        self._kernel("dilation", index, side, first),
                        self._kernel("erosion", index, side, first),
                    )
                part = self._weight(index, side / first) * self._distance(predicted, target, mask)
                parts.append(part / count if options.depth_reduction == "mean" else part)
                origins[self._place(name, names)] = part
                if diagnose:
                    records[name] = record(predicted, target, mask)
            self._seen = True
            return torch.stack(parts), records, origins

    def _place(self, name: str, names: list[str]) -> str:
        """Where a value arose that is first seen in the stage ``name`` of those looked at, ``names``."""
        before = self.stages[max(0, self.stages.index(name) - 1)]
        if before in names:
            return f"the decoder's stage {name!r}"
        return f"the decoder's stages after {names[names.index(name) - 1]!r}, up to {name!r}"

    def _compared(self, depth: int | tuple[str, ...]) -> tuple[str, ...]:
        """Names of the stages to compare, in the decoder's order."""
        if isinstance(depth, int):
            return self.autoencoder.feature_names[:depth]
        if unknown := [name for name in depth if name not in self.stages]:
            raise ValueError(f"`depth` must name stages among {list(self.stages)}, got {unknown}.")
        return tuple(name for name in self.stages if name in depth)

    def _distance(self, predicted: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        options = self.options
        if mask is not None and options.mask_before_normalization:
            target = target * mask
        if options.normalization == "standardize":
            predicted, target = standardize(predicted, target, options.statistics, options.eps, options.relative_eps)
        else:
            predicted, target = channel_normalize(predicted, target, options.statistics, options.eps)
        return masked_distance(
            predicted, target, mask, options.distance, options.huber_delta, options.position_reduction
        )

    def _weight(self, index: int, upscale: float) -> float:
        weight: DepthWeights | float = self.options.of_map("depth_weights", index, len(self.compared))
        return depth_weight(upscale, weight) if isinstance(weight, str) else weight

    def _kernel(self, name: str, index: int, side: float, first: float) -> int:
        """Side of a window on a map of this side, the first map's being ``first``."""
        size: int = self.options.of_map(name, index, len(self.compared))
        if isinstance(getattr(self.options, name), tuple):
            return size
        # As many times finer as the maps that the sizes are meant for are than a latent.
        reference = FINEST * (self.options.reference_side or first)
        return odd_kernel(size, side / reference)

    def _side(self, maps: Tensor, ndim: int | None = None) -> float:
        """Side of latents or of feature maps, in positions.

        Args:
            maps: (B, C, *positions).
            ndim: Axes of the latents. Maps with fewer, such as tokens, count as squares or cubes.
        """
        if ndim is not None and maps.ndim != ndim:
            return float(maps[0, 0].numel() ** (1 / (ndim - 2)))
        return latent_side(maps, self.autoencoder.is_video)

    def _scale(self, z: Tensor) -> float:
        """Side of the latents over the side that the options are meant for."""
        return self._side(z) / self.options.reference_side if self.options.reference_side else 1.0

    def _reduce(self, losses: Tensor, passed: int) -> Tensor:
        match self.options.reduction:
            case "none":
                return losses
            case "mean":
                return losses.mean()
            case "sum":
                return losses.sum()
            case "mean_passed":
                return losses.sum() / max(1, passed)


def _to(values: Tensor, z: Tensor) -> Tensor:
    """Values on the device of latents; nothing waits for a copy to an accelerator."""
    return values.to(z.device, non_blocking=z.device.type != "cpu")
