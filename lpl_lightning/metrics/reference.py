"""Statistics of a reference set: computed once, kept in a file, and refused by what they do not fit.

The file is safetensors with the mean and covariance; its metadata says, as JSON, what the features are of. Those that
other libraries write as .npz do not say it: ``read_npz`` takes them on the caller's word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor

from lpl_lightning.arguments import at_least
from lpl_lightning.metrics.gaussian import Gaussian
from lpl_lightning.metrics.tensor_files import read_tensors, write_tensors

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
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        metadata = {"format": _FORMAT, "statistics": json.dumps(said, sort_keys=True)}
        write_tensors(Path(path), tensors, metadata)

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
            metadata, tensors = read_tensors(Path(path))
            if metadata.get("format") != _FORMAT or set(tensors) != {"mean", "covariance"}:
                raise ValueError(f"it holds {sorted(tensors)} in the format {metadata.get('format')!r}")
            said = json.loads(metadata["statistics"])
            found = cls(tensors["mean"], tensors["covariance"], said["count"], said["extractor"], said["images"])
            if found.hash != said["hash"]:
                raise ValueError("its values are not those that were saved")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} holds no reference statistics as this version writes them: {error}.") from error
        return found

    @classmethod
    def read_npz(
        cls, path: str | Path, extractor: Provenance, count: int, images: Provenance | None = None
    ) -> ReferenceStatistics:
        """Read an .npz file with ``mu`` and ``sigma``, as pytorch-fid, clean-fid and guided-diffusion (ADM) write it.

        It does not say what its features are of: the caller vouches for the arguments. All three divide the covariance
        by n - 1, as is done here. Other arrays in it, such as ADM's ``mu_s`` and ``sigma_s``, are passed over.

        Args:
            path: The file.
            extractor: What the extractor that made the features says of itself (``FeatureExtractor.provenance``).
            count: Number of images.
            images: What the images are; by default the file's name.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else, is damaged, or holds other features than ``extractor`` gives.
        """
        at_least(2, count=count)
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path`: there is no {path}. Give an .npz file with `mu` and `sigma`.")
        wanted = f"`path`: {path} must be an .npz file with `mu` (D,) and `sigma` (D, D)"
        try:
            with path.open("rb") as opened:
                file = np.load(opened, allow_pickle=False)  # pickled arrays could run code
                if isinstance(file, np.ndarray):
                    raise ValueError("it is an .npy file of one array")
                if lacking := [name for name in ("mu", "sigma") if name not in file]:
                    raise ValueError(f"it lacks {' and '.join(lacking)}, and has {', '.join(file.files) or 'nothing'}")
                _check_length(file, extractor.get("features"))
                mu, sigma = file["mu"], file["sigma"]
        except Exception as error:  # readers of archives and of arrays do not agree on a type
            raise ValueError(f"{wanted}, as pytorch-fid and others write it: {error}.") from error
        got = f"got `mu` {mu.shape} {mu.dtype}, `sigma` {sigma.shape} {sigma.dtype}"
        if (
            mu.dtype.kind != "f"
            or sigma.dtype.kind != "f"
            or mu.ndim != 1
            or not mu.size
            or sigma.shape != 2 * mu.shape
        ):
            raise ValueError(f"{wanted} of floating point, {got}.")
        if len(mu) != (features := extractor.get("features", len(mu))):
            raise ValueError(f"{wanted} of D = {features}, the features of `extractor`, {got}.")
        mean, covariance = (torch.from_numpy(values.astype(np.float64)) for values in (mu, sigma))
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{wanted}, all finite, got NaN or infinity. Compute it anew.")
        unequal = float((covariance - covariance.T).abs().max())
        if unequal > 1e-5 * float(covariance.abs().max()) or covariance.diagonal().min() < 0:
            raise ValueError(
                f"{wanted}, a covariance, which is symmetric with a diagonal of 0 or more; got up to {unequal:.3g} "
                f"between sides and {float(covariance.diagonal().min()):.3g} on the diagonal. Compute it anew."
            )
        return cls(mean, covariance, count, dict(extractor), dict(images or {"name": path.name}))

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


def _check_length(file: Any, features: object) -> None:
    """Refuse arrays that are unpacked to more than what they must be: a small archive may fill the memory."""
    largest = 16 * features**2 + 2**16 if isinstance(features, int) else 2**34
    for name in ("mu", "sigma"):
        if (size := file.zip.getinfo(f"{name}.npy").file_size) > largest:
            raise ValueError(f"its `{name}` is unpacked to {size:,} bytes, more than D features have")
