from __future__ import annotations

from pathlib import Path

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
