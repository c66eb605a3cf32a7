"""Retrieval and greedy agreement against oracles: a model that copies, one-pass log-likelihoods, `generate` itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from attention_models import follow_one, tiny, ways
from cache_models import patched
from tiny import VOCAB, tiny_tokenizer
from torch import nn
from transformers import LlamaConfig

from kompakt.compress import evaluation_retrieval
from kompakt.compress import retrieval_cases as making
from kompakt.compress.cache_evaluation import Reader, cache_in_use, count_anew, fits_in_pieces
from kompakt.compress.calibration import builtin_text
from kompakt.compress.evaluation import ratio_mean
from kompakt.compress.evaluation_generation import (
    GenerationOptions,
    end_tokens,
    generation_agreement,
    generation_prompts,
)
from kompakt.compress.evaluation_retrieval import answer_cases, difference, measure_test, summary
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_as_before
from kompakt.compress.retrieval_cases import CUE, TESTS, RetrievalOptions, retrieval_cases
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.kv_int4 import KVINT4

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = builtin_text("evaluation")[:20_000]
OPTIONS = RetrievalOptions(lengths=(301, 437), depths=3, samples=2, passage=23)
CACHES = {"fp8": KVFP8(recent_tokens=16), "int4": KVINT4(recent_tokens=16)}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def cases(tokenizer):
    return retrieval_cases(tokenizer, TEXT, OPTIONS)


def long_llama(seed: int = 0):
    torch.manual_seed(seed)
    return tiny("llama", vocab_size=VOCAB, max_position_embeddings=1024, num_hidden_layers=2)


class Copier(nn.Module):
    """Writes what followed the longest repetition of the last tokens, among the last `reach` of all it has seen."""

    def __init__(self, reach: int = 10**6):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=10**6)
        self.embeddings, self.reach, self.seen = nn.Embedding(1, 1), reach, []

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **given: object) -> SimpleNamespace:
        cache = given[CACHE]
        if cache.get_seq_length() == 0:
            self.seen = []
        count = input_ids.shape[1]
        cache.update(torch.zeros(1, 1, count, 1), torch.zeros(1, 1, count, 1), 0)
        logits = torch.zeros(1, count, VOCAB)
        for index, token in enumerate(input_ids[0].tolist()):
            self.seen.append(token)
            logits[0, index, self.guess(self.seen[-self.reach :])] = 20.0
        return SimpleNamespace(logits=logits)

    @staticmethod
    def guess(seen: list[int]) -> int:
        best, found = 0, seen[-1]
        for place in range(len(seen) - 1):
            size = 0
            while size <= place and seen[place - size] == seen[-1 - size]:
                size += 1
            if size >= best and size:
                best, found = size, seen[place + 1]
        return found


# Cases


@pytest.mark.parametrize("test", TESTS)
def test_cases_have_their_length_and_hold_their_answer(test, cases, tokenizer):
    assert [case.length for case in cases[test]] == [301] * 6 + [437] * 6
    assert [round(case.depth, 3) for case in cases[test][:6]] == [0.167, 0.167, 0.5, 0.5, 0.833, 0.833]
    for case in cases[test]:
        assert len(case.context) + len(case.question) + len(case.answer) == case.length
        first, last = case.evidence
        evidence, asked = case.context[first:last], case.question + case.answer
        assert abs(first / (len(case.context) - len(evidence)) - case.depth) < 0.2
        if test.startswith("copy"):
            assert evidence == asked and len(case.question) == CUE and not case.written
        else:
            number = tokenizer.decode(case.answer).strip()
            assert number.isdecimal() and len(number) == 7 and case.written
            assert number in tokenizer.decode(evidence)
            assert tokenizer.decode(case.context).count(number) == 1
            assert number not in tokenizer.decode(case.question)


def test_context_does_not_know_the_question(cases, tokenizer):
    """Of keys and values: all lines look alike, no key comes twice, and the question has the key of the evidence."""
    for case in cases["key_value"]:
        lines = tokenizer.decode(case.context).split("Keys and their values:\n")[1].strip().split("\n")
        keys = [line.split(": ")[0] for line in lines]
        assert len(set(keys)) == len(keys) >= 8
        asked = tokenizer.decode(case.context[slice(*case.evidence)])
        assert asked.strip() in lines
        assert tokenizer.decode(case.question).count(asked.split(":")[0]) == 2


def test_no_key_comes_twice_where_there_are_few(tokenizer, monkeypatch):
    monkeypatch.setattr(making, "SYLLABLES", ["ba", "de", "fo"])
    for case in retrieval_cases(tokenizer, TEXT, OPTIONS)["key_value"]:
        lines = tokenizer.decode(case.context).split("Keys and their values:\n")[1].strip().split("\n")
        assert len({line.split(": ")[0] for line in lines}) == len(lines) >= 8


def test_needles_stand_between_sentences(cases, tokenizer):
    for case in cases["needle"]:
        before = tokenizer.decode(case.context[: case.evidence[0]])
        assert before == "" or before.rstrip(" ")[-1] in ".\n"


def test_words_are_not_a_text(cases, tokenizer):
    for case in cases["copy_words"]:
        passage = tokenizer.decode(case.context[slice(*case.evidence)]).split()[:-1]  # the last may be cut
        assert len(set(passage)) == len(passage)
        assert set(passage) <= set(TEXT.split())
        assert " ".join(passage[:3]) not in TEXT
    for case in cases["copy_text"]:
        assert tokenizer.decode(case.context[slice(*case.evidence)]) in TEXT


def test_seed_and_samples(tokenizer, cases):
    again = retrieval_cases(tokenizer, TEXT, OPTIONS)
    assert again == cases
    options = {"lengths": (301,), "depths": 3, "passage": 23}
    more = retrieval_cases(tokenizer, TEXT, RetrievalOptions(**options, samples=3))
    for test in TESTS:
        assert set(cases[test][:6]) < set(more[test])
    other = retrieval_cases(tokenizer, TEXT, RetrievalOptions(**options, samples=2, seed=1))
    assert not set(other["needle"]) & set(cases["needle"])


def test_special_tokens_come_first_and_only_once():
    tokenizer = tiny_tokenizer(with_bos=True)
    for test, made in retrieval_cases(tokenizer, TEXT, OPTIONS).items():
        for case in made:
            whole = case.context + case.question + case.answer
            assert (whole[0], Counter(whole)[0], Counter(whole)[1]) == (0, 1, 0), test
            assert len(whole) == case.length


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lengths": ()}, "lengths are none"),
        ({"lengths": (300, 300)}, "lengths are 300, 300; give different"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"passage": CUE}, "passage is 4; it must be at least 5"),
        ({"tests": ("haystack",)}, "'haystack' is unknown; known: copy_text, copy_words, needle, key_value"),
        ({"lengths": (40,), "tests": ("needle",)}, "length 40 is too short"),
        ({"lengths": (60,), "tests": ("key_value",)}, "length 60 is too short for two lines"),
        ({"lengths": (128,), "tests": ("copy_text",)}, "length 128 is too short: 1 tokens more"),
        ({"lengths": (10**5,)}, "length 100000 needs a text of"),
        ({"passage": 10_000, "lengths": (10**5,), "tests": ("copy_words",)}, "needs a text of|different words"),
    ],
)
def test_what_is_refused(options, says, tokenizer):
    with pytest.raises(ValueError, match=says):
        retrieval_cases(tokenizer, TEXT, RetrievalOptions(**options))


# Scores


@pytest.mark.parametrize("test", TESTS)
def test_a_copier_answers_all_and_a_short_sighted_one_loses_what_is_far(test, cases):
    perfect, short = Copier(), Copier(reach=160)
    found = measure_test(short, perfect, cases[test])
    # The words of a passage, cut by this tokenizer, begin alike now and then, and so does the text.
    least = (0.95, 0.5) if test.startswith("copy") else (1.0, 1.0)
    for row in found["rows"]:
        assert (row["base"]["token_accuracy"], row["base"]["exact_match"]) >= least
        difference = row["difference"]
        assert difference["flips"]["gained"] == [] and difference["flips"]["lost"]
        assert difference["nll_difference"] > 1
        assert difference["token_accuracy_difference"] == pytest.approx(
            row["model"]["token_accuracy"] - row["base"]["token_accuracy"]
        )
        assert row["model"]["exact_match"] - row["base"]["exact_match"] == pytest.approx(
            difference["flips"]["accuracy_difference"]
        )
    near = found["answers"]["model"][4]
    assert near["depth"] > 0.8 and near["right"] >= near["tokens"] - 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_plain_model_scores_as_in_one_pass(family, cases):
    window = {"head_dim": 16, "sliding_window": 64} if family == "gemma3_text" else {}
    model = tiny(family, vocab_size=VOCAB, max_position_embeddings=1024, **window)
    for test in TESTS:
        chosen = cases[test][::5]
        for case, answer in zip(chosen, answer_cases(model, chosen), strict=True):
            ids = torch.tensor([case.context + case.question + case.answer])
            log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)[-len(case.answer) - 1 : -1]
            target = torch.tensor(case.answer)
            assert answer.nll == pytest.approx(-log_p.gather(1, target[:, None]).sum().item(), rel=1e-4)
            assert answer.right == int((log_p.argmax(-1) == target).sum())
            assert not answer.in_codes


@torch.no_grad()
def test_a_compressed_cache_is_read(cases):
    """Bit for bit what the three calls give, what is in codes counted, and another loss than that of a dense cache."""
    model = long_llama()
    chosen = cases["copy_text"][6:]
    dense = answer_cases(model, chosen)
    patched(model, replace(CACHES["int4"], recent_tokens=100))
    count_anew(model)
    found = answer_cases(model, chosen)
    used = cache_in_use(model, prompt=None)
    assert used is not None and 4 < used.pop("bits_per_element") < 8
    scored = 6 * (23 - CUE)
    assert used == {
        "protocol": "decode",
        "chunk": 128,
        "prompt_tokens": None,
        "positions": scored,
        "reading_codes": scored,
    }
    for case, answer in zip(chosen, found, strict=True):
        cache, parts = None, []
        for ids in (case.context, case.question, case.answer[:-1]):
            out = model(torch.tensor([ids]), use_cache=True, **({} if cache is None else {CACHE: cache}))
            cache = out[CACHE]
            parts.append(out.logits[0])
        logits = torch.cat([parts[1][-1:], parts[2]]).double()
        expected = -logits.log_softmax(-1).gather(1, torch.tensor(case.answer)[:, None]).sum().item()
        assert answer.nll == pytest.approx(expected, rel=1e-5)
        # 414 tokens of context: two pages are in codes, since 100 others follow them and not a third.
        assert answer.in_codes == (case.evidence[0] >= 4 and case.evidence[1] <= 256)
    assert 2 <= sum(answer.in_codes for answer in found) < 6
    assert all(new.nll != old.nll for new, old in zip(found, dense, strict=True))
    change = difference(dense, found)
    expected = ratio_mean([new.nll - old.nll for new, old in zip(found, dense, strict=True)], [19] * 6)
    assert (change.nll_difference, change.nll_difference_stderr) == expected


def test_sinks_do_not_count_as_codes():
    model = patched(long_llama(), CACHES["fp8"])
    reader = Reader(model)
    with torch.no_grad():
        reader.feed(torch.randint(3, VOCAB, (1, 300)), keep=0)
    assert [reader.holds_codes(*span) for span in ((4, 9), (3, 9), (4, 256), (4, 257))] == [True, False, True, False]
    run_as_before(model)


def test_quantized_attention_takes_what_a_model_reads_and_not_what_it_writes(cases):
    model = long_llama()
    follow_one(model, "int8_fp16", min_tokens=4096)
    answer_cases(model, cases["needle"][:2])
    # Context and question in both layers; the answer as decoding.
    assert ways(model) == {"int8_fp16": 8, "dense": 4}
    count_anew(model)
    answer_cases(model, cases["copy_words"][:2])
    assert ways(model) == {"int8_fp16": 12}
    count_anew(model)
    prompts = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    generation_agreement(model, long_llama(), prompts, new_tokens=4)
    assert ways(model) == {"int8_fp16": 2, "dense": 6}


def test_recurrent_models_read_in_one_pass(cases, monkeypatch):
    monkeypatch.setattr(evaluation_retrieval, "Reader", None)
    settings = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "head_dim": 16}
    settings |= {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    model = tiny("qwen3_next", vocab_size=VOCAB, max_position_embeddings=1024, linear_value_head_dim=8, **settings)
    assert not fits_in_pieces(model)
    case = cases["needle"][0]
    (answer,) = answer_cases(model, [case])
    with torch.no_grad():
        log_p = model(torch.tensor([case.context + case.question + case.answer])).logits[0].log_softmax(-1)
    target = torch.tensor(case.answer)
    expected = -log_p[-len(target) - 1 : -1].gather(1, target[:, None]).sum().item()
    assert answer.nll == pytest.approx(expected, rel=1e-4)


def test_lengths_beyond_the_model_are_refused(cases):
    model = tiny("llama", vocab_size=VOCAB, max_position_embeddings=436)
    with pytest.raises(ValueError, match="retrieval length 437 exceeds the 436 positions of LlamaForCausalLM"):
        answer_cases(model, cases["needle"])


def test_losses_that_are_not_finite_are_refused(cases):
    model = long_llama()
    model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss of a retrieval case is nan"):
        answer_cases(model, cases["needle"][:1])


def test_summary_weighs_tokens(cases):
    found = summary(answer_cases(Copier(), cases["copy_text"][:2]))
    assert (found.items, found.tokens, found.items_in_codes) == (2, 2 * (23 - CUE), 0)


# Generation


def noisy_llama():
    """Another model, near enough to agree now and then."""
    model = long_llama()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator) * parameter.std())
    return model


def free_run(model, ids, count):
    """Greedy tokens of `generate`."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


def first_difference(one, other):
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


@pytest.mark.parametrize("cache", ["int4", None])
def test_first_divergence_is_that_of_a_free_run(cache):
    base = long_llama()
    model = patched(long_llama(), CACHES[cache]) if cache else noisy_llama()
    prompts = torch.randint(3, VOCAB, (11, 300), generator=torch.Generator().manual_seed(1))
    found = generation_agreement(model, base, prompts, new_tokens=20)
    expected = []
    for ids in prompts.split(8):
        pairs = zip(free_run(base, ids, 20), free_run(model, ids, 20), strict=True)
        expected += [first_difference(*pair) for pair in pairs]
    assert list(found.first_divergence) == expected
    assert len({place for place in expected if place is not None}) > 2
    assert found.positions == 220 and found.lengths == (20,) * 11
    assert found.identical == sum(place is None for place in expected) / 11
    assert found.median_equal_tokens == sorted(20 if place is None else place for place in expected)[5]


@torch.no_grad()
def test_agreement_is_along_the_continuation_of_the_base():
    base, model = long_llama(), noisy_llama()
    prompts = torch.randint(3, VOCAB, (8, 37), generator=torch.Generator().manual_seed(2))
    written = torch.tensor(free_run(base, prompts, 30))
    logits = model(torch.cat([prompts, written], dim=1), use_cache=False).logits[:, 36:-1]
    same = logits.argmax(-1) == written
    assert 0.2 < same.double().mean() < 0.98
    found = generation_agreement(model, base, prompts, new_tokens=30)
    mean, stderr = ratio_mean(same.double().sum(1).tolist(), [30] * 8)
    assert (found.agreement, found.agreement_stderr) == (pytest.approx(mean), pytest.approx(stderr))
    # A token at which the two differ ends the texts that have it, and counts.
    row, place = (~same).nonzero()[0].tolist()
    end = written[row, place].item()
    found = generation_agreement(model, base, prompts, new_tokens=30, end=[end])
    stops = [ids.index(end) + 1 if end in ids else 30 for ids in written.tolist()]
    assert found.lengths == tuple(stops) and stops[row] < 30
    expected = [sum(right[:stop]) for right, stop in zip(same.tolist(), stops, strict=True)]
    assert found.agreement == pytest.approx(sum(expected) / sum(stops))


def test_a_model_agrees_with_itself():
    model = long_llama()
    prompts = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    found = generation_agreement(model, model, prompts, new_tokens=7)
    assert (found.agreement, found.identical, found.first_divergence) == (1.0, 1.0, (None, None))
    assert found.median_equal_tokens == 7.0


def test_positions_behind_the_end_do_not_count():
    base = long_llama()
    prompts = torch.randint(3, VOCAB, (3, 37), generator=torch.Generator().manual_seed(2))
    written = free_run(base, prompts, 15)
    end = written[0][4]
    found = generation_agreement(base, base, prompts, new_tokens=15, end=[end])
    assert found.lengths == tuple(row.index(end) + 1 if end in row else 15 for row in written)
    assert found.lengths[0] <= 5 and found.positions == sum(found.lengths)


def test_prompts(tokenizer):
    options = GenerationOptions.in_window(101, new_tokens=37, prompts=5)
    assert (options.prompt_tokens, options.new_tokens) == (64, 37)
    prompts = generation_prompts(tokenizer, TEXT, options)
    assert prompts.shape == (5, 64)
    ids = tokenizer(TEXT)["input_ids"]
    assert prompts.flatten().tolist() == ids[:320]
    few = generation_prompts(tokenizer, TEXT[:200], options)
    assert 1 <= len(few) < 5
    with_bos = generation_prompts(tiny_tokenizer(with_bos=True), TEXT, options)
    assert with_bos[:, 0].eq(0).all() and with_bos[:, 1:].flatten().tolist() == ids[: 5 * 63]
    with pytest.raises(ValueError, match="fewer than one prompt of 64"):
        generation_prompts(tokenizer, "short", options)
    with pytest.raises(ValueError, match="101 generated tokens leave nothing of a window of 101"):
        GenerationOptions.in_window(101, new_tokens=101)
    with pytest.raises(ValueError, match="generation prompts is 0"):
        GenerationOptions(prompts=0)
    small = tiny("llama", vocab_size=VOCAB, max_position_embeddings=100)
    with pytest.raises(ValueError, match="prompts of 64 tokens and 37 new ones exceed the 100 positions"):
        generation_agreement(small, small, prompts, new_tokens=37)


def test_end_tokens(tokenizer):
    model = long_llama()
    for given, expected in ((None, [1]), (7, [7]), ([7, 8], [7, 8])):
        model.generation_config.eos_token_id = given
        assert end_tokens(model, tokenizer) == expected


def test_pieces_have_no_seam():
    """A reader gives the same logits however a text is cut."""
    model = long_llama()
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        reader = Reader(model)
        parts = [reader.feed(ids[:, start:stop]) for start, stop in pairwise((0, 37, 38, 90))]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-3)
