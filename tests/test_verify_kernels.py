"""`verify --kernels`: every op of a directory is compared once, what differs fails, and a CPU has nothing to compare.

On a CPU an op is its reference; told that there is something to compare, all of them agree, and a broken one does not.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from damage import EVERYTHING
from tiny import tiny_directory

from kompakt.cli.main import main
from kompakt.compress import compress, verification, verification_kernels, verify
from kompakt.compress.linear import CompressedLinear
from kompakt.kernels import decode_attention as decoding

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {
    "everything": {**EVERYTHING, "evaluation": {"windows": 0}},
    "pq": {
        "weights": {"method": "rtn", "activations": "none"},
        "kv_cache": {"method": "kv_pq", "bits": 4},
        "sparsity": {"method": "triangle"},
    },
    "mixed": {
        "weights": {
            "method": "rtn",
            "group_size": 32,
            "overrides": [{"modules": ["re:.*down_proj"], "weights": "fp8"}],
        },
        "kv_cache": {"method": "kv_prune", "key_scores": "magnitude"},
    },
    "searched": {"kv_cache": {"method": "kv_prune", "search": "loss"}},
    "evicting": {"kv_cache": {"method": "kv_evict", "ratio": 2.0, "recent_tokens": 900}},
}
DATA = {"calibration": {"samples": 2, "length": 256}, "evaluation": {"windows": 0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny_directory(folder / "tiny", steps=20, num_hidden_layers=2)
    for name, recipe in RECIPES.items():
        compress(base, {**DATA, **recipe}, folder / name)
    return folder


@pytest.fixture
def as_if_there_were_kernels(monkeypatch):
    """The CPU counts as a device whose results are compared, on few tokens."""
    monkeypatch.setattr(verification, "nothing_to_compare", lambda device: None)
    monkeypatch.setattr(verification_kernels, "nothing_to_compare", lambda device: "")
    monkeypatch.setattr(verification_kernels, "TOKENS", (1, 7))


def kernels_of(directory):
    found = verify(directory, logits=False, kernels=True)
    return found, {(check.op, check.case): check for check in found.kernels}


def test_a_cpu_has_nothing_to_compare(made, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", str(made / "everything"), "--no-logits", "--kernels"]) == 0
    assert "the device is cpu: references run, and there is nothing else" in capsys.readouterr().out
    found, checks = kernels_of(made / "everything")
    assert found.passed and not checks and found.checks[-1].status == "skipped"


@pytest.mark.parametrize("name", RECIPES)
def test_every_op_of_a_directory_is_compared_once(name, made, as_if_there_were_kernels):
    found, checks = kernels_of(made / name)
    assert found.passed and all(check.status == "equal" for check in checks.values()), found.as_dict()
    assert len(checks) == len(found.kernels)
    shapes = {case.partition(",")[0] for op, case in checks if op.endswith("_linear")}
    assert shapes == ({"64×64", "32×64", "128×64", "64×128"} if "weights" in RECIPES[name] else set())
    ops = {op for op, _ in checks}
    if name == "mixed":
        # 64×128 is down_proj alone, which is stored in FP8.
        assert {op for op, case in checks if case.startswith("64×128")} == {"fp8_linear"}
    if name == "pq":
        assert {"w4a16_linear", "sparse_attention (bf16)"} <= ops
    if name == "evicting":
        assert [case.endswith("evicted from") for op, case in checks if op == "decode_attention"] == [False, True]
    if name == "everything":
        assert any(op.startswith("prefill_attention (") for op in ops)
    assert {"write_tokens", "decode_attention"} <= ops
    for check in checks.values():
        assert check.error is not None and check.tolerance is not None and 0 <= check.error <= check.tolerance


def test_a_broken_linear_is_found(made, as_if_there_were_kernels, monkeypatch, capsys):
    right = CompressedLinear.forward

    def wrong(self, x):
        y = right(self, x)
        y[..., -1] = 0  # the last output, as a mask one too short leaves it
        return y

    monkeypatch.setattr(CompressedLinear, "forward", wrong)
    assert main(["verify", str(made / "mixed"), "--no-logits", "--kernels"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: kernels" in out and "differs" in out
    assert main(["verify", str(made / "mixed"), "--no-logits", "--kernels", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["kernels"]
    for row in rows:
        assert (row["status"] == "differs") == row["op"].endswith("_linear")
        assert row["error"] > row["tolerance"] if row["status"] == "differs" else True


@pytest.mark.parametrize("broken", ["nan", "raises", "other tokens"])
def test_a_broken_read_of_the_cache_is_found(broken, made, as_if_there_were_kernels, monkeypatch):
    right = decoding.decode_attention

    def wrong(query, kv, **options):
        if broken == "raises":
            raise RuntimeError("an illegal\naddress")
        out, lse = right(query.roll(1, 0) if broken == "other tokens" else query, kv, **options)
        return (out * torch.nan if broken == "nan" else out), lse

    monkeypatch.setattr("kompakt.compress.decode_contenders.decode_attention", wrong)
    found, checks = kernels_of(made / "everything")
    differing = {op for (op, _), check in checks.items() if check.status == "differs"}
    assert not found.passed and differing == {"decode_attention"}
    (problem,) = found.checks[-1].problems
    assert "the tolerance" in problem and "\n" not in problem
    json.dumps(found.as_dict(), allow_nan=False)


def test_pages_that_are_written_wrongly_are_found(made, as_if_there_were_kernels, monkeypatch):
    right = verification_kernels.TokenStore.append

    def wrong(self, key, value):
        return right(self, key.roll(1, 2), value)

    monkeypatch.setattr(verification_kernels.TokenStore, "append", wrong)
    _, checks = kernels_of(made / "pq")
    assert {op for (op, _), check in checks.items() if check.status == "differs"} == {"write_tokens"}


def test_a_write_that_fails_is_found(made, as_if_there_were_kernels, monkeypatch):
    def wrong(self, key, value):
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(verification_kernels.TokenStore, "append", wrong)
    found, checks = kernels_of(made / "pq")
    assert {op for (op, _), check in checks.items() if check.status == "differs"} == {"write_tokens"}
    assert "RuntimeError: an illegal address" in found.checks[-1].detail


def test_a_broken_read_of_what_was_evicted_from_is_found(made, as_if_there_were_kernels, monkeypatch):
    right = decoding.decode_attention

    def wrong(query, kv, **options):
        return right(query, replace(kv, kept=None), **options)

    monkeypatch.setattr("kompakt.compress.decode_contenders.decode_attention", wrong)
    _, checks = kernels_of(made / "evicting")
    (case,) = [case for (_, case), check in checks.items() if check.status == "differs"]
    assert case.endswith("evicted from")


def test_kernels_are_those_of_the_device_that_is_named(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(verification, "kernel_checks", lambda *given: iter(asked.append(given[-1]) or ()))
    for place in ("cuda:1", "auto", None):
        verify(made / "mixed", logits=False, kernels=True, device_map=place)
    assert [str(device) for device in asked] == ["cuda:1", "cuda", "cuda"]
    found = verify(made / "mixed", logits=False, kernels=True, device_map="cpu")
    assert found.checks[-1].status == "skipped" and len(asked) == 3


@pytest.mark.parametrize(
    ("name", "place", "op"),
    [
        ("pq", "kompakt.compress.verification_kernels.sparse_attention", "sparse_attention"),
        ("everything", "kompakt.compress.attention_contenders.prefill_attention", "prefill_attention"),
    ],
)
def test_broken_attention_of_prompts_is_found(name, place, op, made, as_if_there_were_kernels, monkeypatch):
    module, _, function = place.rpartition(".")
    right = getattr(importlib.import_module(module), function)
    monkeypatch.setattr(
        place, lambda query, key, value, *rest, **how: right(query, key, value.roll(1, 2), *rest, **how)
    )
    _, checks = kernels_of(made / name)
    assert (
        {op for (op, _), check in checks.items() if check.status == "differs"}
        == {found for found, _ in checks if found.startswith(op)}
        != set()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_kernels_are_right_on_this_device(name, tmp_path, capsys):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    base = tiny_directory(tmp_path / "base", steps=0, num_hidden_layers=1, **sizes)
    compress(base, {**DATA, **RECIPES[name]}, tmp_path / "out")
    assert main(["verify", str(tmp_path / "out"), "--no-logits", "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "results are those of the references" in out and "_linear" in out
