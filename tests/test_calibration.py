"""Calibration text: sources, packing, draws and errors."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kompakt.compress import calibration
from kompakt.compress.calibration import CalibrationOptions, builtin_documents, builtin_text, calibration_tokens

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"


def make_tokenizer(*, with_bos: bool = True, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the spot."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([builtin_text("evaluation")[:30_000]], trainer)
    if with_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=chat_template, model_max_length=10**9
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_documents(text: str, count: int) -> list[str]:
    return [f"{number}: {text}" for number in range(count)]


def test_builtin_parts_share_no_topic_and_no_paragraph():
    topics = importlib.import_module("pydoc_data.topics").topics
    held_out = [topics[name] for name in sorted(topics)[3::4]]
    assert builtin_documents("evaluation") == held_out

    def paragraphs(part):
        return {p.strip() for text in builtin_documents(part) for p in text.split("\n\n")} - {""}

    calibration_part, evaluation_part = paragraphs("calibration"), paragraphs("evaluation")
    assert calibration_part and evaluation_part
    assert not calibration_part & evaluation_part
    everything = {p.strip() for text in topics.values() for p in text.split("\n\n")} - {""}
    assert calibration_part | evaluation_part == everything
    with pytest.raises(ValueError, match="'calibration' or 'evaluation'"):
        builtin_text("test")  # pyright: ignore[reportArgumentType]


def test_stream_is_documents_with_special_tokens_joined_by_eos(tokenizer, tmp_path):
    texts = ["The first document.", "Second one, a little longer.", "  ", "Third."]
    source = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    expected = [*tokenizer(texts[0]).input_ids, 1, *tokenizer(texts[1]).input_ids, 1, *tokenizer(texts[3]).input_ids]
    found = calibration_tokens(tokenizer, CalibrationOptions(source=source, samples=1, length=len(expected)))
    assert found.tokens.tolist() == [expected]
    assert expected[0] == 0, "the tokenizer's own special token stands at the start"
    assert found.documents == 3
    assert found.tokens_total == len(expected)
    assert found.longest_document == len(tokenizer(texts[1]).input_ids)


def test_windows_are_distinct_windows_of_the_stream_and_follow_the_seed(tokenizer, tmp_path):
    text = builtin_text("calibration")[:40_000]
    (tmp_path / "a.txt").write_text(text)
    stream = torch.tensor(tokenizer(text).input_ids)
    length = 50
    starts = {tuple(stream[i : i + length].tolist()): i for i in range(0, len(stream) - length + 1, length)}

    def draw(seed, samples):
        options = CalibrationOptions(source=str(tmp_path / "a.txt"), samples=samples, length=length, seed=seed)
        found = calibration_tokens(tokenizer, options)
        return found, [starts[tuple(row)] for row in found.tokens.tolist()]

    found, picked = draw(0, 60)
    assert found.tokens.shape == (60, length) and found.tokens.dtype == torch.int64
    assert len(set(picked)) == 60, "no window may be drawn twice"
    assert picked != sorted(picked), "windows are shuffled"
    again, _ = draw(0, 60)
    other, other_picked = draw(1, 60)
    assert torch.equal(found.tokens, again.tokens) and found.fingerprint == again.fingerprint
    assert set(picked) != set(other_picked) and found.fingerprint != other.fingerprint
    _, all_picked = draw(0, len(starts))
    assert sorted(all_picked) == sorted(starts.values())


def test_fingerprint_changes_with_one_token_and_with_the_shape(tokenizer):
    tokens = torch.arange(12).view(3, 4)
    changed = tokens.clone()
    changed[2, 3] += 1
    prints = {calibration._fingerprint(t) for t in (tokens, changed, tokens.view(4, 3), tokens.flip(0))}
    assert len(prints) == 4


def test_messages_go_through_the_chat_template(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "General"}]
    source = write_rows(tmp_path / "chat.jsonl", [{"messages": messages, "id": 3}])
    rendered = "<|user|>Hello there</s><|assistant|>General</s>"
    expected = tokenizer(rendered, add_special_tokens=False).input_ids
    found = calibration_tokens(tokenizer, CalibrationOptions(source=source, samples=1, length=len(expected)))
    assert found.tokens.tolist() == [expected]
    assert expected[-1] == 1

    without = make_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"chat\.jsonl line 1: the tokenizer cannot apply its chat template"):
        calibration_tokens(without, CalibrationOptions(source=source, samples=1, length=4))


def test_no_second_eos_after_a_document_that_ends_in_one(tokenizer, tmp_path):
    rows = [{"messages": [{"role": "user", "content": name}]} for name in ("one", "two")]
    source = write_rows(tmp_path / "chat.jsonl", rows)
    found = calibration_tokens(tokenizer, CalibrationOptions(source=source, samples=1, length=8))
    assert "</s></s>" not in tokenizer.decode(found.tokens[0])
    assert found.tokens_total == sum(
        len(tokenizer(f"<|user|>{name}</s>", add_special_tokens=False).input_ids) for name in ("one", "two")
    )


def test_long_text_is_cut_at_line_ends_without_special_tokens(tokenizer, tmp_path, monkeypatch):
    text = "\n".join(f"line {number} of a long file" for number in range(3000))
    (tmp_path / "long.txt").write_text(text)
    options = CalibrationOptions(source=str(tmp_path / "long.txt"), samples=1, length=16)
    whole = tokenizer(text).input_ids
    monkeypatch.setattr(calibration, "PIECE_CHARACTERS", 1000)
    pieces = list(calibration._pieces(text))
    assert "".join(pieces) == text and len(pieces) > 50
    assert all(piece.endswith("\n") and len(piece) <= 1000 for piece in pieces[:-1])
    found = calibration_tokens(tokenizer, options)
    assert found.documents == 1
    assert found.tokens_total == found.longest_document == len(whole)


@pytest.mark.parametrize("text", ["x" * 2500, "word " * 700, "\n" * 2100, "", "a\n" + "y" * 1500])
def test_pieces_lose_nothing(text, monkeypatch):
    monkeypatch.setattr(calibration, "PIECE_CHARACTERS", 1000)
    pieces = list(calibration._pieces(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)


def test_text_beyond_the_cap_is_left_out_with_a_warning(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(calibration, "MAX_TEXT_CHARACTERS", 1000)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in as_documents("words " * 50, 10)])
    with caplog.at_level(logging.WARNING):
        found = calibration_tokens(tokenizer, CalibrationOptions(source=source, samples=1, length=16))
    assert "only the first 1000 characters" in caplog.text
    assert found.documents == 4


def test_too_few_windows_are_used_and_said(tokenizer, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("A few words only. " * 20)
    total = len(tokenizer("A few words only. " * 20).input_ids)
    options = CalibrationOptions(source=str(tmp_path / "short.txt"), samples=128, length=total // 3)
    with caplog.at_level(logging.WARNING):
        found = calibration_tokens(tokenizer, options)
    assert len(found.tokens) == 3
    assert "using 3, not the 128 asked for" in caplog.text

    with pytest.raises(ValueError, match=f"has {total} tokens, but one sample needs {total + 1}"):
        calibration_tokens(tokenizer, options.model_copy(update={"length": total + 1}))


def test_builtin_source(tokenizer):
    found = calibration_tokens(tokenizer, CalibrationOptions(samples=4, length=64))
    assert found.tokens.shape == (4, 64)
    assert found.documents == len(builtin_documents("calibration"))
    assert "builtin" in found.source


def test_works_without_bos(tmp_path):
    tokenizer = make_tokenizer(with_bos=False)
    assert calibration.special_affixes(tokenizer) == ([], [])
    assert calibration.special_affixes(make_tokenizer()) == ([0], [])
    (tmp_path / "a.txt").write_text("Some words to cut.")
    expected = tokenizer("Some words to cut.").input_ids
    options = CalibrationOptions(source=str(tmp_path / "a.txt"), samples=1, length=len(expected))
    assert calibration_tokens(tokenizer, options).tokens.tolist() == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"prompt": "x", "n": 1}\n', r"line 2: expected 'text'.*prompt \(str\), n \(int\)"),
        ('{"text": 5}\n', r"line 1: .*text \(int\)"),
        ("[1, 2]\n", "line 1: expected an object.*list"),
        ('{"text": "fine"}\n\n{oops\n', "line 3 is not JSON"),
        ('{"messages": [{"wrong": 1}, 3]}\n', "line 1: the tokenizer cannot apply"),
        ("\n\n", "holds no text"),
        ('{"text": "   "}\n', "holds no text"),
    ],
)
def test_bad_rows(tokenizer, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        calibration_tokens(tokenizer, CalibrationOptions(source=str(tmp_path / "rows.jsonl"), samples=1, length=4))


def test_bad_sources(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "data.csv").write_text("a,b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, message in [
        (str(tmp_path), "is a directory"),
        (str(tmp_path / "missing.txt"), r"missing\.txt' does not exist"),
        ("missing.jsonl", r"'missing\.jsonl' does not exist"),
        ("wikitext", "'wikitext' does not exist"),
        (str(tmp_path / "data.csv"), r"must be \.txt or \.jsonl"),
        (str(tmp_path / "empty.txt"), "holds no text"),
        (str(tmp_path / "latin.txt"), "not UTF-8"),
        ("org/name", r"'org/name' is no file here.*kompakt\[eval\]"),
        ("name:config", r"kompakt\[eval\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibration_tokens(tokenizer, CalibrationOptions(source=source, samples=1, length=4))


def test_dataset_source_reads_the_split_and_config(tokenizer, monkeypatch):
    calls = []

    class FakeDatasets:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            calls.append((name, config, split, streaming))
            if split == "nope":
                raise ValueError("Bad split: nope")
            return iter([{"text": "A row of text with some words"}, {"text": ""}, {"text": "Another row"}])

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    options = CalibrationOptions(source="org/name:config", split="validation", samples=1, length=8)
    found = calibration_tokens(tokenizer, options)
    assert calls == [("org/name", "config", "validation", True)]
    assert found.documents == 2
    with pytest.raises(ValueError, match="cannot be loaded: Bad split"):
        calibration_tokens(tokenizer, CalibrationOptions(source="org/name", split="nope"))


def test_options_are_strict():
    for bad in [{"samples": 0}, {"length": 1}, {"seed": -1}, {"batch_size": 0}, {"sample": 3}, {"source": ""}]:
        with pytest.raises(ValidationError):
            CalibrationOptions(**bad)
    with pytest.raises(ValidationError):
        CalibrationOptions().samples = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_pieces_of_real_text_tokenize_like_the_whole(tokenizer, shared_data, tmp_path):
    text = (shared_data / "wikitext2-train-3mb.txt").read_text()[:300_000]
    (tmp_path / "wiki.txt").write_text(text)
    found = calibration_tokens(tokenizer, CalibrationOptions(source=str(tmp_path / "wiki.txt"), samples=8, length=512))
    assert found.tokens.shape == (8, 512)
    assert found.documents == 1 and found.tokens_total == found.longest_document
    joints = len(list(calibration._pieces(text))) - 1
    assert joints >= 4
    assert abs(found.tokens_total - len(tokenizer(text).input_ids)) <= 2 * joints
