from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lpl_lightning.metrics.gaussian import GaussianStatistics
from lpl_lightning.metrics.reference import ReferenceStatistics

SAYS: dict[str, str | int | bool] = {
    "class": "X",
    "weights": "ab",
    "antialias": True,
    "input_size": 64,
    "library": "x 1",
}


@pytest.fixture
def reference() -> ReferenceStatistics:
    statistics = GaussianStatistics(5)
    statistics.update(torch.randn(20, 5))
    return ReferenceStatistics.of(statistics.compute(), SAYS, {"name": "photos", "side": 64})


def test_a_file_gives_back_what_was_saved(reference: ReferenceStatistics, tmp_path: Path) -> None:
    path = tmp_path / "new" / "photos.safetensors"
    reference.save(path)
    reference.save(path)  # over the one that is there
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = ReferenceStatistics.load(path)
    assert (found.count, found.extractor, found.images) == (20, SAYS, {"name": "photos", "side": 64})
    torch.testing.assert_close(found.mean, reference.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.covariance, reference.covariance, rtol=0, atol=0)
    assert found.hash == reference.hash
    found.check(SAYS)


def test_the_hash_is_of_mean_covariance_and_count(reference: ReferenceStatistics) -> None:
    moved = replace(reference, mean=reference.mean + 1e-12)
    wider = replace(reference, covariance=reference.covariance * (1 + 1e-12))
    more = replace(reference, count=21)
    assert len({found.hash for found in (reference, moved, wider, more)}) == 4
    assert replace(reference, images={"name": "the same"}).hash == reference.hash


@pytest.mark.parametrize(
    ("key", "value"), [("class", "Y"), ("weights", "cd"), ("antialias", False), ("input_size", 32), ("new", "said")]
)
def test_another_extractor_is_refused(reference: ReferenceStatistics, key: str, value: str | int | bool) -> None:
    told = f"{key}: {SAYS.get(key, 'unsaid')} in the reference, {value} in use"
    with pytest.raises(ValueError, match=f"another extractor .{told}.. Compute them anew"):
        reference.check(SAYS | {key: value})
    with pytest.raises(ValueError, match="weights: ab in the reference, unsaid in use"):
        reference.check({name: said for name, said in SAYS.items() if name != "weights"})


def test_another_version_of_the_library_is_warned_of(reference: ReferenceStatistics) -> None:
    with pytest.warns(UserWarning, match=r"another version \(library: x 1 in the reference, x 2 in use\)"):
        reference.check(SAYS | {"library": "x 2"})


def test_other_files_are_refused(reference: ReferenceStatistics, tmp_path: Path) -> None:
    path = tmp_path / "photos.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no reference statistics at .*photos\.safetensors"):
        ReferenceStatistics.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"photos\.safetensors holds no reference statistics"):
        ReferenceStatistics.load(path)
    save_file({"mean": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"it holds \['mean'\] in the format None"):
        ReferenceStatistics.load(path)
    reference.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = reference.mean.clone()
    changed[0] += 1e-9
    save_file({"mean": changed, "covariance": reference.covariance.contiguous()}, path, metadata=metadata)
    with pytest.raises(ValueError, match="not those that were saved"):
        ReferenceStatistics.load(path)


def test_statistics_that_are_none_are_refused(reference: ReferenceStatistics) -> None:
    with pytest.raises(ValueError, match="`mean` and `covariance` must be"):
        ReferenceStatistics(reference.mean, reference.covariance[:2], 20, SAYS)
    with pytest.raises(ValueError, match="must be finite"):
        ReferenceStatistics(reference.mean * torch.nan, reference.covariance, 20, SAYS)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


FEATURES = np.random.default_rng(0).normal(3, 2, (40, 5))
MU, SIGMA = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)  # as pytorch-fid, clean-fid and ADM compute them


@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-12), (np.float32, 1e-5), (">f8", 1e-12)])
@pytest.mark.parametrize("more", [{}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": np.zeros((2, 4, 4, 3))}])
def test_statistics_of_other_libraries_are_read(tmp_path: Path, dtype: Any, atol: float, more: dict[str, Any]) -> None:
    path = npz(tmp_path / "photos.npz", mu=MU.astype(dtype), sigma=SIGMA.astype(dtype), **more)
    found = ReferenceStatistics.read_npz(path, SAYS | {"features": 5}, 40)
    assert (found.count, found.extractor, found.images) == (40, SAYS | {"features": 5}, {"name": "photos.npz"})
    statistics = GaussianStatistics(5)
    statistics.update(torch.from_numpy(FEATURES))
    own = statistics.compute()
    torch.testing.assert_close(found.mean, own.mean, rtol=0, atol=atol)
    torch.testing.assert_close(found.covariance, own.covariance, rtol=0, atol=atol)
    assert ReferenceStatistics.read_npz(path, SAYS, 40, {"name": "mine"}).images == {"name": "mine"}
    found.save(tmp_path / "own.safetensors")
    assert ReferenceStatistics.load(tmp_path / "own.safetensors").hash == found.hash


ODD = SIGMA.copy()
ODD[0, 1] += 0.1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mean": MU}, "it lacks mu and sigma, and has mean"),
        ({"mu": MU, "cov": SIGMA}, "it lacks sigma, and has mu, cov"),
        ({}, "it lacks mu and sigma, and has nothing"),
        ({"mu": MU[:4], "sigma": SIGMA}, r"floating point, got `mu` \(4,\) float64, `sigma` \(5, 5\) float64"),
        ({"mu": MU[None], "sigma": SIGMA}, r"got `mu` \(1, 5\)"),
        ({"mu": MU, "sigma": SIGMA[0]}, r"`sigma` \(5,\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"floating point, got `mu` \(0,\)"),
        ({"mu": np.float64(1), "sigma": np.float64(1)}, r"floating point, got `mu` \(\)"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "got `mu` .* int64"),
        ({"mu": MU, "sigma": SIGMA.astype(complex)}, "complex128"),
        ({"mu": MU[:3], "sigma": SIGMA[:3, :3]}, "of D = 5, the features of `extractor`"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "all finite, got NaN or infinity"),
        ({"mu": MU, "sigma": SIGMA + np.inf}, "all finite, got NaN or infinity"),
        ({"mu": MU, "sigma": ODD}, "symmetric .*got up to 0.1 between sides"),
        ({"mu": MU, "sigma": -SIGMA}, "got up to 0 between sides and -.* on the diagonal"),
        ({"mu": np.array([{}], dtype=object), "sigma": SIGMA}, "allow_pickle=False"),
    ],
)
def test_npz_files_of_something_else_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    path = npz(tmp_path / "photos.npz", **arrays)
    with pytest.raises(ValueError, match=rf"`path`: .*photos\.npz must be an \.npz file .*{said}"):
        ReferenceStatistics.read_npz(path, {"features": 5}, 40)


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.npz"
    with pytest.raises(FileNotFoundError, match=r"`path`: there is no .*photos\.npz"):
        ReferenceStatistics.read_npz(path, SAYS, 40)
    np.savez_compressed(path, mu=np.random.default_rng(0).normal(size=500), sigma=np.eye(500))
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", MU)
    # At these bytes NumPy, zipfile, zlib and tokenize raise errors of their own.
    flipped = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in (0, 28, 35, 189, 1000)]
    for content in (b"", b"no archive", whole[:-50], *flipped, (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"photos\.npz must be an \.npz file .*as pytorch-fid and others write it"):
            ReferenceStatistics.read_npz(path, SAYS, 40)
    with pytest.raises(ValueError, match="`count` must be 2 or more, got 1"):
        ReferenceStatistics.read_npz(npz(path, mu=MU, sigma=SIGMA), SAYS, 1)
