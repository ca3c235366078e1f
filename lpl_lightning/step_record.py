"""An optimizer step as it was given to a process, on disk: to be run again, on another machine too.

A folder with ``record.json``, in which everything but tensors is, and ``tensors.safetensors``; nothing in it can run
code. The weights that the step began with are a safetensors file beside it, which the records of all processes share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl_lightning.file_names import inside

__all__ = ["RECORD", "StepRecord", "plain"]

RECORD = "record.json"
_TENSORS = "tensors.safetensors"
_FORMAT = "lpl_lightning step 1"


@dataclass
class StepRecord:
    """What one process did in one optimizer step.

    Attributes:
        about: Everything that is no tensor, as JSON holds it.
        batches: The batches whose gradients were accumulated, as ``training_step`` got them.
        random_states: Of each batch the state of PyTorch's own generators, by device type, before it.
    """

    about: dict[str, Any]
    batches: list[Any]
    random_states: list[dict[str, Tensor]] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Write the folder, whole or not at all; one that is there is replaced.

        Raises:
            Exception: Whatever the disk or safetensors say.
        """
        tensors: dict[str, Tensor] = {}
        packed = _pack({"batches": self.batches, "random_states": self.random_states}, tensors, "")
        unfinished = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            save_file(tensors, unfinished / _TENSORS)
            said = {"format": _FORMAT, **self.about, "packed": packed}
            (unfinished / RECORD).write_text(json.dumps(said, indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            return unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def read(cls, folder: str | Path) -> StepRecord:
        """Read a folder, or the one that a ``record.json`` lies in.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is something else, or a batch held what cannot be read again.
        """
        given = Path(folder).expanduser()
        path = given if given.name == RECORD else given / RECORD
        if not path.is_file():
            raise FileNotFoundError(
                f"`record` must be a folder that StepGuard has written, with {RECORD} in it: there is no {path}."
            )
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["format"] != _FORMAT:
                raise ValueError(f"its `format` is {about['format']!r}")
            about["folder"] = str(path.parent)
            if about.get("weights") is not None:
                inside(path.parent.parent, about["weights"])
            # Copies begin at addresses as new tensors do: sums over others may be added up in another order.
            tensors = {name: tensor.clone() for name, tensor in load_file(path.with_name(_TENSORS)).items()}
            content = _unpack(about.pop("packed"), tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"`record`: {path} is no step as this version writes it: {error}.") from error
        return cls(about, content["batches"], content["random_states"])

    @property
    def weights(self) -> Path | None:
        """Where the step's weights are; None where they are not."""
        name = self.about.get("weights")
        path = None if name is None else Path(self.about["folder"]).parent / name
        return path if path is not None and path.is_file() else None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values by name that JSON holds."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


def _pack(value: Any, tensors: dict[str, Tensor], key: str) -> Any:
    """A value with names in place of its tensors, which are put aside."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[name, _pack(part, tensors, f"{key}.{name}".lstrip("."))] for name, part in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(part, tensors, f"{key}.{number}") for number, part in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    return {"other": f"{type(value).__module__}.{type(value).__qualname__}"}


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = packed.items()
    match kind:
        case "tensor":
            # In memory of its own: where the file has it, it need not lie as the original did, and sums are then added
            # up in another order.
            return tensors[value].clone()
        case "items":
            return {name: _unpack(part, tensors) for name, part in value}
        case "list":
            return [_unpack(part, tensors) for part in value]
        case "tuple":
            return tuple(_unpack(part, tensors) for part in value)
        case "value":
            return value
    raise ValueError(f"its batch holds a {value}, which is not written down")
