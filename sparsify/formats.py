"""Published patterns, read and written.

MInference's files are a list over layers of ``{"head": [name, vertical, slash, score]}``; Qwen's long-context configs
hold the same under ``dual_chunk_attention_config.sparse_attention_config`` (or that key alone). Names:

    vertical_and_slash v s   `vertical_slash`        stream_llm sink window   `a_shape`        block_sparse   `block`

whose tiles are always 100. Scores are read over, and written as 1.0: they mean nothing but how good the search found a
head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .patterns import AShape, Block, Pattern, VerticalSlash

BLOCKS = 100
MAX_BYTES = 2**24


def read_published(file: str | Path) -> list[dict[int, Pattern]]:
    """Patterns by layer and head. ValueError if the file holds anything else."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"pattern file {path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, a pattern file at most {MAX_BYTES:,}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    return parse_published(content, str(path))


def parse_published(content: Any, where: str = "the patterns") -> list[dict[int, Pattern]]:
    """The same of a file's content."""
    for key in ("dual_chunk_attention_config", "sparse_attention_config"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if isinstance(content, dict) and set(content) == {str(layer) for layer in range(len(content))}:
        content = [content[str(layer)] for layer in range(len(content))]
    if not isinstance(content, list) or not content or not all(isinstance(layer, dict) for layer in content):
        raise ValueError(f"{where} is no list of layers, each a mapping of heads to patterns")
    return [
        {
            _head(head, where, layer): _pattern(entry, f"{where}: layer {layer}, head {head}")
            for head, entry in row.items()
        }
        for layer, row in enumerate(content)
    ]


def _head(head: str, where: str, layer: int) -> int:
    if not head.isascii() or not head.isdigit():
        raise ValueError(f"{where}: layer {layer} names a head {head[:40]!r}; heads are numbers from 0")
    return int(head)


def _pattern(entry: Any, where: str) -> Pattern:
    if not isinstance(entry, list) or len(entry) < 3 or not all(type(item) is int for item in entry[1:3]):
        raise ValueError(f"{where} is no list [name, number, number, score]")
    name, first, second = entry[:3]
    if name == "vertical_and_slash":
        return VerticalSlash(first, second)
    if name == "stream_llm":
        return AShape(first, second)
    if name == "block_sparse":
        return Block(BLOCKS)
    raise ValueError(f"{where} has pattern {str(name)[:40]!r}; known: vertical_and_slash, stream_llm, block_sparse")


def published(layers: Sequence[Sequence[Pattern]]) -> list[dict[str, list[Any]]]:
    """MInference's content for patterns by layer and head. ValueError for a pattern that it has no name for."""
    return [
        {str(head): _entry(pattern, layer, head) for head, pattern in enumerate(row)}
        for layer, row in enumerate(layers)
    ]


def _entry(pattern: Pattern, layer: int, head: int) -> list[Any]:
    if isinstance(pattern, VerticalSlash):
        return ["vertical_and_slash", pattern.vertical, pattern.slash, 1.0]
    if type(pattern) is AShape:
        return ["stream_llm", pattern.sink, pattern.window, 1.0]
    if isinstance(pattern, Block) and pattern.tiles == BLOCKS:
        return ["block_sparse", BLOCKS, 0, 1.0]
    raise ValueError(
        f"layer {layer}, head {head} runs {pattern.as_dict()}, which MInference's format has no name for; it knows "
        f"vertical_slash, a_shape, and block with {BLOCKS} tiles"
    )


def qwen_config(layers: Sequence[Sequence[Pattern]], *, min_length: int) -> Mapping[str, Any]:
    """What a Qwen config holds under ``dual_chunk_attention_config`` for such patterns; its other keys are the
    model's.
    """
    return {
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": min_length,
        "sparse_attention_last_q": 64,
        "sparse_attention_config": {str(layer): row for layer, row in enumerate(published(layers))},
    }
