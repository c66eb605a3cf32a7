"""Layers of an interrupted compression, kept so that the same command can go on where it stopped.

One safetensors file per decoder layer, in a hidden folder beside the output: the packed tensors of its Linears, norm
parameters that folding changed, what the method wants in the sidecar, and the layer's report. All of it belongs to one
fingerprint of recipe, model files, calibration tokens, device and version. Outputs of kept layers are computed again,
so that a resumed run gives what an uninterrupted one would have given, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

log = logging.getLogger(__name__)

FOLDER = ".{name}.kompakt-layers"
FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class KeptLayer:
    """linears: Linear → parameter → tensor. norms: parameter → value. tensors: for the sidecar. report: JSON-able."""

    linears: dict[str, dict[str, torch.Tensor]]
    norms: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    folded: bool
    report: dict[str, Any]


class LayerStore:
    """The folder of kept layers of one output directory; as a context, it is removed when all went well."""

    def __init__(self, folder: Path, *, writes: bool = True):
        self.folder, self.writes = folder, writes

    @classmethod
    def open(cls, output: Path, facts: Mapping[str, Any], *, writes: bool = True) -> LayerStore:
        """facts: JSON-able, what the layers depend on. writes: False for a process that reads what another one keeps.

        Raises ValueError if the folder holds layers of another run, or cannot be written.
        """
        output = output.absolute()
        store = cls(output.parent / FOLDER.format(name=output.name), writes=writes)
        mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = store.folder / FINGERPRINT
        if file.is_file() and file.read_text("utf-8") != mark:
            raise ValueError(
                f"{store.folder} holds layers of another recipe, model, calibration text, device or version; delete "
                "it, or run without --resume"
            )
        if not writes:
            return store
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{FINGERPRINT}.partial-{os.getpid()}")
            partial.write_text(mark, "utf-8")
            partial.rename(file)
        except OSError as error:
            raise ValueError(f"layers cannot be kept in {store.folder}: {error.strerror}") from error
        if len(store):
            log.warning("resuming: %d layers are kept from an earlier run", len(store))
        return store

    def load(self, index: int) -> KeptLayer | None:
        """A kept layer on the CPU, or None. Raises ValueError for a damaged file."""
        file = self._file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                found = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                notes = json.loads(handle.metadata()["layer"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it, and the layer is quantized again") from error
        groups: dict[str, dict[str, torch.Tensor]] = {"linear": {}, "norm": {}, "tensor": {}}
        for key, tensor in found.items():
            kind, _, name = key.partition(":")
            groups[kind][name] = tensor
        linears: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in groups["linear"].items():
            name, _, parameter = key.rpartition(".")
            linears.setdefault(name, {})[parameter] = tensor
        return KeptLayer(linears, groups["norm"], groups["tensor"], notes["folded"], notes["report"])

    def save(self, index: int, layer: KeptLayer) -> None:
        """Keeps a layer; the file has its name only when it is complete. ValueError if it cannot be written."""
        tensors = {
            f"linear:{name}.{key}": tensor for name, tensors in layer.linears.items() for key, tensor in tensors.items()
        }
        tensors |= {f"norm:{name}": tensor for name, tensor in layer.norms.items()}
        tensors |= {f"tensor:{name}": tensor for name, tensor in layer.tensors.items()}
        notes = json.dumps({"folded": layer.folded, "report": layer.report})
        partial = self._file(index).with_suffix(f".partial-{os.getpid()}")
        try:
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, partial, {"layer": notes})
            partial.rename(self._file(index))
        except (SafetensorError, OSError) as error:
            partial.unlink(missing_ok=True)
            raise ValueError(f"layer {index} cannot be kept in {self.folder}: {error}") from error

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Nothing needs to be kept once the output is complete."""
        if not self.writes:
            return
        if kind is None or not len(self):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            log.warning("%d finished layers are kept in %s for the same command", len(self), self.folder)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"


def model_files(source: Path) -> list[list[Any]]:
    """Name, size and time of change of every file of a model that its weights depend on; JSON-able."""
    files = sorted([*source.glob("*.safetensors"), *source.glob("*.json")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
