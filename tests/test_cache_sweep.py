"""`kompakt bench cache`: rows of caches beside the float model, appended and rendered."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_directory, write_text

from kompakt.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(base, text, out, *more):
    options = ["--dataset", str(text), "--num-calibration-samples", "2", "--max-seq-length", "64", "--text", str(text)]
    options += ["--window", "400", "--windows", "2"]
    return main(["bench", "cache", str(base), *options, "-o", str(out), "--json", *more])


def test_rows_and_table(base, text, tmp_path, capsys):
    out = tmp_path / "cache.json"
    found = ["--retrieval", str(text), "--retrieval-length", "700", "--retrieval-samples", "1"]
    assert run(base, text, out, "--set", "recent_tokens=8", *found) == 0
    more = ["--methods", "kv_fp8", "--set", "recent_tokens=4096", "--label", "nothing coded", "--append"]
    assert run(base, text, out, *more, *found) == 0
    capsys.readouterr()
    result = json.loads(out.read_text())
    fp8, int4, dense = result["rows"]
    assert [row["label"] for row in result["rows"]] == ["kv_fp8", "kv_int4", "nothing coded"]
    for row in (fp8, int4):
        assert row["chunks"]["kv_cache"]["protocol"] == "chunks" and row["decode"]["kv_cache"]["protocol"] == "decode"
        assert row["chunks"]["kv_cache"]["reading_codes"] > 0 and row["decode"]["kv_cache"]["reading_codes"] > 0
        assert row["retrieval"]["needle"]["kv_cache"]["reading_codes"] > 0
    assert 0 < fp8["chunks"]["kl"] < int4["chunks"]["kl"] and 0 < fp8["decode"]["kl"] < int4["decode"]["kl"]
    assert dense["chunks"]["kl"] < fp8["chunks"]["kl"] and dense["chunks"]["kv_cache"]["reading_codes"] == 0
    assert main(["bench", "table", str(out)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert lines[0].startswith(
        "| cache | bits | every position reads codes | dense prompt, then codes | copy_words at 700"
    )
    assert len(lines) == 5 and lines[4].startswith("| nothing coded | – | ")
    assert "2 windows of 400 tokens" in shown and "5 cases each" in shown
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- cache.json -->\n<!-- end -->\nb\n")
    assert main(["bench", "table", str(out), "--into", str(document)]) == 0
    assert "| kv_int4 |" in document.read_text()


def test_other_conditions_are_refused(base, text, tmp_path, capsys):
    out = tmp_path / "cache.json"
    assert run(base, text, out, "--methods", "kv_fp8") == 0
    before = out.read_text()
    assert run(base, text, out, "--methods", "kv_int4", "--append", "--window", "300") == 2
    assert run(base, text, out, "--methods", "kv_int3") == 2
    assert run(base, text, out, "--retrieval", str(text), "--retrieval-length", "99999") == 2
    assert run(base, text, out, "--retrieval-tests", "needle") == 2
    assert out.read_text() == before
    assert "unknown method 'kv_int3'" in capsys.readouterr().err
