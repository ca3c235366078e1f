"""Files that would run code, and what must become of whoever reads one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

EVIL = "import os\nos.mkdir({!r})\n"


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = str(ran)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.ran,)


def refused(ran: Path, message: str, load: Callable[[], object]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load()
    assert not ran.exists()
    assert "weights_only" not in str(error.value), "no advice to run it"
    assert len(str(error.value)) < 900


def pickled(path: Path, ran: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": Runs(ran)}, "hyper_parameters": {}}, path)
    return str(path)


def with_code(folder: Path, ran: Path, **auto_map: Any) -> None:
    """Name code in a model's folder, as repositories with models of their own do."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            config = json.loads(path.read_text())
            config |= {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": auto_map}
            path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(str(ran)))


def indexed(folder: Path, file: str, ran: Path, load: Callable[[], object]) -> None:
    """Let an index say that a folder's weights lie elsewhere, or are a pickle, and see that it is refused."""
    index, names = folder / f"{file}.index.json", list(load_file(folder / file))
    (folder / file).rename(folder.parent / "secret.safetensors")
    pickled(folder / "evil.bin", ran)
    for name, message in (
        ("../secret.safetensors", "it names '../secret.safetensors', which does not lie in"),
        ("evil.bin", "it names 'evil.bin', which is no .safetensors file"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
        refused(ran, message, load)
    index.write_text("[" * 100_000)
    refused(ran, "index.json cannot be used", load)
