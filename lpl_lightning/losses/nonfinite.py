"""What becomes of values that are not finite: named, and never let into a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor

from lpl_lightning.arguments import NotFiniteError
from lpl_lightning.losses.options import NonFinite

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard:
    """Finds samples that are not finite and keeps their gradient out.

    Args:
        policy: ``raise`` stops the run and names where the first such value arose; ``zero`` counts the sample as zero;
            ``skip`` the whole call. With each of them the gradient of what is left out is zero. On an accelerator
            nothing waits for the result: ``raise`` comes at the next call or by ``flush``, and the sample counts as
            zero until then.

    Attributes:
        policy: The policy; ``pass`` gives such a sample's loss as not a number, for ``StepGuard`` to find.
    """

    def __init__(self, policy: NonFinite | Literal["pass"]) -> None:
        self.policy = policy
        self._pending: tuple[Tensor, Any, tuple[str, ...]] | None = None

    def __call__(self, losses: Tensor, finite: Tensor, places: Sequence[str], z0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Replace what is not finite by zero.

        Args:
            losses: (B,) of the samples.
            finite: (places, B) bool, where each sample is finite.
            places: Their names, in the order that values pass them.
            z0_hat: (B, ...) what the losses were computed from; a part of the graph that nothing else uses.

        Returns:
            (B,) finite losses, and (B,) which of them were kept.

        Raises:
            NotFiniteError: A value is not finite, and the policy is ``raise``.
        """
        good = finite.all(dim=0)
        if self.policy == "raise":
            self._check(finite, places)
        kept = good.all().expand_as(good) if self.policy == "skip" else good
        if z0_hat.requires_grad:
            rows = kept.reshape(-1, *[1] * (z0_hat.ndim - 1))

            def keep(gradient: Tensor | None) -> Tensor | None:
                # A zero passed back through what is not finite comes out as not a number.
                return None if gradient is None else torch.where(rows, gradient, torch.zeros_like(gradient))

            z0_hat.register_hook(keep)
        return torch.where(kept, losses, torch.full_like(losses, nan if self.policy == "pass" else 0.0)), kept

    def flush(self) -> None:
        """Raise for the call before, if that is still to come."""
        if self._pending is not None:
            finite, arrived, places = self._pending
            self._pending = None
            arrived.synchronize()
            _raise(finite, places)

    def _check(self, finite: Tensor, places: Sequence[str]) -> None:
        """Raise now, or where that would wait for an accelerator, at the next call."""
        if finite.device.type == "cpu":
            _raise(finite, places)
            return
        self.flush()
        host = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        event = torch.Event(finite.device)
        event.record()
        self._pending = (host, event, tuple(places))

    def __deepcopy__(self, memo: dict[int, Any]) -> NonFiniteGuard:
        return NonFiniteGuard(self.policy)

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy, "_pending": None}


def _raise(finite: Tensor, places: Sequence[str]) -> None:
    """Raise if a value is not finite.

    Args:
        finite: (places, B).
        places: Their names.
    """
    if bool(finite.all()):
        return
    first = int((~finite).any(dim=1).nonzero()[0])
    samples = (~finite[first]).nonzero().flatten().tolist()
    raise NotFiniteError(
        f"The Latent Perceptual Loss is not finite: it arose in {places[first]}, for the samples {samples} of those "
        "that passed the gate. If a decoder's stage is named, run it in float32 (the `dtype` of the Autoencoder); if "
        "the estimate is, look at the denoiser and at alpha near 0. With `nonfinite`='zero' or 'skip' such samples or "
        "batches are left out."
    )
