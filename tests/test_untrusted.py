"""A directory of unknown origin: whatever is changed in it, reading it succeeds or ends in one sentence.

Mutations of every file that kompakt reads, with the checksums as they were or forged to fit. KOMPAKT_FUZZ sets the
number of examples, e.g. KOMPAKT_FUZZ=5000.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from damage import EVERYTHING, forge, forget_peak, peak_bytes
from safetensors.torch import load_file, save_file
from tiny import tiny_directory

from kompakt.cli.main import main
from kompakt.compress import compress, evaluate, load, report, verify
from kompakt.compress.recipe import EvaluationOptions
from kompakt.compress.report_page import page

hypothesis = pytest.importorskip("hypothesis", reason="the extra `test` brings hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = int(os.environ.get("KOMPAKT_FUZZ", "150"))
SLACK = 96 * 2**20
"""Resident memory that a run may gain: code of transformers that is imported on first use, and the allocator's own."""
OPTIONS = EvaluationOptions(window=32, windows=1)
FILES = ("kompakt.json", "recipe.yaml", "config.json", "model.safetensors.index.json", "kompakt.safetensors")
FILES += ("evaluation.json",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with every slot filled and more than one weight file; tests copy it."""
    folder = tmp_path_factory.mktemp("whole")
    base = tiny_directory(folder / "base", steps=2, num_hidden_layers=2)
    compress(base, EVERYTHING, folder / "out", max_shard_size="40KB")
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 1
    return folder / "out"


# Mutations

HUGE = [10**1000, 2**31, 2**40, 2**62, 2**63, 10**30, -1, -(2**40), 0, 1]
VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            "",
            "../secret.safetensors",
            "/etc/passwd",
            "x" * 5000,
            "re:(a+)+$",
            "\x00",
            "\ud800",
            "<script>x</script>",
        ]
    ),
    st.sampled_from(HUGE),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e308, 0.5]),
    st.sampled_from([[], {}, [[]], [1, "a"], {"a": {"b": []}}, [2**62, 2**62], [0, 2**62], ["self_attn"], {"": None}]),
    st.integers(-3, 300),
    st.text(max_size=8),
)
NOISE = st.sampled_from(
    [
        *(b"NaN", b"1e999", b"Infinity", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\x00", b"9" * 6000, b"null"),
        *(b"&a *a", b"!!python/object/apply:os.system [touch x]", b"- " * 3000, b"2001-99-99", b"{}", b"\xef\xbb\xbf"),
    ]
)


def places(content, path=()):
    """Paths to everything in nested JSON."""
    found = [path]
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


def change_json(draw, content):
    """One value replaced, removed, renamed or moved."""
    path = draw(st.sampled_from(places(content)[1:]))
    *parents, key = path
    owner = content
    for parent in parents:
        owner = owner[parent]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "swap"]))
    if how == "replace":
        owner[key] = draw(VALUES)
    elif how == "remove":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[draw(st.text(min_size=1, max_size=6))] = owner.pop(key)
    elif isinstance(owner, dict):
        other = draw(st.sampled_from(sorted(owner)))
        owner[key], owner[other] = owner[other], owner[key]


def change_bytes(draw, data: bytes) -> bytes:
    """Cut, flipped, or something put in."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:place]
    if how == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :] if data else b""
    noise = draw(NOISE)
    return noise if how == "replace" else data[:place] + noise + data[place:]


def change_header(draw, data: bytes) -> bytes:
    """Another header before the same bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    content, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in content if name != "__metadata__"]
    if not names:
        return struct.pack("<Q", draw(st.sampled_from([2**63, 2**40, 0, 7]))) + data[8:]
    name = draw(st.sampled_from(names))
    how = draw(st.sampled_from(["shape", "dtype", "offsets", "name", "swap", "length", "json"]))
    if how == "shape":
        shape = content[name]["shape"]
        content[name]["shape"] = draw(st.sampled_from([[2**40, 2**40], [0, 2**62], [-1], [], shape[::-1], [1, *shape]]))
    elif how == "dtype":
        content[name]["dtype"] = draw(st.sampled_from(["F64", "F32", "F16", "F8_E5M2", "I8", "BOOL", "F99", None]))
    elif how == "offsets":
        content[name]["data_offsets"] = draw(st.sampled_from([[0, 2**62], [2**62, 0], [0, 0], [-4, 4], [0]]))
    elif how == "name":
        content[draw(st.text(max_size=8))] = content.pop(name)
    elif how == "swap":
        other = draw(st.sampled_from(names))
        content[name], content[other] = content[other], content[name]
    elif how == "json":
        change_json(draw, content)
    header = json.dumps(content).encode()
    claimed = draw(st.sampled_from([2**63, 2**40, 0, len(header) + 8])) if how == "length" else len(header)
    return struct.pack("<Q", claimed) + header + body


def change_tensor(draw, file: Path) -> None:
    """Numbers that are legal in the file and wrong in the model."""
    tensors = load_file(file)
    if tensors:
        name = draw(st.sampled_from(sorted(tensors)))
        how = draw(st.sampled_from(["zeros", "nan", "shorter", "double"]))
        tensor = tensors[name]
        if how == "nan" and tensor.is_floating_point():
            tensor.view(-1)[0] = float("nan")
        elif how == "shorter":
            tensors[name] = tensor[:-1].clone()
        elif how == "double" and tensor.is_floating_point():
            tensors[name] = tensor.double()
        else:
            tensors[name] = torch.zeros_like(tensor)
    save_file(tensors, file, {"format": "pt"})


def mutate(draw, directory: Path) -> None:
    """One change to one file."""
    name = draw(st.sampled_from([*FILES, *(file.name for file in sorted(directory.glob("model-*.safetensors")))]))
    file = directory / name
    data = file.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        file.write_bytes(change_bytes(draw, data))
    elif file.suffix == ".json":
        content = json.loads(data)
        inside = content.get("quantization_config") if draw(st.booleans()) else None
        change_json(draw, inside or content)
        file.write_text(json.dumps(content))
    elif file.suffix == ".safetensors":
        if draw(st.booleans()):
            file.write_bytes(change_header(draw, data))
        else:
            change_tensor(draw, file)
    else:
        text = data.decode()
        line = draw(st.sampled_from(text.splitlines()))
        file.write_bytes(text.replace(line, line.partition(":")[0] + ": " + draw(NOISE).decode("latin1")).encode())
    if draw(st.booleans()):
        forge(directory)


# What is done with it


def sentence(error: BaseException) -> str:
    """The message of an error that a user can do something with."""
    text = str(error)
    assert isinstance(error, ValueError), repr(error)
    assert text and "\n" not in text.strip() and len(text) < 1500, text
    return text


def by_library(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        if not isinstance(error, ValueError):
            raise
        return sentence(error)


def attempt(use: str, directory: Path) -> None:
    if use == "load":
        by_library(load, directory)
    elif use == "verify":
        found = by_library(verify, directory)
        if not isinstance(found, str):
            json.dumps(found.as_dict(), allow_nan=False)
    elif use == "evaluate":
        by_library(evaluate, directory, options=OPTIONS, speed=False)
    elif use == "report":
        found = by_library(report, [directory])
        if not isinstance(found, str):
            assert "<script" not in page(found) and json.dumps(found, allow_nan=False)
    elif use == "kompakt verify":
        assert main(["verify", str(directory), "--json"]) in (0, 1, 2)
    else:
        arguments = ["--window", "32", "--windows", "1", "--no-speed"]
        assert main(["evaluate", str(directory), *arguments]) in (0, 2)


USES = ("load", "verify", "verify", "evaluate", "report", "kompakt verify", "kompakt evaluate")


@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 150,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
)
@hypothesis.given(data=st.data())
def test_any_change_ends_in_success_or_one_sentence(data, whole):
    use = data.draw(st.sampled_from(USES))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "out"
        shutil.copytree(whole, directory)
        mutate(data.draw, directory)
        if data.draw(st.booleans()):
            with contextlib.suppress(Exception):  # where the first change left nothing to read
                mutate(data.draw, directory)
        before = {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*")}
        forget_peak()
        held = peak_bytes()
        attempt(use, directory)
        stored = sum(file.stat().st_size for file in directory.iterdir())
        assert peak_bytes() - held <= 2 * stored + SLACK
        assert {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*")} == before
