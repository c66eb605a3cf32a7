"""Reading what a directory of unknown origin holds: JSON, file names, and the headers of safetensors files.

A directory is data. Nothing here runs code, follows a name out of the directory, or allocates by what a header claims:
JSON is read up to `JSON_BYTES`, strictly (UTF-8, no NaN or infinity, nesting as deep as Python's parser goes), and the
headers of safetensors files are checked against the size of the file by safetensors itself. Checksums do not replace
this: whoever changes a file can change its checksum.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

JSON_BYTES = 64 * 2**20
"""Of a JSON file. The sidecar of a model with 100,000 modules takes a third of it."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16}
BITS |= {"U16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Of one number; 8 where none is given."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint by its header: dtype as safetensors spells it ("BF16"), and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * BITS.get(self.dtype, 8) // 8

    def read(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        with safe_open(self.file, framework="pt") as handle:
            return handle.get_tensor(self.name)


def read_json(file: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The object in a JSON file. ValueError, in one sentence, for anything else.

    infinite: let NaN and Infinity pass, which some configs of transformers hold (a `time_step_limit` without an end).
    """
    try:
        size = file.stat().st_size
        if size > JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {JSON_BYTES:,} are read")
        strict: dict[str, Any] = {} if infinite else {"parse_constant": _no_constant, "parse_float": _finite}
        content = json.loads(file.read_bytes().decode("utf-8"), **strict)
    except RecursionError as error:
        raise ValueError(f"{file} is damaged: it is nested too deeply") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no object")
    return content


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def file_inside(directory: Path, name: Any, *, where: str) -> Path:
    """The regular file `name` of `directory`. where: what names it, for the message.

    ValueError if the name is a path, starts with a dot, leads outside through a link, or is no file. Links into the
    blobs of the hub's own cache are followed, since that is how a snapshot is stored.
    """
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise ValueError(f"{where} names {str(name)[:80]!r}, which is not the plain name of a file in {directory}")
    file = directory / name
    if not file.exists() and not file.is_symlink():
        raise ValueError(f"{directory} lacks {name}")
    check_entry(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    return file


def check_entry(entry: Path) -> None:
    """ValueError unless an entry of a directory is a file or folder inside it, or in the hub's own cache."""
    root, real = entry.parent.resolve(), entry.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        # CACHE/models--ORG--NAME/snapshots/REVISION links to the blobs of the repository, they to those of the cache.
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ValueError(f"{entry} is a link to {real}, outside the directory; it is not followed")
    if not real.is_file() and not real.is_dir():
        raise ValueError(f"{entry} is neither a file nor a folder")


def header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name. ValueError if the header is damaged or claims more than the file holds."""
    try:
        with safe_open(file, framework="pt") as handle:
            found = {}
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                found[name] = StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape()))
            return found
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {' '.join(str(error).split())[:300]}") from error


def weight_files(directory: Path) -> list[Path]:
    """Weight files as transformers would read them: `model.safetensors`, or what the index names."""
    if (directory / SINGLE).exists():
        return [file_inside(directory, SINGLE, where="the checkpoint")]
    if not (directory / INDEX).exists():
        raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    return [file_inside(directory, name, where=INDEX) for name in sorted(set(_weight_map(directory).values()), key=str)]


def _weight_map(directory: Path) -> dict[str, str]:
    file = file_inside(directory, INDEX, where="the checkpoint")
    content = read_json(file)
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{file} is damaged: its metadata is no object")
    places = content.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{file} is damaged: its weight_map does not map tensors to files")
    return places


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, by headers alone. ValueError if files and index disagree."""
    files = weight_files(directory)
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in header(file).items():
            if name in found:
                raise ValueError(f"{directory} holds {name[:120]} twice, in {found[name].file.name} and {file.name}")
            found[name] = tensor
    if files[0].name != SINGLE:
        places = _weight_map(directory)
        wrong = sorted(
            {
                name
                for name in places.keys() | found.keys()
                if name not in found or places.get(name) != found[name].file.name
            }
        )
        if wrong:
            raise ValueError(f"{directory / INDEX} and the files disagree about {wrong[0][:120]}")
    return found
