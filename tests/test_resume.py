"""Compressions that were interrupted: what is kept, what is done again, and what is refused."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_directory, write_text

from kompakt.compress import compress
from kompakt.compress.artifact import read_sidecar
from kompakt.compress.restore import REASON, restore_worst
from kompakt.compress.resume import LayerStore
from kompakt.quant.fireq import FireQ
from kompakt.quant.gptq import GPTQ

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 4
METHODS = {"w4a8-fireq": FireQ, "w4a16-gptq": GPTQ}


class Interrupted(RuntimeError):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", attention_bias=True)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    text = str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))
    return {
        "calibration.source": text,
        "calibration.samples": 4,
        "calibration.length": 32,
        "evaluation.text": text,
        "evaluation.window": 32,
        "evaluation.windows": 4,
    }


@pytest.fixture
def quantized(monkeypatch):
    """Names of the layers that a method quantizes from now on; its `stop` says before which one the run ends."""

    class Names(list):
        stop: int | None = None

    names = Names()

    def watch(method):
        original = method.quantize

        def quantize(self, block):
            if len(names) == names.stop:
                raise Interrupted
            names.append(block.name)
            return original(self, block)

        monkeypatch.setattr(method, "quantize", quantize)

    for method in METHODS.values():
        watch(method)
    return names


def interrupt(quantized, after, *arguments, **options):
    """A run that ends after `after` layers."""
    quantized.clear()
    quantized.stop = after
    with pytest.raises(Interrupted):
        compress(*arguments, **options)
    quantized.clear()
    quantized.stop = None


def interrupted(*arguments):
    """In the place of a step that is not reached."""
    raise Interrupted


def kept(parent):
    """Names of the files that are kept."""
    return sorted(path.name for path in parent.glob(".out.kompakt-layers/*"))


@pytest.mark.parametrize("device_map", [None, "disk"])
@pytest.mark.parametrize("recipe", METHODS)
def test_resumed_run_gives_what_an_uninterrupted_one_gives(
    recipe, device_map, base, overrides, quantized, tmp_path, caplog
):
    run = {"overrides": overrides, "device_map": device_map, "resume": True}
    whole = compress(base, recipe, tmp_path / "whole", overrides=overrides)
    interrupt(quantized, 2, base, recipe, tmp_path / "out", **run)
    assert kept(tmp_path) == ["0000.safetensors", "0001.safetensors", "fingerprint"]
    assert f"2 finished layers are kept in {tmp_path / '.out.kompakt-layers'}" in caplog.text
    assert not (tmp_path / "out").exists()
    resumed = compress(base, recipe, tmp_path / "out", **run)
    assert quantized == [f"model.layers.{index}" for index in (2, 3)]
    assert "resuming: 2 layers are kept" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    first, second = read_sidecar(tmp_path / "whole"), read_sidecar(tmp_path / "out")
    assert first["checksums"] == second["checksums"]
    assert resumed.evaluation == whole.evaluation
    for ours, theirs in zip(second["layers"], first["layers"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_nothing_is_kept_unless_asked(base, overrides, quantized, tmp_path):
    interrupt(quantized, 2, base, "w4a16-gptq", tmp_path / "out", overrides=overrides)
    assert list(tmp_path.iterdir()) == []


def test_layers_given_back_to_keep_a_limit_are_the_same(base, overrides, quantized, tmp_path, monkeypatch):
    strict = {**overrides, "limits.perplexity_increase": 1.0}
    folded = []

    def watched(layers, reports, undo, *rest):
        folded.append(undo.folded)
        return restore_worst(layers, reports, undo, *rest)

    verdicts = iter([True, False, True, False])  # each run exceeds its limit once
    monkeypatch.setattr("kompakt.compress.pipeline.exceeds", lambda *arguments: next(verdicts))
    monkeypatch.setattr("kompakt.compress.pipeline.restore_worst", watched)
    whole = compress(base, "w4a8-fireq", tmp_path / "whole", overrides=strict)
    assert any(line.reason == REASON for line in whole.coverage)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("kompakt.compress.pipeline.write_model", interrupted)
        compress(base, "w4a8-fireq", tmp_path / "out", overrides=strict, resume=True)
    quantized.clear()
    resumed = compress(base, "w4a8-fireq", tmp_path / "out", overrides=strict, resume=True)
    assert quantized == []
    assert folded == [True, True]
    assert resumed.coverage == whole.coverage
    assert read_sidecar(tmp_path / "whole")["checksums"] == read_sidecar(tmp_path / "out")["checksums"]


@pytest.mark.parametrize(
    ("recipe", "changed"), [("w4a8-gptq", {}), ("w4a16-gptq", {"calibration.seed": 5}), ("w4a16-gptq", {"touch": True})]
)
def test_layers_of_another_run_are_refused(recipe, changed, base, overrides, quantized, tmp_path):
    interrupt(quantized, 1, base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    before = kept(tmp_path)
    changed = dict(changed)
    if changed.pop("touch", False):
        (base / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"\.out\.kompakt-layers holds layers of another recipe, model"):
        compress(base, recipe, tmp_path / "out", overrides={**overrides, **changed}, resume=True)
    assert kept(tmp_path) == before
    assert quantized == []


def test_a_limit_and_the_evaluation_may_change(base, overrides, quantized, tmp_path):
    interrupt(quantized, 3, base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    compress(base, "w4a16-gptq", tmp_path / "out", overrides={**overrides, "evaluation.windows": 2}, resume=True)
    assert len(quantized) == LAYERS - 3


def test_a_truncated_layer_is_refused(base, overrides, quantized, tmp_path):
    interrupt(quantized, 2, base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    file = tmp_path / ".out.kompakt-layers" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"0001\.safetensors is damaged .* delete it"):
        compress(base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    file.unlink()
    compress(base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    assert len(quantized) == LAYERS - 1


def test_an_edited_layer_is_refused(base, overrides, quantized, tmp_path):
    interrupt(quantized, 2, base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    file = tmp_path / ".out.kompakt-layers" / "0001.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start, end = header["linear:mlp.down_proj.weight_packed"]["data_offsets"]
    offset = 8 + int.from_bytes(content[:8], "little")
    content[offset + start : offset + end] = bytes(end - start)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the kept model\.layers\.1 changes its output by .* its file is damaged"):
        compress(base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"layers cannot be kept in .*: Not a directory"):
        LayerStore.open(tmp_path / "file" / "out", {})


def test_a_full_disk_is_said_in_one_sentence(base, overrides, quantized, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kompakt.compress.resume.save_file", full)
    with pytest.raises(ValueError, match=r"layer 0 cannot be kept in .*: .*No space left"):
        compress(base, "w4a16-gptq", tmp_path / "out", overrides=overrides, resume=True)
    assert list(tmp_path.iterdir()) == []
