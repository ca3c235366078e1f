"""Metrics over one network's features: Frechet and kernel distance, Inception Score, precision, recall, and so on.

Each image passes through the network once. Frechet distances are of all images; what compares pairs of images is of
``max_images`` of each set at most, drawn by a fixed seed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from lpl_lightning.arguments import at_least
from lpl_lightning.evaluation.gathering import Moments, Rows
from lpl_lightning.evaluation.measure import Measure, Role, Sets
from lpl_lightning.evaluation.report import Resampling, Value
from lpl_lightning.metrics.classifier_features import InceptionFeatures
from lpl_lightning.metrics.features import FeatureExtractor
from lpl_lightning.metrics.frechet import frechet_distance
from lpl_lightning.metrics.gaussian import gaussian
from lpl_lightning.metrics.memorization import memorization_distance
from lpl_lightning.metrics.prdc import Neighbours, neighbours
from lpl_lightning.metrics.reference import ReferenceStatistics

__all__ = ["FeatureMetrics"]

INCEPTION = "inception"
"""What FID's network is called."""

SEED = 0
"""Of what torchmetrics shuffles, and of which images are kept."""

SPLITS = 10
"""Parts of the images that the Inception Score is a mean over (Salimans et al., 2016)."""

SUBSETS = 100
"""Draws that the kernel distance is a mean over (Binkowski et al., 2018)."""


class FeatureMetrics(Measure):
    """Metrics over the features of one network.

    Of FID's Inception they are ``fid``, ``kid``, ``inception_score``, ``mifid`` and ``rfid``, with ``_NAME`` after it
    where a name is given; of other networks ``frechet_NAME``, ``kernel_NAME``, ``memorization_NAME`` and
    ``reconstruction_frechet_NAME``. Of any there are ``precision_NAME``, ``recall_NAME``, ``density_NAME`` and
    ``coverage_NAME``.

    FID is ``metrics.frechet_distance``, which stays exact with fewer images than features and in trainers of less
    precision; on the same features torchmetrics gives the same. MiFID is ``metrics.memorization_distance``, which
    torchmetrics gives where real images are exchanged with generated ones. KID and Inception Score are torchmetrics'.

    Args:
        extractor: The network.
        name: NAME above; by default that of the network, ``inception`` of FID's.
        neighbours: Which neighbour a ball of precision, recall, density and coverage reaches to; None leaves them out.
        kernel: Whether to compute the kernel distance, the mean over 100 draws of ``kernel_subset`` images of a set.
        kernel_subset: Images in a draw; all where there are fewer, and then one draw if both sets are as many.
        memorization: Whether to compute MiFID, which real images should be the training images for.
        max_images: Images of a set that pairs are made of; 50,000 of 2,048 features take 400 MB a set.
        allow_few: Allow fewer images than features, of which the Frechet distance is biased by their number.
        statistics: File that the Frechet distance is taken to, in place of the real images: ``ReferenceStatistics``
            (.safetensors), or published ones (.npz with ``mu`` and ``sigma``), of which it is for you to know that the
            network and its preparation are the same.
        statistics_count: Number of images that an .npz file is of.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        name: str | None = None,
        neighbours: int | None = 5,
        kernel: bool = True,
        kernel_subset: int = 1000,
        memorization: bool = False,
        max_images: int = 50_000,
        allow_few: bool = False,
        statistics: str | None = None,
        statistics_count: int | None = None,
    ) -> None:
        super().__init__()
        at_least(2, kernel_subset=kernel_subset, max_images=max_images)
        if neighbours is not None:
            at_least(1, neighbours=neighbours)
        self.extractor = extractor
        self.is_inception = isinstance(extractor, InceptionFeatures) and extractor.dim == 2048
        default = INCEPTION if self.is_inception else re.sub(r"\W+", "_", Path(extractor.name).name).strip("_")
        self.name = default if name is None else name
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"`name` must be of letters, digits and underscores, got {self.name!r}.")
        self.neighbours, self.kernel, self.kernel_subset = neighbours, kernel, kernel_subset
        self.memorization, self.max_images, self.allow_few = memorization, max_images, allow_few
        self._made_with = extractor.provenance()
        self.statistics = self._read(statistics, statistics_count)

    def _read(self, path: str | None, count: int | None) -> ReferenceStatistics | None:
        if path is None:
            return None
        file = Path(path).expanduser()
        if file.suffix != ".npz":
            found = ReferenceStatistics.load(file)
            found.check(self._made_with)
        elif count is None:
            raise ValueError(f"`statistics_count` must say how many images {path} is of, which the file does not.")
        else:
            found = ReferenceStatistics.read_npz(file, self._made_with, count)
        if found.count < self._least:
            raise ValueError(
                f"`statistics`: {path} is of {found.count} images, fewer than the {self.extractor.dim} features. Give "
                "one of more, or set `allow_few`."
            )
        return found

    @property
    def label(self) -> str:
        """``features_NAME``."""
        return f"features_{self.name}"

    def provenance(self) -> dict[str, Any]:
        """That of the network, and of how many images pairs are made, if any are."""
        return {**self._made_with, "max_images": self.max_images if self._pairs else 0}

    def check(self, sets: Sets) -> None:
        """Refuse fewer images than features or neighbours."""
        remedy = "Give more images, or set `allow_few`, which makes the Frechet distance depend on their number."
        for kind, count in (("real", sets.real), ("generated", sets.generated)):
            # The covariance of real images that `statistics` stand in for is of no use.
            spared = kind == "real" and self.statistics is not None and sets.autoencoder is None
            if count < self._least and not spared:
                raise ValueError(
                    f"{self.name}: a covariance of {self.extractor.dim} features needs {self._least} images or more, "
                    f"got {count} {kind} ones. {remedy if count > 1 else 'Give more images.'}"
                )
            kept = min(count, self.max_images)
            if self.neighbours is not None and kept <= self.neighbours:
                raise ValueError(
                    f"{self.name}: balls to the neighbour {self.neighbours} need {self.neighbours + 1} images or "
                    f"more, got {kept} {kind} ones. Give more images, or lower `neighbours`."
                )

    def begin_real(self) -> None:
        """Forget the real images and their reconstructions."""
        self._real = Moments(self.extractor.dim, self.device)
        self._reconstructed = Moments(self.extractor.dim, self.device)
        self._real_rows = Rows(self.extractor.dim, self.device)
        self._real_kept = self._drawn(self.sets.real)
        self._found_real: dict[str, Tensor] = {}

    def begin_generated(self) -> None:
        """Forget the generated images."""
        self._generated = Moments(self.extractor.dim, self.device)
        self._generated_rows = Rows(self.extractor.dim, self.device)
        self._generated_kept = self._drawn(self.sets.generated)
        self._samples: dict[str, Tensor] = {}
        self._draws_are_one = False

    def _drawn(self, count: int) -> Tensor:
        """Which images of a set are kept for pairs, (count,)."""
        kept = torch.zeros(count, dtype=torch.bool)
        kept[torch.randperm(count, generator=torch.Generator().manual_seed(SEED))[: self.max_images]] = True
        return kept

    @property
    def _least(self) -> int:
        """Images that a covariance is taken of at least."""
        return 2 if self.allow_few else max(2, self.extractor.dim)

    @property
    def _pairs(self) -> bool:
        """Whether anything is computed that needs the features of single images."""
        return self.kernel or self.memorization or self.neighbours is not None

    def update(self, images: Tensor, role: Role, index: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take a batch."""
        features = self.extractor(images)
        if role == "reconstructed":
            self._reconstructed.add(features)
            return
        real = role == "real"
        (self._real if real else self._generated).add(features)
        kept = (self._real_kept if real else self._generated_kept)[index.cpu()].to(features.device)
        if real and not self._pairs:
            return
        (self._real_rows if real else self._generated_rows).add(index.to(kept.device)[kept], features[kept])

    def real_state(self) -> dict[str, Tensor]:
        """Moments of the real images and of their reconstructions, and the real features kept."""
        _, rows = self._real_rows.all()
        state = {"moments": self._real.all(), "rows": rows}
        if self.sets.autoencoder is not None:
            state["reconstructed"] = self._reconstructed.all()
        return state

    def put_real_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what ``real_state`` gave."""
        self._found_real = {name: tensor.to(self.device) for name, tensor in state.items()}

    def compute(self) -> dict[str, Value]:
        """All distances and shares."""
        found = self._found_real
        reference = self._reference()
        mean, covariance = reference.mean.to(self.device), reference.covariance.to(self.device)
        settings = {"real": reference.count} | ({} if self.statistics is None else {"statistics": reference.hash})
        generated = gaussian(self._generated.all(), f"{self.name}, generated", self._least)
        _, rows = self._generated_rows.all()
        whole = len(rows) == self.sets.generated
        self._samples = {self.label: rows} if whole else {}
        distance = frechet_distance(mean, covariance, generated.mean, generated.covariance)
        counts = {"generated": generated.samples, **settings}
        resampling = Resampling("frechet", self.label) if whole else None
        # A covariance of fewer images has wider and narrower axes than that of all (Chong & Forsyth, 2020).
        value = self._value(distance, "lower", counts, None, resampling, ("generated", "real"))
        values = {self._named("fid", "frechet"): value}
        if "reconstructed" in found:
            again = gaussian(found["reconstructed"], f"{self.name}, reconstructed", self._least)
            distance = frechet_distance(mean, covariance, again.mean, again.covariance)
            counts = {"reconstructed": again.samples, **settings}
            value = self._value(distance, "lower", counts, biased_by=("reconstructed", "real"))
            values[self._named("rfid", "reconstruction_frechet")] = value
        if self._pairs or self.is_inception:
            values |= self._of_pairs(found["rows"], rows)
        return values

    def _reference(self) -> ReferenceStatistics:
        """What Frechet distances are taken to."""
        if self.statistics is not None:
            return self.statistics
        real = gaussian(self._found_real["moments"], f"{self.name}, real", self._least)
        return ReferenceStatistics.of(real, self._made_with)

    def _of_pairs(self, real: Tensor, generated: Tensor) -> dict[str, Value]:
        counts = {"generated": len(generated), "real": len(real)}
        values, options = {}, cast(Any, {"feature": nn.Identity(), "sync_on_compute": False})
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.default_generator.manual_seed(SEED)  # which torchmetrics shuffles by, on any device
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
            if isinstance(self.extractor, InceptionFeatures) and self.is_inception:
                score = InceptionScore(splits=SPLITS, **options)
                score.update(self.extractor.logits(generated))
                mean, std = score.compute()
                settings = {"generated": len(generated), "splits": SPLITS, "seed": SEED}
                # A part's own mean stands in for p(y): the score rises with the size of parts.
                value = self._value(mean, "higher", settings, std, biased_by=("generated",))
                values[self._named("inception_score", "")] = value
            if self.kernel:
                size = min(self.kernel_subset, len(real), len(generated))
                subsets = 1 if (one := size == len(real) == len(generated)) else SUBSETS
                kernel = KernelInceptionDistance(subsets=subsets, subset_size=size, **options)
                kernel.update(real.double(), real=True)
                kernel.update(generated.double(), real=False)
                mean, std = kernel.compute()
                settings = counts | {"subsets": subsets, "subset_size": size, "seed": SEED}
                # Unbiased for any number of images (Binkowski et al., 2018).
                self._draws_are_one, spread = one, None if one else std
                values[self._named("kid", "kernel")] = self._value(mean, "lower", settings, spread)
            if self.memorization:
                found = memorization_distance(generated, real)
                # Both the distance and the nearest real image are nearer where there are more.
                value = self._value(found, "lower", counts, biased_by=("generated", "real"))
                values[self._named("mifid", "memorization")] = value
        if self.neighbours is not None:
            members = neighbours(real, generated, self.neighbours)
            values |= self._overlap(members, counts | {"k": self.neighbours})
        return values

    def _overlap(self, members: Neighbours, settings: dict[str, int]) -> dict[str, Value]:
        """Precision and density are resampled as what they are, means over generated images.

        The real images, and so the radii of their balls, are held fixed; the number of generated ones moves neither.

        Recall and coverage are of what the generated images do together. Means over the real images would hold them
        fixed, and with them all that another set of them would change; to draw them with replacement, with the radii
        as they are, gives intervals that are too narrow where few balls hold a point. Neither is resampled.
        """
        overlap, values = members.overlap, {}
        parts: tuple[tuple[str, float, Tensor, Literal["generated", "real"], float, tuple[str, ...]], ...] = (
            ("precision", overlap.precision, members.holding > 0, "generated", 1.0, ("real",)),
            ("recall", overlap.recall, members.recalled, "real", 1.0, ("generated",)),
            ("density", overlap.density, members.holding, "generated", 1 / members.k, ("real",)),
            ("coverage", overlap.coverage, members.covered, "real", 1.0, ("generated", "real")),
        )
        for name, value, each, of, scale, biased_by in parts:
            key = f"{name}_{self.name}"
            whole = len(each) == getattr(self.sets, of)
            if whole:
                self._samples[key] = each.float()
            resampling = Resampling("mean", key, of, scale) if whole and of == "generated" else None
            values[key] = self._value(value, "higher", settings, None, resampling, biased_by)
        return values

    def _named(self, of_inception: str, of_others: str) -> str:
        if not self.is_inception:
            return f"{of_others}_{self.name}"
        return of_inception if self.name == INCEPTION else f"{of_inception}_{self.name}"

    def _value(
        self,
        value: Tensor | float,
        better: Literal["lower", "higher"],
        settings: Mapping[str, int | str],
        std: Tensor | None = None,
        resampling: Resampling | None = None,
        biased_by: tuple[str, ...] = (),
    ) -> Value:
        provenance = {**self._made_with, **settings}
        return Value(float(value), better, provenance, None if std is None else float(std), resampling, biased_by)

    def samples(self) -> dict[str, Tensor]:
        """Features of the generated images, and of which balls each image is a member."""
        return self._samples

    def write(self, folder: Path) -> list[str]:
        """Write what the Frechet distance is taken to."""
        reference = self._reference()
        reference.save(folder / f"reference_{self.name}.safetensors")
        notes = []
        if self._draws_are_one:
            notes.append(
                f"{self._named('kid', 'kernel')}: `kernel_subset` takes in all images of both sets, of which there is "
                "but one draw, and no standard deviation."
            )
        if min(reference.count, self.sets.generated) < self.extractor.dim:
            notes.append(
                f"{self.name}: there are fewer images than the {self.extractor.dim} features, so that the Frechet "
                "distance depends on their number and compares with none of another number."
            )
        if self.neighbours is not None:
            notes.append(
                f"recall_{self.name}, coverage_{self.name}: no intervals, since drawing images anew does not tell how "
                "far they would go with other generated ones."
            )
        return notes
