"""Models that wait on the disk: the same result, and memory that does not grow with the number of layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tiny_directory

from kompakt.compress import compress
from kompakt.compress.hf_decoder import park, resident

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
LAYER = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
"""Bytes of a decoder layer of such a model; packed, a little more than a quarter."""
OPTIONS = {
    "calibration.samples": 1,
    "calibration.length": 32,
    "evaluation.windows": 2,
    "evaluation.window": 32,
}
PARENT = """
import json, os, sys, threading, time
from kompakt.compress import compress
import torch, transformers.models.llama.modeling_llama

torch.set_num_threads(1)

def held():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.003)

for base, output in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        before = peak = held()
        threading.Thread(target=watch, daemon=True).start()
        compress(base, "w4a16-gptq", output, overrides=json.loads(sys.argv[2]), device_map="disk", max_shard_size="2MB")
        print(json.dumps(peak - before), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "kompakt").symlink_to(ROOT)
    runs = []
    for layers in (1, 7):
        base = tiny_directory(tmp_path / f"base{layers}", steps=0, num_hidden_layers=layers, **WIDE)
        runs.append((str(base), str(tmp_path / f"out{layers}")))
    # Everything of 64 KiB is given back to the system at once, so that what is resident is what is held.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "root"), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PARENT, json.dumps(runs), json.dumps(OPTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    peaks = [int(line) for line in done.stdout.splitlines()]
    assert len(peaks) == 2, done.stderr
    few, many = peaks
    # Six more packed layers would take 1.6 times as much as a float one.
    assert many - few < LAYER, peaks


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_resident_layer_runs_where_it_is_held_whatever_accelerate_wants(offloaded):
    layer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = layer(x)
    add_hook_to_module(layer[1], AlignDevicesHook("cpu"))
    layer[1]._hf_hook.execution_device = torch.device("meta")  # a device that has no results
    if offloaded:
        cpu_offload(layer[0], torch.device("cpu"))
    forwards = [module.forward for module in layer.modules()]
    with pytest.raises(KeyError), resident(layer, torch.device("cpu")):
        assert torch.equal(layer(x), expected)
        raise KeyError
    assert [module.forward for module in layer.modules()] == forwards


def test_a_parked_module_is_what_it_was_and_can_be_changed(tmp_path):
    module = torch.nn.Linear(5, 3).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    park(module, tmp_path)
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [6, 30]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    module.weight.data.mul_(2)
    assert torch.equal(module.weight, before["weight"] * 2)


@pytest.mark.gpu
def test_a_model_larger_than_the_device_would_be_measured_module_by_module(tmp_path):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 12}
    base = tiny_directory(tmp_path / "base", steps=0, **wide)
    size = (base / "model.safetensors").stat().st_size
    whole = compress(base, "fp8", tmp_path / "whole", overrides=OPTIONS, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = compress(base, "fp8", tmp_path / "disk", overrides=OPTIONS, device="cuda", device_map="disk")
    assert torch.cuda.max_memory_allocated() - before < 0.5 * size
    assert result.evaluation is not None and whole.evaluation is not None
    found, expected = result.evaluation["comparison"], whole.evaluation["comparison"]
    assert found["perplexity_increase"] == pytest.approx(expected["perplexity_increase"], abs=1e-3)
