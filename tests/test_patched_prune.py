"""Models with a pruned cache: chunks, padding, beams, a second turn and crops give what a dense cache of the same
pruned tokens gives.
"""

from __future__ import annotations

import pytest
import torch
from cache_models import LONG, PADS, in_steps, is_compressed, left_padding, long_model, patched, reference_cache
from transformers import DynamicCache

from kompakt.compress import CompressedCache
from kompakt.compress.hf_cache import CACHE
from kompakt.sparsify.kv_prune import KVPrune

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 12, "do_sample": False}
METHOD = KVPrune(key_scores="magnitude", key_sparsity=0.5, value_sparsity=0.7, recent_tokens=8, sink_tokens=2)


@pytest.mark.parametrize("steps", [(300, 1, 1, 98), (130, 1, 140, 129)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_logits_are_those_of_the_same_tokens_pruned(family, steps):
    model = long_model(family)
    dense = in_steps(model, DynamicCache(config=model.config), LONG, steps)
    wanted = in_steps(model, reference_cache(model, METHOD), LONG, steps)
    cache = CompressedCache(model.config, METHOD)
    got = in_steps(patched(model, METHOD), cache, LONG, steps)
    # Sums in another order may make another channel the larger one, which is less than pruning costs.
    cost = (wanted - dense).square().mean()
    assert cost > 0 and (got - wanted).square().mean() <= 1e-3 * cost
    assert cache.coded_tokens > 200 and cache.nbytes().total > 0


def test_padded_rows_beams_and_rows_alone():
    model, mask = long_model("llama"), left_padding()
    wanted = model.generate(LONG, attention_mask=mask, **{CACHE: reference_cache(model, METHOD, list(PADS))}, **GREEDY)
    beams = model.generate(LONG, **{CACHE: reference_cache(model, METHOD)}, **GREEDY, num_beams=3)
    patched(model, METHOD)
    got = model.generate(LONG, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert is_compressed(got[CACHE]) and got[CACHE].coded_tokens == 384
    assert torch.equal(got.sequences, wanted)
    for row, pad in enumerate(PADS):
        alone = model.generate(LONG[row : row + 1, pad:], **GREEDY)
        assert torch.equal(alone[0, 400 - pad :], wanted[row, 400:])
    assert torch.equal(model.generate(LONG, **GREEDY, num_beams=3), beams)


def test_second_turn_and_tokens_taken_back():
    model = long_model("llama")
    cache = reference_cache(model, METHOD)
    first = model.generate(LONG[:, :250], **{CACHE: cache}, **GREEDY)
    longer = torch.cat((first, LONG[:, :100]), dim=1)
    wanted = model.generate(longer, **{CACHE: cache}, **GREEDY)
    patched(model, METHOD)
    mine = CompressedCache(model.config, METHOD)
    assert torch.equal(model.generate(LONG[:, :250], **{CACHE: mine}, **GREEDY), first)
    assert torch.equal(model.generate(longer, **{CACHE: mine}, **GREEDY), wanted)
    out = model.generate(LONG[:1], prompt_lookup_num_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert is_compressed(out[CACHE]) and out[CACHE].get_seq_length() == out.sequences.shape[1] - 1
