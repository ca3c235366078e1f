"""Statistics of a reference set: computed once, kept in a file, and refused by what they do not fit.

The file is safetensors with the mean and covariance; its metadata says, as JSON, what the features are of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpl_lightning.metrics.gaussian import Gaussian

__all__ = ["ReferenceStatistics"]

_FORMAT = "lpl_lightning reference statistics 1"

Provenance = Mapping[str, str | int | bool]


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Mean and covariance of the features of a set of images, and where they are from.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64.
        count: Number of images.
        extractor: What the extractor says of itself (``FeatureExtractor.provenance``).
        images: What the images are, such as a name, a side and a hash.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    extractor: Provenance
    images: Provenance = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.mean), len(self.mean))
        if self.mean.ndim != 1 or self.covariance.shape != shape:
            got = f"{tuple(self.mean.shape)}, {tuple(self.covariance.shape)}"
            raise ValueError(f"`mean` and `covariance` must be (D,) and (D, D), got {got}.")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("`mean` and `covariance` must be finite: look for NaN in the reference images.")

    @classmethod
    def of(cls, found: Gaussian, extractor: Provenance, images: Provenance | None = None) -> ReferenceStatistics:
        """From what ``GaussianStatistics`` computes."""
        return cls(found.mean, found.covariance, found.samples, dict(extractor), dict(images or {}))

    @property
    def hash(self) -> str:
        """A blake2b hash of mean, covariance and count."""
        digest = blake2b(str(self.count).encode(), digest_size=16)
        for tensor in (self.mean, self.covariance):
            digest.update(tensor.detach().cpu().double().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        said = {"count": self.count, "extractor": dict(self.extractor), "images": dict(self.images), "hash": self.hash}
        tensors = {"mean": self.mean, "covariance": self.covariance}
        tensors = {name: tensor.detach().cpu().double().contiguous() for name, tensor in tensors.items()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        save_file(tensors, unfinished, metadata={"format": _FORMAT, "statistics": json.dumps(said, sort_keys=True)})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else, or was damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There are no reference statistics at {path}: compute and save them first.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            if metadata.get("format") != _FORMAT or set(tensors) != {"mean", "covariance"}:
                raise ValueError(f"it holds {sorted(tensors)} in the format {metadata.get('format')!r}")
            said = json.loads(metadata["statistics"])
            found = cls(tensors["mean"], tensors["covariance"], said["count"], said["extractor"], said["images"])
            if found.hash != said["hash"]:
                raise ValueError("its values are not those that were saved")
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} holds no reference statistics as this version writes them: {error}.") from error
        return found

    def check(self, provenance: Provenance) -> None:
        """Refuse features of another extractor.

        A library of another version is warned of: weights and settings being equal, it computes the same by intent.

        Args:
            provenance: What the extractor in use says of itself.

        Raises:
            ValueError: It differs from the one that the statistics were made with.
        """
        keys = [*self.extractor, *(key for key in provenance if key not in self.extractor)]
        differ = {
            key: f"{key}: {self.extractor.get(key, 'unsaid')} in the reference, {provenance.get(key, 'unsaid')} in use"
            for key in keys
            if self.extractor.get(key) != provenance.get(key)
        }
        library = differ.pop("library", None)
        if differ:
            raise ValueError(
                f"The reference statistics were made with another extractor ({'; '.join(differ.values())}). Compute "
                "them anew with the one in use, or use the one that they were made with."
            )
        if library:
            rank_zero_warn(f"The reference statistics were made with another version ({library}).")
