"""The plan beside what compress really writes and holds, for the recipes that ship: bytes within a tenth, peaks of
memory within a quarter.
"""

from __future__ import annotations

import sys

import pytest
import torch
from live_bytes import LiveBytes
from test_planning import tensor_bytes
from tiny import tiny_directory

from kompakt.compress import compress, load, plan
from kompakt.compress.hf_cache_hooks import cache_maker
from kompakt.compress.kv_evict import KVEvict
from kompakt.compress.recipe import recipe_names

pytestmark = pytest.mark.usefixtures("one_thread")
BYTES, MEMORY = 0.1, 0.25
TOKENS = 640
"""Tokens of a cache: pages, and dense ones."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "tiny"
    return tiny_directory(directory, steps=0, num_hidden_layers=2, max_position_embeddings=1024)


@pytest.mark.parametrize("name", recipe_names())
def test_bytes_are_those_that_are_written_and_held(name, base, tmp_path):
    overrides = {"calibration.samples": 2, "calibration.length": 256, "evaluation.windows": 0}
    found = plan(base, name, overrides=overrides, contexts=(TOKENS,))
    compress(base, name, tmp_path / "out", overrides=overrides)
    assert found.compressed_bytes == pytest.approx(tensor_bytes(tmp_path / "out"), rel=BYTES)
    if found.compressed_cache is None:
        return
    model = load(tmp_path / "out")
    maker = cache_maker(model)
    assert maker is not None
    cache = maker.make(None)
    with torch.no_grad():
        model(torch.randint(2, 290, (1, TOKENS)), past_key_values=cache, use_cache=True)
    if not isinstance(found.recipe.kv_cache, KVEvict):  # the plan counts no token as evicted where nobody knows which
        assert found.compressed_cache.bytes[TOKENS] == pytest.approx(cache.nbytes().total, rel=BYTES)


class Noted(LiveBytes):
    """Counts the weights of models too that are read from files, which no operation puts out."""

    def reading(self, monkeypatch):
        for module in list(sys.modules.values()):
            for name in ("load_base", "load_written"):
                if getattr(module, "__name__", "").startswith("kompakt.compress.") and hasattr(module, name):
                    monkeypatch.setattr(module, name, self._noting(getattr(module, name)))
        return self

    def _noting(self, function):
        def read(*arguments, **options):
            model = function(*arguments, **options)
            for tensor in (*model.parameters(), *model.buffers()):
                self._note(tensor.untyped_storage())
            return model

        return read


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}
    return tiny_directory(tmp_path_factory.mktemp("base") / "wide", steps=0, **sizes)


@pytest.mark.parametrize("name", ["fp8", "w4a16-rtn", "w4a16-gptq", "kv-fp8", "kv-int4", "sage", "sparse-triangle"])
def test_the_peak_of_memory_is_that_of_compress(name, wide, tmp_path, monkeypatch):
    overrides = {"calibration.samples": 4, "calibration.length": 192}
    overrides |= {"evaluation.windows": 2, "evaluation.window": 192}
    found = plan(wide, name, overrides=overrides, device="cpu")
    with Noted().reading(monkeypatch) as held:
        compress(wide, name, tmp_path / "out", overrides=overrides, device="cpu")
    assert found.peak_host_bytes == pytest.approx(held.peak, rel=MEMORY)
