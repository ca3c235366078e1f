"""Weights of a module, kept while averages of them are in their place, and what is set in the meantime."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lpl_lightning.sharding import local, sharded_parameters

__all__ = ["KeptWeights"]


class KeptWeights:
    """Puts averages in the place of weights, and the weights back; of a sharded module each process its own shards.

    Args:
        device: Where the weights are kept; by default where they are.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Let what is in place stay."""
        self.weights: dict[str, Tensor] | None = None
        """By names of parameters, as they were; None while no averages are in place."""
        self._averages: Mapping[str, Tensor] = {}
        # Which parameters, and how often PyTorch saw them changed. No references: with one, no shard can be moved.
        self._put: dict[str, tuple[int, int]] = {}
        self._of: ref[nn.Module] | None = None

    @property
    def in_place(self) -> bool:
        """Whether averages are in place, all of them."""
        return self.weights is not None and self.weights.keys() == self._averages.keys()

    @torch.no_grad()
    def put(self, module: nn.Module, averages: Mapping[str, Tensor]) -> None:
        """Put averages in place.

        Args:
            module: Of whose parameters they are.
            averages: By name; of sharded parameters this process's shards.
        """
        self.weights, self._averages, self._of = {}, averages, ref(module)
        parameters = sharded_parameters(module)
        for name, average in averages.items():
            weight = local(parameters[name].detach())
            self.weights[name] = weight.to(self._device or weight.device, copy=True)
            weight.copy_(average)
            self._put[name] = id(parameters[name]), parameters[name]._version

    @torch.no_grad()
    def put_back(self, module: nn.Module) -> None:
        """Put the weights back, if averages are in their place in this module."""
        if self.weights is not None and self._of is not None and self._of() is module:
            parameters = sharded_parameters(module)
            for name, weight in self.weights.items():
                local(parameters[name].detach()).copy_(weight)
        self.forget()

    @torch.no_grad()
    def leave_what_was_set(self, module: nn.Module) -> None:
        """Keep no more what was loaded, drawn anew or set in the module since: that stays as it is."""
        if not self.weights or self._of is None or self._of() is not module:
            return
        parameters = sharded_parameters(module)
        self.weights = {
            name: kept
            for name, kept in self.weights.items()
            if name in parameters and self._is_in(parameters[name], name)
        }

    def note_move(self, module: nn.Module) -> None:
        """Go on from how PyTorch counts after a move of the module: of shards anew."""
        if self.weights and self._of is not None and self._of() is module:
            parameters = sharded_parameters(module)
            for name in self.weights:
                own, version = self._put[name]
                self._put[name] = own, min(version, parameters[name]._version)

    def _is_in(self, parameter: nn.Parameter, name: str) -> bool:
        """Whether a parameter holds its average still."""
        assert self.weights is not None
        own, version = self._put[name]
        if id(parameter) != own or parameter._version > version:
            return False
        # What is done by `.data` is not counted. Of shards, processes would have to agree on what they see.
        average = self._averages[name].to(self.weights[name].dtype)
        return isinstance(parameter, DTensor) or torch.equal(parameter, average.to(parameter))
