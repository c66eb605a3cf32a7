"""The directory kompakt writes: staging, sidecar, checksums. A directory has its name only when it is complete.

`kompakt.json` holds the recipe, the coverage, the policies of the slots and checksums; `kompakt.safetensors` holds
tensors that a method keeps. Both stand beside an ordinary compressed-tensors or float checkpoint,
which is correct without them.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..quant.method import AttentionPolicy, CachePolicy
from ..sparsify.method import SparsityPolicy
from .cache_methods import kv_cache_methods
from .layer_policies import arithmetic_of, combined, sparsity_of
from .sidecar import check_sidecar, first_error
from .untrusted import check_entry, file_inside, header, read_json, weight_files

SIDECAR_VERSION = 1
SIDECAR = "kompakt.json"
SIDECAR_TENSORS = "kompakt.safetensors"
REPORT = "report.html"
EDITABLE = (SIDECAR, "README.md", REPORT)
"""Files that have no checksum: this one itself, the card, which may be rewritten by hand, and the report, which is made
again when there is more to tell.
"""
STAGING = ".{name}.kompakt-{pid}"


def check_output(output: Path, *, overwrite: bool, expected_bytes: int = 0) -> None:
    """ValueError if `output` cannot become a new directory: it exists, is unwritable, or the disk is too small."""
    if output.exists():
        if not output.is_dir():
            raise ValueError(f"output {output} is a file")
        if any(output.iterdir()):
            if not overwrite:
                raise ValueError(
                    f"output directory {output} exists and is not empty; choose another or pass --overwrite"
                )
            if not (output / SIDECAR).is_file():
                raise ValueError(f"output directory {output} was not written by kompakt; it is not overwritten")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output directory {output} cannot be created: {parent} is not writable")
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise ValueError(f"output needs {expected_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free")


@contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `output` when the block ends well, and is removed when it does not.

    Siblings left by killed runs are removed first.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    created = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    staging = output.parent / STAGING.format(name=output.name, pid=os.getpid())
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(output)
            staging.mkdir()
        except OSError as error:
            raise ValueError(f"output directory {output} cannot be created: {error.strerror}") from error
        yield staging
        _publish(staging, output)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in created:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, SafetensorError) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        ):
            raise ValueError(f"writing {output} failed and nothing was left behind: {error}") from error
        raise


def _publish(staging: Path, output: Path) -> None:
    for file in staging.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = output.parent / STAGING.format(name=output.name, pid=f"{os.getpid()}-old")
    try:
        if output.exists():
            output.rename(old)
        staging.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(output: Path) -> list[Path]:
    """Removes staging siblings of `output` whose process is gone; returns them. A set-aside old output is put back."""
    removed = []
    for path in sorted(output.parent.glob(STAGING.format(name=glob.escape(output.name), pid="*"))):
        pid, _, kind = path.name.rpartition("-kompakt-")[2].rpartition("kompakt-")[2].partition("-")
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if kind == "old" and not output.exists():
            path.rename(output)
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `kompakt.safetensors`, readable like any other file of the directory (safetensors makes its files
    private).
    """
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SIDECAR_TENSORS, {"format": "pt"}
    )
    mask = os.umask(0)
    os.umask(mask)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def write_sidecar(directory: Path, content: dict[str, Any]) -> None:
    """Writes `kompakt.json` with checksums of every safetensors file, which are compared whenever the directory is
    loaded, and of the files beside them, which `verify` compares; so it comes last.
    """
    others = (
        file for file in sorted(directory.iterdir()) if file.suffix != ".safetensors" and file.name not in EDITABLE
    )
    content = {
        "version": SIDECAR_VERSION,
        **content,
        "checksums": {file.name: sha256(file) for file in sorted(directory.glob("*.safetensors"))},
        "companions": {file.name: sha256(file) for file in others if file.is_file()},
    }
    (directory / SIDECAR).write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def write_policies(policies: dict[str, AttentionPolicy]) -> dict[str, Any]:
    """What attention layers run by as the sidecar holds it: under its key "attention" the arithmetic, under "sparsity"
    the patterns, each only where its slot chose any.
    """
    parts = {"attention": arithmetic_of(policies), "sparsity": sparsity_of(policies)}
    return {
        slot: {"layers": {name: policy.as_dict() for name, policy in found.items()}}
        for slot, found in parts.items()
        if found
    }


def read_policies(sidecar: dict[str, Any]) -> dict[str, AttentionPolicy]:
    """What attention layers run by, by module; none in a directory whose recipe leaves attention alone. ValueError if
    damaged.
    """
    attention, sparsity = {}, {}
    for name, policy in _layers(sidecar, "attention").items():
        attention[name] = AttentionPolicy.from_dict(policy)
        try:
            TypeAdapter(AttentionPolicy).validate_json(json.dumps(policy), strict=True)
        except ValidationError as error:
            raise ValueError(f"{SIDECAR} is damaged: attention of {name[:120]}: {first_error(error)}") from error
    for name, policy in _layers(sidecar, "sparsity").items():
        try:
            sparsity[name] = SparsityPolicy.from_dict(policy)
        except ValueError as error:
            raise ValueError(f"{SIDECAR} is damaged: sparsity of {name[:120]}: {error}") from error
    return combined(attention, sparsity)


def _layers(sidecar: dict[str, Any], slot: str) -> dict[str, Any]:
    content = sidecar.get(slot)
    if content is None:
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise ValueError(f"{SIDECAR} is damaged: its {slot} holds no layers")
    return content["layers"]


def write_cache(policy: CachePolicy) -> dict[str, Any]:
    """A cache policy as the sidecar holds it, under its key "kv_cache"; its tensors are those of `cache_tensors`."""
    options = TypeAdapter(type(policy.method)).dump_python(policy.method, mode="json")
    method = {"method": type(policy.method).__module__.rpartition(".")[2], **options}
    return {**method, "layers": {name: sorted(tensors) for name, tensors in policy.layers.items()}}


def cache_tensors(policy: CachePolicy) -> dict[str, torch.Tensor]:
    """What a cache policy keeps in the sidecar's tensors."""
    return {f"{name}.{key}": tensor for name, tensors in policy.layers.items() for key, tensor in tensors.items()}


def read_cache(sidecar: dict[str, Any], directory: Path) -> CachePolicy | None:
    """The cache policy of a directory; None if its recipe leaves the cache alone. ValueError if damaged."""
    content = sidecar.get("kv_cache")
    if content is None:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise ValueError(f"{SIDECAR} is damaged: its kv_cache holds no layers")
    options = {name: value for name, value in content.items() if name not in ("method", "layers")}
    methods = kv_cache_methods()
    if not isinstance(content.get("method"), str) or content["method"] not in methods:
        raise ValueError(
            f"kv_cache method {str(content.get('method'))[:80]!r} is unknown to this kompakt; "
            f"known: {', '.join(methods)}"
        )
    try:
        method = TypeAdapter(methods[content["method"]]).validate_python(options)
    except ValidationError as error:
        raise ValueError(f"{SIDECAR} is damaged: kv_cache {first_error(error)}") from error
    for name, keys in content["layers"].items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"{SIDECAR} is damaged: kv_cache of {name[:120]} is no list of tensors")
    wanted = [f"{name}.{key}" for name, keys in content["layers"].items() for key in keys]
    stored: dict[str, torch.Tensor] = {}
    if wanted:
        tensors = header(file_inside(directory, SIDECAR_TENSORS, where=SIDECAR))
        missing = sorted(set(wanted) - set(tensors))
        if missing:
            raise ValueError(f"{SIDECAR_TENSORS} lacks {missing[0]}, which {SIDECAR} names")
        stored = {name: tensors[name].read() for name in wanted}
    return CachePolicy(
        method, {name: {key: stored[f"{name}.{key}"] for key in keys} for name, keys in content["layers"].items()}
    )


def read_sidecar(directory: Path, *, verify: bool = True) -> dict[str, Any]:
    """Content of `kompakt.json`. ValueError if it is absent, damaged, newer than this kompakt, or a checksum differs.

    verify: read every safetensors file and compare its SHA-256.
    """
    file = directory / SIDECAR
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if not file.is_file():
        raise ValueError(f"{directory} holds no {SIDECAR}; it was not written by kompakt")
    for entry in sorted(directory.iterdir()):
        check_entry(entry)
    content = read_json(file_inside(directory, SIDECAR, where="the directory"))
    version = content.get("version")
    if not isinstance(version, int) or not 1 <= version <= SIDECAR_VERSION:
        raise ValueError(
            f"{file} has version {str(version)[:40]}, this kompakt reads up to {SIDECAR_VERSION}; upgrade kompakt"
        )
    check_sidecar(content, str(file))
    if unlisted := sorted(file.name for file in weight_files(directory) if file.name not in content["checksums"]):
        raise ValueError(f"{file} has no checksum of {unlisted[0]}")
    for name, expected in content["checksums"].items():
        stored = file_inside(directory, name, where=SIDECAR)
        if verify and sha256(stored) != expected:
            raise ValueError(f"{stored} is truncated or was changed after it was written (checksum differs)")
    return content


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def weight_bytes(directory: Path) -> int:
    """Bytes of all safetensors files, headers included."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
