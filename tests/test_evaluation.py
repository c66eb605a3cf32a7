"""Measurements against oracles computed another way: transformers' loss, brute force, kl_div, one-by-one scoring."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kompakt.compress import evaluation, evaluation_tasks
from kompakt.compress.calibration import builtin_text
from kompakt.compress.evaluation import compare, generation_speed, perplexity, ratio_mean, text_windows, token_nll
from kompakt.compress.evaluation_tasks import encode_pair, flips, last_word, multiple_choice

VOCAB = 400
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(seed: int = 0, *, vocab: int = VOCAB, scale: float = 6.0) -> LlamaForCausalLM:
    """A tiny random model; ``scale`` widens its logits so that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
        model.lm_head.weight.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def other(model):
    """``model`` with noise on its weights and flatter predictions, so that KL differs by direction."""
    noisy = make_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
        noisy.lm_head.weight.mul_(0.6)
    return noisy


@pytest.fixture(scope="module")
def windows():
    return torch.randint(2, VOCAB, (7, 33), generator=torch.Generator().manual_seed(3))


CHOICE_ROWS = [
    {"question": "Which is a colour?", "choices": ["blue", "a very long answer about nothing", "tree"], "gold": 0},
    {"question": "What is it?", "choices": ["naïve façade", "naive facade", "x"], "gold": 1},
    {"context": "The cat sat on the ", "choices": ["mat", "moon and the stars above it"], "gold": 0},
    {
        "context": "the man lifts a bar. he",
        "activity": "Sport",
        "choices": ["drops it.", "sings [step] a song."],
        "gold": 1,
    },
    {
        "context": "[header] How to cook [title] Heat it. [step] Wait.",
        "activity": "Food",
        "choices": ["a", "b"],
        "gold": 0,
    },
]
LAST_WORD_ROWS = [
    {"context": "She closed the door and looked at", "target": "him"},
    {
        "context": "The whole text is here, and a longer one at that, so that padding is needed for the",
        "target": "rest",
    },
    {"context": "One", "target": "two"},
]


def log_likelihood(model, context: list[int], target: list[int]) -> tuple[float, bool]:
    """One continuation on its own, without padding or mask."""
    ids = torch.tensor([context + target])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    positions = range(len(context) - 1, len(context) + len(target) - 1)
    total = sum(log_p[position, token].item() for position, token in zip(positions, target, strict=True))
    return total, all(log_p[p].argmax() == token for p, token in zip(positions, target, strict=True))


def test_text_windows(tokenizer):
    text = builtin_text("evaluation")[:5000]
    ids = tokenizer(text).input_ids
    found = text_windows(tokenizer, text, window=64)
    assert found.shape == (len(ids) // 64, 64)
    assert found.flatten().tolist() == ids[: len(ids) // 64 * 64]
    overlapping = text_windows(tokenizer, text, window=64, stride=20)
    assert overlapping.shape == ((len(ids) - 64) // 20 + 1, 64)
    assert overlapping[3].tolist() == ids[60:124]
    assert text_windows(tokenizer, text, window=64, limit=2).tolist() == found[:2].tolist()


def test_text_windows_errors(tokenizer):
    with pytest.raises(ValueError, match="fewer than one window of 64"):
        text_windows(tokenizer, "short", window=64)
    with pytest.raises(ValueError, match="0 tokens"):
        text_windows(tokenizer, "", window=64)
    for options in [{"window": 1}, {"window": 8, "stride": 9}, {"window": 8, "stride": 0}, {"window": 8, "limit": 0}]:
        with pytest.raises(ValueError, match=r"must be|must have"):
            text_windows(tokenizer, "some words " * 20, **options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_the_models_own_loss(model, windows, batch_size):
    calls = []
    found = perplexity(model, windows, batch_size=batch_size, progress=lambda done, total: calls.append((done, total)))
    with torch.no_grad():
        losses = np.array([model(input_ids=row[None], labels=row[None]).loss.item() for row in windows])
    assert found.nll == pytest.approx(losses.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found.nll_stderr == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)), rel=1e-3)
    assert found.nll_stderr is not None
    assert found.perplexity_stderr == pytest.approx(found.perplexity * found.nll_stderr)
    assert found.tokens_scored == 7 * 32
    assert calls[-1] == (7, 7)


@pytest.mark.parametrize(("window", "stride"), [(32, 10), (32, 31), (16, 1), (32, 32)])
def test_strided_perplexity_scores_every_token_once_with_its_context(model, tokenizer, window, stride):
    text = builtin_text("evaluation")[:200]
    ids = tokenizer(text).input_ids
    cut = text_windows(tokenizer, text, window=window, stride=stride)
    found = perplexity(model, cut, stride=stride, batch_size=4)
    scores = {}
    for start in range(0, len(cut) * stride, stride):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids[start : start + window]])).logits[0].double().log_softmax(-1)
        for offset in range(1, window):
            scores.setdefault(start + offset, -log_p[offset - 1, ids[start + offset]].item())
    if stride < window:
        assert sorted(scores) == list(range(1, (len(cut) - 1) * stride + window))
    assert found.tokens_scored == len(scores)
    assert found.nll == pytest.approx(np.mean(list(scores.values())), rel=1e-5)


def test_ratio_mean_for_equal_and_unequal_clusters():
    values = np.random.default_rng(0).normal(size=(400, 5)) + 1
    mean, stderr = ratio_mean(values.sum(1).tolist(), [5] * 400)
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.mean(1).std(ddof=1) / 20)

    # Clusters of 2 and 6 tokens that share a common error: against the spread over many repetitions.
    generator, counts = np.random.default_rng(1), [2, 6] * 50
    runs = [ratio_mean([n * generator.normal() for n in counts], counts) for _ in range(2000)]
    spread = np.std([mean for mean, _ in runs])
    assert np.mean([stderr or math.nan for _, stderr in runs]) == pytest.approx(spread, rel=0.1)
    assert ratio_mean([3.0], [2]) == (1.5, None)


def test_one_window_has_no_standard_error_and_is_json(model, other, windows):
    found = compare(other, model, windows[:1]).as_dict()
    assert found["kl_stderr"] is None and found["model"]["nll_stderr"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_compare_against_full_logits(model, other, windows, batch_size, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 5 * VOCAB)
    found = compare(other, model, windows, batch_size=batch_size)
    with torch.no_grad():
        log_p = other(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
        base_log_p = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    kl = functional.kl_div(log_p, base_log_p, log_target=True, reduction="none").sum(-1)
    agreement = (log_p.argmax(-1) == base_log_p.argmax(-1)).double()
    labels = windows[:, 1:, None]
    nll, base_nll = -log_p.gather(-1, labels)[..., 0], -base_log_p.gather(-1, labels)[..., 0]
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_stderr == pytest.approx((kl.mean(1).std() / math.sqrt(7)).item(), rel=1e-3)
    assert found.top1_agreement == pytest.approx(agreement.mean().item())
    assert 0.05 < found.top1_agreement < 0.95, "the case must tell agreement from disagreement"
    assert found.top1_agreement_stderr == pytest.approx((agreement.mean(1).std() / math.sqrt(7)).item())
    difference = (nll - base_nll).mean(1)
    ratio = difference.mean().exp().item()
    assert found.perplexity_increase == pytest.approx(ratio - 1, rel=1e-4)
    assert found.perplexity_increase_stderr == pytest.approx(ratio * (difference.std() / math.sqrt(7)).item(), rel=1e-3)
    assert found.model.nll == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found.base.nll == pytest.approx(base_nll.mean().item(), rel=1e-5)


def test_compare_is_directed_and_zero_for_the_same_model(model, other, windows):
    forward, backward = compare(other, model, windows), compare(model, other, windows)
    assert forward.kl != pytest.approx(backward.kl, rel=0.05)
    same = compare(model, model, windows)
    assert same.kl == pytest.approx(0, abs=1e-7)
    assert same.top1_agreement == 1.0
    assert same.perplexity_increase == 0.0 and same.perplexity_increase_stderr == 0.0


def test_compare_with_stride_matches_perplexity(model, other, tokenizer):
    cut = text_windows(tokenizer, builtin_text("evaluation")[:300], window=32, stride=8)
    found = compare(other, model, cut, stride=8, batch_size=4)
    alone = perplexity(model, cut, stride=8, batch_size=4)
    assert found.base.nll == pytest.approx(alone.nll, rel=1e-6)
    assert found.base.nll_stderr == pytest.approx(alone.nll_stderr, rel=1e-4)
    assert found.base.tokens_scored == 31 + 8 * (len(cut) - 1)


def test_masked_vocabulary_gives_a_finite_kl(model, other, windows):
    class Masked(torch.nn.Module):
        """Gives the last vocabulary entries no probability, as models with a padded vocabulary may."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache):
            output = self.inner(input_ids=input_ids, use_cache=use_cache)
            output.logits[..., -2:] = -math.inf
            return output

    ids = windows.clamp(max=VOCAB - 3)
    assert math.isfinite(compare(Masked(other), Masked(model), ids).kl)


def test_unusable_models_are_refused(model, windows):
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="loss of the model is nan in window 0"):
        perplexity(broken, windows)
    with pytest.raises(ValueError, match="base model is nan"):
        compare(model, broken, windows)
    with pytest.raises(ValueError, match="not usable"):
        last_word(broken, tiny_tokenizer(VOCAB), LAST_WORD_ROWS)
    with pytest.raises(ValueError, match="400 logits and its base 410"):
        compare(model, make_model(vocab=410), windows)
    with pytest.raises(ValueError, match=r"expected \(n, window\)"):
        perplexity(model, windows[0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        perplexity(model, windows, batch_size=0)


def test_huge_loss_still_gives_json(windows):
    wild = make_model(scale=1.0)
    with torch.no_grad():
        wild.lm_head.weight.mul_(1e6)
    found = perplexity(wild, windows)
    assert found.nll > evaluation.MAX_NLL
    assert found.as_dict()["perplexity"] == math.exp(evaluation.MAX_NLL)


def test_token_nll_in_chunks_upcasts_bfloat16(monkeypatch):
    logits = (torch.randn(23, 50, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    labels = torch.arange(23)
    monkeypatch.setattr(evaluation, "CHUNK_ELEMENTS", 4 * 50)
    expected = -logits.double().log_softmax(-1)[torch.arange(23), labels]
    found = token_nll(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_modes_are_restored_and_dropout_is_off(windows):
    training = make_model()
    training.train()
    training.model.layers[0].eval()
    expected = perplexity(make_model(), windows[:1]).nll
    assert perplexity(training, windows[:1]).nll == expected
    assert training.training and training.model.layers[1].training
    assert not training.model.layers[0].training


def test_encode_pair_like_the_harness(tokenizer):
    pair = encode_pair(tokenizer, "Question: x\nAnswer: ", " yes")
    assert pair.context == tokenizer("Question: x\nAnswer:").input_ids
    assert tokenizer.decode(pair.context + pair.target) == "Question: x\nAnswer:  yes"
    with_special = tiny_tokenizer(VOCAB, with_bos=True)
    pair = encode_pair(with_special, "Hello", " you")
    assert pair.context[0] == 0 and 0 not in pair.target and 1 not in pair.target
    with pytest.raises(ValueError, match="adds no token"):
        encode_pair(tokenizer, "Hello", "")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("with_bos", [False, True])
def test_scores_equal_one_by_one_scoring(model, batch_size, with_bos):
    tokenizer = tiny_tokenizer(VOCAB, with_bos=with_bos)
    pairs = [
        encode_pair(tokenizer, row["context"], " " + choice)
        for row in CHOICE_ROWS
        if "context" in row
        for choice in row["choices"]
    ]
    scores = evaluation_tasks.score_continuations(model, tokenizer, pairs, batch_size=batch_size)
    for pair, score in zip(pairs, scores, strict=True):
        expected, greedy = log_likelihood(model, pair.context, pair.target)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert score.greedy == greedy


def test_models_without_logits_to_keep_score_the_same(model, tokenizer):
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    first, second = (last_word(m, tokenizer, LAST_WORD_ROWS) for m in (model, Plain(model)))
    assert first.target_perplexity == pytest.approx(second.target_perplexity, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_multiple_choice(model, tokenizer, batch_size):
    found = multiple_choice(model, tokenizer, CHOICE_ROWS, batch_size=batch_size)
    prompts = [
        "Question: Which is a colour?\nAnswer:",
        "Question: What is it?\nAnswer:",
        "The cat sat on the ",
        "Sport: the man lifts a bar. He",
        "Food: How to cook. Heat it. Wait.",
    ]
    correct, correct_norm = [], []
    for prompt, row in zip(prompts, CHOICE_ROWS, strict=True):
        choices = [choice.replace("[step] ", "") for choice in row["choices"]]
        pairs = [encode_pair(tokenizer, prompt, " " + choice) for choice in choices]
        likelihoods = np.array([log_likelihood(model, pair.context, pair.target)[0] for pair in pairs])
        correct.append(bool(likelihoods.argmax() == row["gold"]))
        sizes = [len(choice) for choice in choices]
        correct_norm.append(bool((likelihoods / sizes).argmax() == row["gold"]))
    assert found.correct == tuple(correct) and found.correct_norm == tuple(correct_norm)
    assert found.items == 5
    assert found.accuracy == pytest.approx(np.mean(correct))
    assert found.accuracy_norm_stderr == pytest.approx(np.std(correct_norm, ddof=1) / math.sqrt(5))
    json.dumps(found.as_dict(), allow_nan=False)


def test_length_normalization_counts_characters(model, tokenizer, monkeypatch):
    """Four bytes but two characters: by bytes the other choice would win."""
    choices = ["éé", "abc"]
    likelihoods = iter([-3.2, -4.5])
    monkeypatch.setattr(
        evaluation_tasks,
        "score_continuations",
        lambda *args, **kwargs: [evaluation_tasks.Score(next(likelihoods), False) for _ in choices],
    )
    found = multiple_choice(model, tokenizer, [{"question": "?", "choices": choices, "gold": 1}])
    assert found.correct == (False,)
    assert found.correct_norm == (True,)


def test_hellaswag_text_as_the_harness_cleans_it():
    raw = " [header] How to cook [title] Heat it. [step] Wait a little. [substeps] Stir."
    assert evaluation_tasks.hellaswag_text(raw) == " How to cook. Heat it. Wait a little. Stir."
    ending = evaluation_tasks._capitalized_ending
    assert ending("A man runs. he") == "A man runs. He"
    assert ending("A man runs and he") == "A man runs and he"
    assert ending("[header] x. he") == "[header] x. he"


def test_last_word(model, tokenizer):
    rows = [dict(row) for row in LAST_WORD_ROWS]
    # A target that greedy decoding yields, so that both outcomes occur.
    prompt = tokenizer(rows[0]["context"], return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax().item()
    pairs = [encode_pair(tokenizer, row["context"], " " + row["target"]) for row in rows]
    scored = [log_likelihood(model, pair.context, pair.target) for pair in pairs]
    found = last_word(model, tokenizer, rows, batch_size=2)
    assert found.correct == tuple(greedy for _, greedy in scored)
    nll = -np.array([value for value, _ in scored])
    assert found.target_perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert found.target_perplexity_stderr == pytest.approx(
        math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(3), rel=1e-4
    )
    greedy_pair = evaluation_tasks.Continuation(pairs[0].context, [best])
    (score,) = evaluation_tasks.score_continuations(model, tokenizer, [greedy_pair])
    assert score.greedy


def test_long_prompts_lose_tokens_on_the_left(model, tokenizer):
    pair = encode_pair(tokenizer, "word " * 100, " end of it")
    (score,) = evaluation_tasks.score_continuations(model, tokenizer, [pair], max_length=20)
    ids = (pair.context + pair.target)[-21:]
    expected, _ = log_likelihood(model, ids[: -len(pair.target)], pair.target)
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert evaluation_tasks.model_length(model) == 256
    with pytest.raises(ValueError, match="at most 2 fit"):
        evaluation_tasks.score_continuations(model, tokenizer, [pair], max_length=2)


def test_flips():
    base = (True, True, False, False, True, False)
    new = (True, False, True, False, True, True)
    found = flips(base, new)
    assert found.gained == (2, 5) and found.lost == (1,)
    difference = np.array(new, float) - np.array(base, float)
    assert found.accuracy_difference == pytest.approx(difference.mean())
    assert found.accuracy_difference_stderr == pytest.approx(difference.std(ddof=1) / math.sqrt(6))
    ratio = sum(new) / sum(base)
    assert found.recovery == pytest.approx(ratio)
    residual = np.array(new, float) - ratio * np.array(base, float)
    assert found.recovery_stderr == pytest.approx(math.sqrt((residual**2).sum() * 6 / 5) / sum(base))
    assert flips((False, False), (True, False)).recovery is None
    with pytest.raises(ValueError, match="same rows"):
        flips(base, new[:3])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "gold": 0}, "line 2: the field 'context' is missing"),
        ({"question": 3, "choices": ["a", "b"], "gold": 0}, "line 2: the field 'question' is 3"),
        ({"question": "x", "choices": ["a"], "gold": 0}, "line 2: the field 'choices' must be"),
        ({"question": "x", "choices": ["a", ""], "gold": 0}, "line 2: the field 'choices' holds"),
        ({"question": "x", "choices": ["a", "b"], "gold": 2}, "line 2: the field 'gold' is 2"),
        ({"question": "x", "choices": ["a", "b"], "gold": "0"}, "line 2: the field 'gold' is '0'"),
        ({"context": "x", "activity": "y", "choices": ["a", "[step]"], "gold": 0}, "line 2: .* blank without"),
        ([1], "line 2: expected an object, found a list"),
    ],
)
def test_bad_choice_rows(model, tokenizer, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CHOICE_ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        multiple_choice(model, tokenizer, path)
    assert multiple_choice(model, tokenizer, path, limit=1).items == 1


def test_bad_files(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        last_word(model, tokenizer, tmp_path / "missing.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"context": "a", "target": "b"}\n{nope\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2 is not JSON"):
        last_word(model, tokenizer, tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        last_word(model, tokenizer, str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="holds no rows"):
        multiple_choice(model, tokenizer, [])
    with pytest.raises(ValueError, match="row 0: the field 'target' is missing"):
        last_word(model, tokenizer, [{"context": "a"}])
    with pytest.raises(ValueError, match="limit is 0"):
        last_word(model, tokenizer, LAST_WORD_ROWS, limit=0)


def test_generation_speed(model, tokenizer):
    calls = []
    found = generation_speed(
        model,
        tokenizer,
        prompt_tokens=16,
        new_tokens=5,
        repeats=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert found.device.startswith("cpu")
    assert found.prefill_tokens_per_second == pytest.approx(16 / found.prefill_seconds)
    assert found.decode_tokens_per_second == pytest.approx(4 / found.decode_seconds)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="at least 1, 2 and 1"):
        generation_speed(model, tokenizer, new_tokens=1)


def test_a_wrong_shift_is_noticed(model, windows, monkeypatch):
    """A scorer that reads each token's own logits instead of its predecessor's must disagree with the model's loss."""
    expected = perplexity(model, windows).nll
    original = evaluation._logits
    monkeypatch.setattr(evaluation, "_logits", lambda m, ids, prompt: original(m, ids, prompt).roll(-1, dims=1))
    assert abs(perplexity(model, windows).nll - expected) > 0.01


def test_real_tasks_are_read(model, tokenizer, shared_data):
    for name in ("arc-easy-1000.jsonl", "hellaswag-1000.jsonl"):
        assert multiple_choice(model, tokenizer, shared_data / name, limit=3).items == 3
    assert last_word(model, tokenizer, shared_data / "lambada-1000.jsonl", limit=3).items == 3
