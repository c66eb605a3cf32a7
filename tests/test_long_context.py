"""`evaluate` of long contexts: both protocols of a compressed cache, retrieval and generation, in Python and from the
command line.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from cache_models import patched, policy_of
from tiny import VOCAB, tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress import GenerationOptions, RetrievalOptions, compress, evaluate, load
from kompakt.compress.assess import measure_text
from kompakt.compress.card import cache_evaluation_sentence
from kompakt.compress.evaluation import compare, perplexity, ratio_mean, token_nll
from kompakt.compress.hf_attention import attention_modules
from kompakt.compress.hf_cache import CACHE
from kompakt.compress.hf_cache_hooks import run_by
from kompakt.compress.recipe import EvaluationOptions, Recipe, evaluation_options
from kompakt.quant.kv_fp8 import KVFP8
from kompakt.quant.method import AttentionPolicy

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(3, VOCAB, (3, 301), generator=torch.Generator().manual_seed(6))
PROMPT = 143


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=1024, steps=30)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(scope="module")
def directory(base, tmp_path_factory):
    """The base with an FP8 cache that keeps few tokens dense."""
    overrides = {"kv_cache.recent_tokens": 16, "evaluation.windows": 0}
    return compress(base, "kv-fp8", tmp_path_factory.mktemp("made") / "kv", overrides=overrides).output


def pieces(model, ids, stops):
    """Logits of tokens that go in up to each stop."""
    parts, start, cache = [], 0, None
    for stop in stops:
        out = model(ids[:, start:stop], use_cache=True, **({} if cache is None else {CACHE: cache}))
        start, cache = stop, out[CACHE]
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


# Perplexity


@torch.no_grad()
def test_decode_scores_what_follows_an_exact_prompt(base, directory):
    model, dense = load(directory), load_base(base)
    found = compare(model, dense, WINDOWS, prompt=PROMPT)
    scored = 301 - PROMPT - 1
    labels = WINDOWS[:, PROMPT + 1 :]
    sums, base_sums = [], []
    for ids, label in zip(WINDOWS.split(1), labels, strict=True):
        logits = pieces(model, ids, (PROMPT, PROMPT + 128, 301))[0, PROMPT:-1]
        sums.append(token_nll(logits, label).double().sum().item())
        exact = dense(ids, use_cache=False).logits[0, PROMPT:-1]
        base_sums.append(token_nll(exact, label).double().sum().item())
    assert found.model.tokens_scored == found.base.tokens_scored == 3 * scored
    assert found.model.prompt_tokens == PROMPT
    assert (found.model.nll, found.model.nll_stderr) == ratio_mean(sums, [scored] * 3)
    assert (found.base.nll, found.base.nll_stderr) == ratio_mean(base_sums, [scored] * 3)
    assert found.kl > 0
    assert perplexity(model, WINDOWS, prompt=PROMPT) == found.model
    assert perplexity(model, WINDOWS).nll != found.model.nll


def load_base(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


@torch.no_grad()
def test_a_prompt_changes_what_is_scored_of_a_plain_model_and_nothing_else(base):
    """With overlapping windows as well: the later of both bounds counts."""
    model = load_base(base)
    windows = torch.cat([WINDOWS[0], WINDOWS[1]]).unfold(0, 301, 150)
    for stride, prompt, first in ((150, 40, (41, 151, 151)), (150, 200, (201, 201, 201))):
        found = perplexity(model, windows, stride=stride, prompt=prompt)
        counts = [301 - start for start in first]
        sums = []
        for ids, start in zip(windows, first, strict=True):
            logits = model(ids[None], use_cache=False).logits[0]
            sums.append(token_nll(logits[start - 1 : -1], ids[start:]).double().sum().item())
        assert found.tokens_scored == sum(counts)
        assert found.nll == pytest.approx(ratio_mean(sums, counts)[0], rel=1e-12)
    with pytest.raises(ValueError, match="prompt is 300; it must leave at least 2 of a window's 301 tokens"):
        perplexity(model, windows, stride=150, prompt=300)


def test_a_prompt_without_codes_is_a_dense_cache(base):
    """Where all tokens stay dense both protocols come to the plain model, up to rounding in bf16."""
    dense = load_base(base).float()
    model = patched(load_base(base).float(), KVFP8(recent_tokens=400))
    assert compare(model, dense, WINDOWS, prompt=PROMPT).kl < 1e-8
    exposed = patched(load_base(base).float(), KVFP8(recent_tokens=16))
    assert compare(exposed, dense, WINDOWS, prompt=PROMPT).kl > 5e-8


def test_evaluate_by_either_protocol(base, directory, text):
    options = {"text": text, "window": 400, "windows": 2}
    chunks = evaluate(directory, against=base, options=EvaluationOptions(**options), speed=False)
    decode = EvaluationOptions(**options, cache_protocol="decode")
    found = evaluate(directory, against=base, options=decode, speed=False)
    assert "prompt_tokens" not in chunks["text"] and chunks["kv_cache"]["protocol"] == "chunks"
    assert found["text"]["prompt_tokens"] == found["perplexity"]["prompt_tokens"] == 200
    used = found["kv_cache"]
    assert (used["protocol"], used["prompt_tokens"]) == ("decode", 200)
    assert used["positions"] == used["reading_codes"] == 2 * 200
    assert found["perplexity"]["tokens_scored"] == 2 * 199
    assert found["comparison"]["kl"] != chunks["comparison"]["kl"]
    said = cache_evaluation_sentence(used)
    assert "The first 200 tokens of a window went in as one prompt" in said and "400 of 400 positions" in said
    swapped = evaluate(base, against=directory, options=decode, speed=False)
    assert swapped["comparison"]["base"] == found["comparison"]["model"]


def test_a_prompt_counts_as_long_enough_for_quantized_attention(base):
    """However short: the layers' threshold is far above it."""
    model = load_base(base)
    policies = {name: AttentionPolicy("int8_fp16", 4096) for name in attention_modules(model)}
    run_by(model, policies, policy_of(model, KVFP8(recent_tokens=16)))
    options = EvaluationOptions(window=301, cache_protocol="decode", prompt_tokens=60)
    found = measure_text(model, None, WINDOWS, options, lambda *_: None)
    # Of each window a prompt in 4 layers, and two chunks that read the cache.
    assert found["attention"]["calls"] == {"int8_fp16": 12, "kv_cache": 24}


def test_tasks_follow_the_protocol(directory, tmp_path):
    file = tmp_path / "words.jsonl"
    words = "the value of an expression is what a function returns to its caller and " * 30
    file.write_text(json.dumps({"context": words, "target": "then"}) + "\n", "utf-8")
    found = {}
    for protocol in ("chunks", "decode"):
        options = EvaluationOptions(windows=0, cache_protocol=protocol)
        found[protocol] = evaluate(directory, options=options, last_word=file, speed=False)["last_word"]
        used = found[protocol]["kv_cache"]
        assert used["protocol"] == protocol and used["positions"] == used["reading_codes"] > 0
    chunks, decode = (item["model"]["target_perplexity"] for item in found.values())
    assert chunks != decode and abs(decode / chunks - 1) < 0.2


def test_the_protocol_is_refused_where_it_says_nothing(base):
    for windows in (0, 1):
        options = EvaluationOptions(cache_protocol="decode", window=64, windows=windows)
        with pytest.raises(ValueError, match="no model here has one"):
            evaluate(base, options=options, speed=False)
    with pytest.raises(ValueError, match="the recipe fills no slot kv_cache"):
        Recipe.load("w4a16-rtn", {"evaluation.cache_protocol": "decode"})
    with pytest.raises(ValueError, match="evaluation: prompt_tokens is for cache_protocol decode"):
        evaluation_options(prompt_tokens=5)
    with pytest.raises(ValueError, match="a prompt of 63 tokens leaves nothing to score in a window of 64"):
        evaluation_options(prompt_tokens=63, window=64, cache_protocol="decode")
    with pytest.raises(ValueError, match="cache_protocol = 'decod' is not valid"):
        evaluation_options(cache_protocol="decod")


def test_compress_measures_by_the_protocol_of_its_recipe(base, text, tmp_path):
    overrides = {"evaluation.text": text, "evaluation.window": 400, "evaluation.windows": 1}
    overrides |= {"evaluation.cache_protocol": "decode", "evaluation.prompt_tokens": 320, "kv_cache.recent_tokens": 16}
    result = compress(base, "kv-fp8", tmp_path / "out", overrides=overrides)
    assert result.evaluation is not None
    assert result.evaluation["kv_cache"]["reading_codes"] == 80
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "stride 400, scored behind the first 320 of each; ±" in " ".join(card.split())


# Retrieval and generation


def test_retrieval_and_generation(base, directory, text):
    generation = GenerationOptions(text=text, prompts=3, prompt_tokens=300, new_tokens=5)
    asked = RetrievalOptions(text=text, lengths=(300, 420), depths=2, samples=1, passage=20)
    stages = {}
    found = evaluate(
        directory,
        against=base,
        options=EvaluationOptions(windows=0),
        retrieval=asked,
        generation=generation,
        speed=False,
        progress=lambda stage, done, total, _: stages.setdefault(stage, []).append((done, total)),
    )
    json.dumps(found, allow_nan=False)
    retrieval = found["retrieval"]
    assert retrieval["source"] == "text.txt" and retrieval["fed"] == {"model": "pieces", "base": "pieces"}
    assert (retrieval["depths"], retrieval["samples"], retrieval["seed"], retrieval["passage"]) == (2, 1, 0, 20)
    assert list(retrieval["results"]) == ["copy_text", "copy_words", "needle", "key_value"]
    for test, result in retrieval["results"].items():
        assert [row["length"] for row in result["rows"]] == [300, 420]
        assert all(row["model"]["items"] == row["base"]["items"] == 2 for row in result["rows"])
        assert all(row["base"]["items_in_codes"] == 0 for row in result["rows"])
        assert all(row["difference"]["nll_difference"] != 0 for row in result["rows"])
        for row in result["rows"]:
            cells = [(cell["depth"], cell["model"]["token_accuracy"]) for cell in row["depths"]]
            answers = [item for item in result["answers"]["model"] if item["length"] == row["length"]]
            assert cells == [(item["depth"], item["right"] / item["tokens"]) for item in answers]
        used = result["kv_cache"]
        assert used["positions"] == used["reading_codes"] == sum(row["model"]["tokens"] for row in result["rows"])
        assert stages[test] == [(done, 8) for done in range(1, 9)]
    generated = found["generation"]
    assert (generated["prompts"], generated["positions"], generated["source"]) == (3, 15, "text.txt")
    assert generated["kv_cache"]["positions"] == 15
    # The first token of each is predicted by the prompt itself, which is attended to exactly.
    assert generated["kv_cache"]["reading_codes"] == 12


def test_a_model_alone_and_beside_itself(base, text):
    options = EvaluationOptions(windows=0)
    asked = RetrievalOptions(text=text, lengths=(200,), tests=("needle",), depths=1, samples=3)
    (row,) = evaluate(base, options=options, retrieval=asked, speed=False)["retrieval"]["results"]["needle"]["rows"]
    assert set(row) == {"length", "model", "depths"} and set(row["depths"][0]) == {"depth", "model"}
    result = evaluate(base, against=base, options=options, retrieval=asked, speed=False)["retrieval"]["results"]
    (beside,) = result["needle"]["rows"]
    assert beside["model"] == beside["base"] == row["model"]
    assert beside["difference"]["nll_difference"] == 0.0
    assert "kv_cache" not in result["needle"]


def test_generation_needs_a_base(base):
    with pytest.raises(ValueError, match="generation is compared with a base model's"):
        evaluate(base, generation=GenerationOptions(), speed=False)


def test_what_does_not_fit_is_refused_before_anything_is_measured(base, text):
    asked = RetrievalOptions(text=text, lengths=(1025,), tests=("needle",))
    measured = []
    with pytest.raises(ValueError, match="retrieval length 1025 exceeds the 1024 positions"):
        evaluate(base, retrieval=asked, options=EvaluationOptions(window=64), progress=lambda *_: measured.append(1))
    with pytest.raises(ValueError, match="prompts of 1020 tokens and 5 new ones exceed the 1024 positions"):
        options = GenerationOptions(text=text, prompt_tokens=1020, new_tokens=5)
        evaluate(base, against=base, generation=options, progress=lambda *_: measured.append(1))
    assert not measured


# The command line


def words(stream: str) -> str:
    return " ".join(stream.split())


def test_command_line(base, directory, text, tmp_path, capsys):
    arguments = [
        "evaluate",
        str(directory),
        "--against",
        str(base),
        "--text",
        text,
        "--window",
        "400",
        "--windows",
        "1",
    ]
    arguments += ["--no-speed", "--cache-protocol", "decode", "--prompt-tokens", "300", "--retrieval", text]
    arguments += ["--retrieval-length", "300,400", "--retrieval-samples", "1", "--retrieval-tests", "copy_words,needle"]
    arguments += ["--generation", text, "--generation-prompts", "2", "--generation-tokens", "4"]
    assert main([*arguments, "-o", str(tmp_path / "found.json")]) == 0
    said = words(capsys.readouterr().out)
    for expected in (
        "stride 400, of text.txt, scored behind the first 300 of each",
        "The first 300 tokens of a window went in as one prompt",
        "copy_words 300: right tokens",
        "copy_words 400: NLL",
        "needle 300: exact",
        "lost of 5 cases",
        "by depth in the context, base → model 10% 30% 50% 70% 90%",
        "1 case at each of 5 depths of text.txt, seed 0, passages of 64 tokens",
        "The context of a case went in as one prompt, then its question, then its answer",
        "same token as the base",
        "of 2 prompts, up to 4 tokens",
        "prompts of 396 tokens of text.txt, attended to exactly",
        "6 of 8 scored positions had coded tokens to read",
    ):
        assert expected in said, expected
    assert re.search(r"needle: (\d+) of \1 scored positions had coded tokens to read; what was asked for was in", said)
    content = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert content["retrieval"]["lengths"] == [300, 400] and content["generation"]["prompt_tokens"] == 396
    assert main(["evaluate", str(base), "--windows", "0", "--no-speed", "--retrieval", text, "--window", "200"]) == 0
    said = words(capsys.readouterr().out)
    assert "needle 200: exact" in said and "20 cases" in said and "codes" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--retrieval-length", "300"], "need --retrieval, the text to ask about"),
        (["--retrieval-tests", "needle"], "need --retrieval"),
        (["--generation-tokens", "3"], "need --generation, the text to continue"),
        (["--retrieval", "TEXT", "--retrieval-length", "1k"], "--retrieval-length 1k is not a list of numbers"),
        (["--retrieval", "TEXT", "--retrieval-tests", "haystack"], "'haystack' is unknown; known: copy_text"),
        (["--retrieval", "nowhere.txt"], "evaluation text nowhere.txt cannot be read"),
        (["--generation", "TEXT"], "generation is compared with a base model's"),
        (["--generation", "TEXT", "--window", "64"], "64 generated tokens leave nothing of a window of 64"),
        (["--cache-protocol", "decod"], "cache_protocol = 'decod' is not valid"),
        (["--cache-protocol", "decode"], "no model here has one; leave it out"),
        (["--prompt-tokens", "8"], "prompt_tokens is for cache_protocol decode"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, says, base, text, tmp_path, capsys):
    arguments = [text if item == "TEXT" else item for item in arguments]
    assert main(["evaluate", str(base), *arguments, "-o", str(tmp_path / "found.json")]) == 2
    out, err = capsys.readouterr()
    assert says in err and out == "" and len(err.strip().split("\n")) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu(base, directory, text):
    found = evaluate(
        directory,
        against=base,
        options=EvaluationOptions(text=text, window=400, windows=4, cache_protocol="decode"),
        retrieval=RetrievalOptions(text=text, lengths=(300,), depths=2, samples=1, passage=20),
        generation=GenerationOptions(text=text, prompts=3, prompt_tokens=300, new_tokens=5),
        device_map={"": 0},
        speed=False,
    )
    assert found["kv_cache"]["reading_codes"] == 4 * 200
    assert found["generation"]["agreement"] > 0.5
