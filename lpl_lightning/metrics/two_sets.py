"""Metrics that compare two sets, of which a batch belongs to one."""

from __future__ import annotations

from typing import Any, NoReturn

from torchmetrics import Metric

__all__ = ["TwoSetsMetric"]


class TwoSetsMetric(Metric):
    """A metric of real and generated images, which come by ``update(..., real=...)``; ``compute`` gives its value.

    A call, ``metric(batch, real=False)``, is refused: torchmetrics would have it give the value of the batch alone,
    which has no other set to be compared with, and would lose all that had come before in trying.
    """

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be called; nothing that was seen is lost.

        Raises:
            ValueError: Always.
        """
        name = type(self).__name__
        raise ValueError(
            f"`{name}` must be given batches by `update`, got a call: a batch of one set alone has no value. Use "
            "`metric.update(batch, real=...)`, and `metric.compute()` at the end."
        )
