"""Calibration text of codes that know positions is spread over those that a model has."""

from __future__ import annotations

import pytest
import torch
from attention_models import tiny

from kompakt.compress.attention_calibration import observe_attention
from kompakt.compress.cache_calibration import choose_cache, rotary_types, spread_positions
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_pq import KVPQ

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(4))


def test_first_and_last_sequence_stand_at_the_ends():
    model = tiny("llama", max_position_embeddings=512)
    for count, last in ((512, 512), (10**6, 512), (100, 100)):
        positions = spread_positions(model, TOKENS, count)
        assert positions is not None and positions.shape == TOKENS.shape
        assert positions[0].tolist() == list(range(40)) and positions[-1].tolist() == list(range(last - 40, last))
        assert positions[1, 0] == (last - 40) // 2
    assert spread_positions(model, TOKENS[:1], 100).tolist() == [list(range(30, 70))]
    assert spread_positions(model, TOKENS, 40) is None


def test_embeddings_that_depend_on_the_length_are_left_at_the_beginning():
    model = tiny("llama", max_position_embeddings=512)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert spread_positions(model, TOKENS, 512) is None
    assert rotary_types(None) == {"none"} and rotary_types({}) == {"none"}
    by_layer = {"full_attention": {"rope_type": "linear"}, "sliding_attention": {"rope_type": "default"}}
    assert rotary_types(by_layer) == {"linear", "default"}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_attention_is_the_same_and_keys_are_turned(family):
    """Position p + s turns a key by s more; products with queries, which turn too, stay."""
    model = tiny(family, max_position_embeddings=512).float()
    seen = {}

    def observe(where, positions):
        observe_attention(
            model, TOKENS, lambda name, inputs: seen.setdefault((where, name), inputs), positions=positions
        )

    positions = spread_positions(model, TOKENS, 512)
    observe("start", None)
    observe("spread", positions)
    names = {name for _, name in seen}
    assert names
    for name in names:
        one, other = seen["start", name], seen["spread", name]
        assert torch.allclose(one.key[0], other.key[0], atol=1e-5)
        assert not torch.allclose(one.key[2], other.key[2], atol=0.1)
        groups = one.query.shape[1] // one.key.shape[1]
        logits = [x.query @ x.key.repeat_interleave(groups, dim=1).mT for x in (one, other)]
        assert torch.allclose(*logits, atol=1e-3)
        assert torch.allclose(one.value, other.value, atol=1e-4)


def test_only_codebooks_are_made_so(monkeypatch):
    model = tiny("llama", max_position_embeddings=512)
    given = []

    def observe(model, tokens, visit, *, device, positions):
        given.append(positions)
        return observe_attention(model, tokens, visit, device=device, positions=positions)

    monkeypatch.setattr("kompakt.compress.cache_calibration.observe_attention", observe)
    cpu = torch.device("cpu")
    choose_cache(model, KVPQ(positions=300), TOKENS, device=cpu)
    assert given[0][-1, -1] == 299
    choose_cache(model, KVFP8(), TOKENS, device=cpu)
    choose_cache(model, KVPQ(positions=30), TOKENS, device=cpu)
    assert given[1:] == [None]
