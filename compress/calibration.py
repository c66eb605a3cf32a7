"""Calibration text: documents in, windows of token ids out.

Every document is tokenized with the special tokens its tokenizer adds; documents are joined by the end-of-text token
where the tokenizer has one, and the stream is cut into windows of ``length`` tokens; the incomplete tail is dropped.
``seed`` then picks ``samples`` windows without replacement, so no window is used twice.

Sources: ``builtin`` (the Python language reference that ships with the interpreter), a ``.txt`` file (one document), a
``.jsonl`` file (rows with ``messages`` or ``text``), or a Hugging Face dataset id.

A document longer than 64 Ki characters is tokenized in pieces cut at line ends, which lets the tokenizer work in
parallel (3 MB: 1 s instead of 3.4 s on two cores). A token or two around each cut may differ from those of the uncut
text; no special token is added there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import platform
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_TEXT_CHARACTERS = 64 * 2**20
PIECE_CHARACTERS = 64 * 2**10
BATCH_CHARACTERS = 2**20
EVALUATION_EVERY = 4


class CalibrationOptions(BaseModel):
    """What to calibrate on. ``length`` counts tokens; ``batch_size`` counts samples per forward pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(default="builtin", min_length=1)
    split: str = Field(default="train", min_length=1)
    samples: int = Field(default=128, ge=1, le=1_000_000)
    length: int = Field(default=2048, ge=2, le=1_048_576)
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=1, ge=1, le=4096)


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows and where they come from.

    tokens: (samples, length), int64; fewer samples than asked for when the text is short. ``tokens_total`` counts the
    tokens available in the source, ``longest_document`` the tokens of its longest document. ``fingerprint`` is the
    SHA-256 of ``tokens`` as little-endian int64 together with their shape.
    """

    tokens: torch.Tensor
    source: str
    documents: int
    tokens_total: int
    longest_document: int
    fingerprint: str


@dataclass(frozen=True)
class Document:
    """One text; ``templated`` text went through a chat template, which brings its own special tokens."""

    text: str
    templated: bool = False


def calibration_tokens(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> CalibrationSet:
    """Read ``options.source`` and draw its windows; see the module docstring.

    Raises ValueError for a source that cannot be read, holds no text, or has less than one window. When it has fewer
    windows than ``samples``, all of them are used and a warning says how many.
    """
    description, documents = _open_source(tokenizer, options)
    stream, lengths = _tokenize(tokenizer, _capped(documents, description))
    if not lengths:
        raise ValueError(f"calibration text {description} holds no text")
    available = len(stream) // options.length
    if available == 0:
        raise ValueError(
            f"calibration text {description} has {len(stream)} tokens, but one sample needs {options.length}; "
            "give more text or a smaller length"
        )
    if available < options.samples:
        logger.warning(
            "calibration text %s has %d tokens, enough for %d samples of %d tokens: using %d, not the %d asked for",
            *(description, len(stream), available, options.length, available, options.samples),
        )
    windows = torch.tensor(stream[: available * options.length], dtype=torch.int64).view(available, options.length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(options.seed))
    tokens = windows[order[: options.samples]]
    return CalibrationSet(
        tokens=tokens,
        source=description,
        documents=len(lengths),
        tokens_total=len(stream),
        longest_document=max(lengths),
        fingerprint=_fingerprint(tokens),
    )


def builtin_text(part: Literal["calibration", "evaluation"]) -> str:
    """The Python language reference's text for one purpose; the two parts share no topic and no paragraph."""
    return "\n\n".join(builtin_documents(part))


def builtin_documents(part: Literal["calibration", "evaluation"]) -> list[str]:
    """Topics of ``pydoc_data``, sorted by name, one document each.

    Every fourth topic is for evaluation. Topics quote one another, so a paragraph that stands in an evaluation topic is
    left out of the calibration topics. The text depends on the Python version.
    """
    if part not in ("calibration", "evaluation"):
        raise ValueError(f"part is {part!r}; choose 'calibration' or 'evaluation'")
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            "this Python comes without pydoc_data, the source of the builtin text; name a .txt or .jsonl file instead"
        ) from error
    names = sorted(topics)
    held_out = names[EVALUATION_EVERY - 1 :: EVALUATION_EVERY]
    if part == "evaluation":
        return [topics[name] for name in held_out]
    reserved = {paragraph.strip() for name in held_out for paragraph in topics[name].split("\n\n")} - {""}
    kept = [
        "\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in reserved)
        for name in names
        if name not in held_out
    ]
    return [text for text in kept if text.strip()]


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special token ids that ``tokenizer`` puts before and after a text by default."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if plain and full[start : start + len(plain)] == plain:
            return list(full[:start]), list(full[start + len(plain) :])
    return [], []


def _open_source(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> tuple[str, Iterator[Document]]:
    """A description of the source for reports, and its documents, read as they are asked for."""
    source = options.source
    path = Path(source).expanduser()
    if source == "builtin":
        description = f"builtin (Python {platform.python_version()} language reference, calibration part)"
        return description, (Document(text) for text in builtin_documents("calibration"))
    if path.is_dir():
        raise ValueError(f"calibration source {source!r} is a directory; name a .txt or .jsonl file in it")
    if path.is_file():
        if path.suffix == ".txt":
            return str(path), _text_documents(path)
        if path.suffix == ".jsonl":
            return str(path), _jsonl_documents(path, tokenizer)
        raise ValueError(f"calibration source {source!r} ends in {path.suffix!r}; files must be .txt or .jsonl")
    looks_like_dataset = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?|[\w.-]+:[\w.-]+", source)
    if path.suffix in (".txt", ".jsonl", ".json") or not looks_like_dataset or source.startswith("."):
        raise ValueError(
            f"calibration source {source!r} does not exist; "
            "give 'builtin', a .txt or .jsonl file, or a dataset as 'org/name' or 'name:config'"
        )
    return f"{source} (split {options.split})", _dataset_documents(source, options.split, tokenizer)


def _text_documents(path: Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            yield Document(handle.read(MAX_TEXT_CHARACTERS + 1))
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration source {str(path)!r} is not UTF-8 text: {error.reason}") from error


def _jsonl_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON: {error.msg}") from error
                yield _row_document(row, tokenizer, where)
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration source {str(path)!r} is not UTF-8 text: {error.reason}") from error


def _dataset_documents(source: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"calibration source {source!r} is no file here, and to read it as a Hugging Face dataset the package "
            "'datasets' is needed: pip install 'kompakt[eval]'"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset {source!r} (split {split!r}) cannot be loaded: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _row_document(row, tokenizer, f"dataset {source} row {number}")


def _row_document(row: object, tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """A row's document: ``messages`` through the chat template if there are any, else ``text``."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with 'text' or 'messages', found a {type(row).__name__}")
    if isinstance(row.get("messages"), list):
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
            raise ValueError(f"{where}: the tokenizer cannot apply its chat template to 'messages': {error}") from error
        return Document(str(text), templated=True)
    if isinstance(row.get("text"), str):
        return Document(row["text"])
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
    raise ValueError(f"{where}: expected 'text' (a string) or 'messages' (a list), found the keys: {found}")


def _capped(documents: Iterable[Document], description: str) -> Iterator[Document]:
    """Drop blank documents, and stop with a warning after MAX_TEXT_CHARACTERS."""
    left = MAX_TEXT_CHARACTERS
    for document in documents:
        if not document.text.strip():
            continue
        if len(document.text) > left:
            logger.warning(
                "calibration text %s: only the first %d characters are read", description, MAX_TEXT_CHARACTERS
            )
            if left:
                yield Document(document.text[:left], document.templated)
            return
        left -= len(document.text)
        yield document


def _pieces(text: str) -> Iterator[str]:
    """``text`` in parts of at most PIECE_CHARACTERS, cut after a line end or, failing that, before a space."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1
        if cut <= start:
            cut = text.rfind(" ", start + 1, limit)
        if cut <= start:
            cut = limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _tokenize(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> tuple[array[int], list[int]]:
    """The joined token stream of all documents, and each document's number of tokens."""
    prefix, suffix = special_affixes(tokenizer)
    eos = tokenizer.eos_token_id
    stream: array[int] = array("q")
    lengths: list[int] = []
    for batch in _batches(documents):
        pieces = [(index, piece) for index, document in enumerate(batch) for piece in _pieces(document.text)]
        encoded = tokenizer([piece for _, piece in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        bodies: list[list[int]] = [[] for _ in batch]
        for (index, _), ids in zip(pieces, encoded, strict=True):
            bodies[index].extend(ids)
        for document, body in zip(batch, bodies, strict=True):
            ids = body if document.templated else [*prefix, *body, *suffix]
            if eos is not None and stream and stream[-1] != eos:
                stream.append(int(eos))  # pyright: ignore[reportArgumentType]
            stream.extend(ids)
            lengths.append(len(ids))
    return stream, lengths


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fingerprint(tokens: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
