"""`kompakt bench decode`: parsed, checked, computed and printed, with a timer that only counts; one GPU run."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from kompakt.cli.main import main
from kompakt.compress import decode_contenders, decode_speed
from kompakt.compress.attention_cases import attend_rows, worst_error
from kompakt.compress.attention_contenders import Contender
from kompakt.compress.decode_contenders import (
    KINDS,
    PEERS,
    DecodeCase,
    decode_cases,
    fill,
    method_of,
    needles,
    parse_batch_lengths,
    read_bytes,
    rotated_stores,
    storage,
    visible,
)
from kompakt.compress.decode_speed import CHECK_LENGTH, LIMITS, check_kernel, reading
from kompakt.compress.decode_speed_table import absences, check_decode_speeds, decode_table, merged_decode
from kompakt.compress.device_speed import Ceilings, Machine
from kompakt.compress.recipe import Recipe
from kompakt.kernels.decode_attention import decode_attention, decode_ref
from kompakt.kernels.kv_pages import PAGE, write_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CEILINGS = Ceilings(read_gb_per_second=1000, copy_gb_per_second=800, bf16_tflops=1, fp8_tflops=2)
CASE = DecodeCase(2, 600, 9, 3, 16, 1)
WHOLE = [kind for kind in KINDS if not kind.startswith("evict")]
"""Kinds that keep all tokens."""


def timer(calls):
    """A microsecond per head, whatever is called, so that times differ and repeat."""
    return 1e-6 * calls[0]().shape[1]


@pytest.fixture
def machine():
    return Machine(CPU, timer, cache_bytes=0, ceilings=CEILINGS)


def measure(machine, kinds=("int4", "bf16"), peers=tuple(PEERS), batch_lengths=((2, 600),), queries=1, **options):
    found = decode_cases(batch_lengths, [(9, 3)], [16], kinds, queries)
    return decode_speed.decode_speed(machine, found, kinds, peers, **options)


def test_options_are_parsed_and_each_once():
    assert parse_batch_lengths("8x32768, 1x131072,8×32768") == [(8, 32768), (1, 131072)]
    found = decode_cases([(1, 512), (2, 600)], [(9, 3)], [16, 32], ["int4"], 4)
    assert [(case.batch, case.length, case.head_dim) for case in found] == [
        (1, 512, 16),
        (1, 512, 32),
        (2, 600, 16),
        (2, 600, 32),
    ]
    assert found[0].name == "1 × 512 tokens, 9/3 heads of 16" and found[0].queries == 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse_batch_lengths("32768"), "cache '32768' is no number of sequences x at least 512 tokens"),
        (lambda: parse_batch_lengths("8x511"), "cache '8x511'"),
        (lambda: parse_batch_lengths("0x600"), "cache '0x600'"),
        (lambda: parse_batch_lengths(""), "use e.g. 8x32768"),
        (lambda: decode_cases([(1, 512)], [(8, 2)], [15], ["fp8", "int4"], 1), "head_dim 15 is odd"),
        (
            lambda: decode_cases([(1, 9000), (1, 1551)], [(8, 2)], [16], ["fp8", "evict4x"], 1),
            "kind evict4x evicts from no fewer than 1552 tokens, and a cache has 1551",
        ),
        (
            lambda: decode_cases([(1, 512)], [(9, 3)], [16], ["fp8"], 22),
            r"22 queries of heads 9/3 are 66 rows .* holds 64; use at most 21",
        ),
    ],
)
def test_bad_options_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_caches_are_those_of_the_recipes(tmp_path, monkeypatch):
    for kind, name in (("int4", "kv-int4"), ("fp8", "kv-fp8")):
        recipe, method = Recipe.load(name).kv_cache, method_of(kind)
        assert type(recipe) is type(method) and recipe.kind == method.kind == kind
        assert (recipe.sink_tokens, recipe.recent_tokens) == (method.sink_tokens, method.recent_tokens)
    assert method_of("pq2") == Recipe.load("kv-pq2").kv_cache
    file = tmp_path / "other.yaml"
    file.write_text("version: 1\nkv_cache: {method: kv_fp8, sink_tokens: 5, recent_tokens: 64}\n")
    monkeypatch.setitem(decode_contenders.RECIPES, "fp8", str(file))
    assert (method_of("bf16").kind, method_of("bf16").sink_tokens, method_of("bf16").recent_tokens) == ("bf16", 5, 64)
    problem = CASE.draw(CPU)
    # As transformers' caches keep them, and queries as a model gives them.
    assert problem.key.is_contiguous() and problem.value.is_contiguous()
    assert replace(CASE, queries=2).draw(CPU).query.transpose(1, 2).is_contiguous()
    key_map = fill("int4", problem).where().key_map
    assert key_map.rotated and key_map.mean.shape == key_map.factors.shape == (3, 16)
    # Keys have offsets of 4 per channel, which the mean takes off.
    assert key_map.encode(problem.key).mean(dim=2).abs().max() < 1 < problem.key.float().mean(dim=2).abs().max()


@pytest.mark.parametrize("kind", WHOLE)
def test_bytes_are_counted_from_storage(kind, machine):
    problem = CASE.draw(CPU)
    store = fill(kind, problem)
    assert store.coded == 384 and store.tokens == 600
    # Bytes of a key and a value.
    page = {"int4": 16 + 2 * 4, "fp8": 2 * 16 + 2 * 4, "bf16": 4 * 16, "pq4": 16, "pq2": 8}
    # A bitmap of a word, 8 or 4 channels, σ of INT4; of a page 16 bytes of room.
    page |= {"prune50": 2 * (4 + 16) + 1 / 8, "prune70": 2 * (4 + 8) + 1 / 8, "prune70-int4": 2 * (4 + 2 + 2) + 1 / 8}
    page = page[kind]
    dense = (600 - 384 + 4) * 4 * 16
    both = 2 * 9 * 16 * 2 * 2  # queries and outputs
    assert read_bytes(store, problem) == 6 * (384 * page + dense) + 8 * 3 + both
    found = storage(store, problem)
    assert found["page_bytes_per_token"] == round(page, 2) and "kept_tokens" not in found
    assert found["bytes_per_token"] == round(store.nbytes().total / (6 * 600), 2) > page


@pytest.mark.parametrize(("kind", "ratio", "page"), [("evict4x", 4, 4 * 16), ("evict2x-int4", 2, 16 + 2 * 4)])
def test_evicted_caches_are_ragged_and_count_what_they_keep(kind, ratio, page):
    problem = replace(CASE, length=4000).draw(CPU)
    store = fill(kind, problem)
    assert store.pending is None and store.coded == store.gone == 4000 - 128
    counts = [count for row in store.kept.counts for count in row]
    # As the recipe does, from what would be allocated: sinks, recent tokens and their page are counted.
    whole = sum(-(-count // PAGE) for count in counts)
    assert whole == 2 * int(3 * (4000 / ratio - 260) // PAGE) and max(counts) >= 2 * min(counts) > 0
    assert all(
        torch.equal(one, other) for one, other in zip(store.kept.read(0), fill(kind, problem).kept.read(0), strict=True)
    )
    dense = (128 + 4) * 4 * 16
    assert read_bytes(store, problem) == whole * (PAGE * page + 8) + 6 * dense + 2 * 9 * 16 * 2 * 2
    found = storage(store, problem)
    assert found["page_bytes_per_token"] == page and found["kept_tokens"] == [min(counts), max(counts)]
    assert found["bytes_per_token"] == round(store.nbytes().total / (6 * 4000), 2) < 4 * 16 / ratio * 1.1


def test_rotated_caches_have_pages_of_their_own(machine):
    problem = CASE.draw(CPU)
    first, second = rotated_stores("int4", problem, machine)
    assert not set(first.table().tolist()) & set(second.table().tolist())
    query = problem.query
    assert torch.equal(*(decode_attention(query, visible(store, problem))[0] for store in (first, second)))
    assert len(rotated_stores("int4", problem, replace(machine, cache_bytes=10**6))) > 20


@pytest.mark.parametrize("queries", [1, 5])
def test_every_needle_is_found(queries):
    problem = DecodeCase(2, 4000, 9, 3, 64, queries).draw(CPU)
    out = attend_rows(needles(problem), problem.key, problem.value, problem.layout, slice(0, queries))
    count = 2 * 9 * queries
    large = list(range(30, 4000 - queries, 61))
    value = problem.value.float().repeat_interleave(3, dim=1)
    found = set()
    for index, part in enumerate(out.reshape(count, 64)):
        token = large[index * len(large) // count]
        expected = value[index // (9 * queries), index // queries % 9, token]
        assert (part - expected).norm() < 0.01 * expected.norm()
        found.add(token // PAGE)
    assert len(found) == min(count, len({token // PAGE for token in large}))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WHOLE)))
def test_kept_pages_of_another_head_show_at_the_length(kind):
    problem = DecodeCase(2, 4000, 9, 3, 64, 1).draw(CPU)
    store = fill(kind, problem)
    query, kv = needles(problem), visible(store, problem)
    expected, _ = decode_ref(query.float(), kv, reading(problem))
    assert worst_error(decode_attention(query, kv)[0], expected) <= 2.0**-8
    for row, head in itertools.product(range(2), range(3)):
        table = kv.kept.table.clone()
        others = kv.kept.numbers[1 - row][head]
        for place in range(len(kv.kept.numbers[row][head])):
            table[row, head, place] = others[place % len(others)] * kv.kept.layout.record_bytes
        wrong = replace(kv, kept=replace(kv.kept, table=table))
        assert worst_error(decode_attention(query, wrong)[0], expected) > 2 * LIMITS[kind]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_page_in_anothers_place_shows_at_the_length(kind):
    problem = DecodeCase(2, 4000, 9, 3, 64, 1).draw(CPU)
    store = fill(kind, problem)
    query, kv = needles(problem), visible(store, problem)
    expected, _ = decode_ref(query.float(), kv, reading(problem))
    assert worst_error(decode_attention(query, kv)[0], expected) <= 2.0**-8
    pages = dict(kv.pages.pages)
    number = (2000 // 61 * 61 + 30) // PAGE  # of the token that the second sequence's first head looks for
    pages[number] = pages[number + 1]
    wrong = replace(kv, pages=replace(kv.pages, pages=pages))
    assert worst_error(decode_attention(query, wrong)[0], expected) > 2 * LIMITS[kind]


def test_rows_hold_ratios_rates_and_absent_peers(machine):
    result = measure(machine, batch_lengths=((1, 520), (2, 600)))
    assert [(row["length"], row["kind"], row["correct"]) for row in result["rows"]] == [
        (520, "int4", True),
        (520, "bf16", True),
        (600, "int4", True),
        (600, "bf16", True),
    ]
    row = result["rows"][2]
    assert row["microseconds"] == 9 and row["gb_per_second"] == round(row["bytes"] / 9e-6 / 1e9, 1)
    assert row["floor_microseconds"] == round(row["bytes"] / 1e6, 3)  # at 1,000 GB/s
    assert row["share"] == round(row["bytes"] / 1e6 / 9, 4)
    assert row["coding"] == {"microseconds_per_page": 3.0, "microseconds_per_token": round(3 / PAGE, 4)}
    assert row["backend"] == "reference" and row["coded_tokens"] == 384
    # The CPU runs the reference: bf16 rounds its output, and there is nothing else between the two.
    assert row["error"] <= 2.0**-8 and row["length_error"] <= 2.0**-8
    assert row["peers"]["transformers"]["ratio"] == 1 and row["peers"]["repeated"]["error"] < 0.01
    assert row["peers"]["cudnn"] == row["peers"]["fa2"] == {"absent": "needs a CUDA device"}
    json.dumps(result, allow_nan=False)
    check_decode_speeds(result)


def test_peers_of_several_queries_are_causal(machine):
    row = measure(machine, kinds=["fp8"], peers=["transformers", "repeated"], queries=7)["rows"][0]
    assert row["correct"] and row["queries"] == 7
    assert all(peer["error"] < 0.01 for peer in row["peers"].values()), row["peers"]


def test_pruned_and_evicted_kinds_are_measured(machine):
    kinds = ["prune50", "prune70", "prune70-int4", "evict4x", "evict2x-int4"]
    result = measure(machine, kinds, ["transformers"], ((1, 2000),))
    for row in result["rows"]:
        assert row["correct"] and row["microseconds"] == 9 and row["peers"]["transformers"]["ratio"] == 1, row
        assert row["checked_tokens"] == CHECK_LENGTH + {"evict4x": 1552, "evict2x-int4": 776}.get(row["kind"], 0)
        assert row["coding"]["microseconds_per_page"] == 3
    text = decode_table(result)
    assert "| 1 × 2,000, 9/3 heads of 16 | evict2x-int4 | 9.0 (" in text and "beside peers that read all" in text
    assert "beside peers that read all" not in decode_table({**result, "rows": result["rows"][:3]})
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("broken", ["head", "nan", "raises", "long", "long nan", "coding"])
def test_a_wrong_result_has_no_time(machine, monkeypatch, broken):
    def wrong(query, kv):
        if broken == "long" and kv.tokens == 600 and kv.pages.layout.kind == "int4":
            pages = {**kv.pages.pages, 1: kv.pages.pages[2]}
            kv = replace(kv, pages=replace(kv.pages, pages=pages))
        out, lse = decode_attention(query, kv)
        if kv.pages.layout.kind == "int4":
            if broken == "raises":
                raise RuntimeError("no such tile\nmore")
            if broken == "head":
                out[1, 4] = out[1, 5]
            elif broken == "nan" or (broken == "long nan" and kv.tokens == 600):
                out[0, 0, 0, 3] = math.nan
        return out, lse

    def miswritten(key, value, columns, pages, **options):
        write_tokens(key, value, columns, pages, **options)
        if pages.layout.kind == "int4":
            pages.pages[1].value_codes[0, 2, 5, 7] ^= 16

    monkeypatch.setattr(decode_contenders, "decode_attention", wrong)
    if broken == "coding":
        monkeypatch.setattr("kompakt.compress.cache.write_tokens", miswritten)
    result = measure(machine)
    bad, good = result["rows"]
    assert good["correct"] and not bad["correct"]
    assert "microseconds" not in bad and "share" not in bad and "ratio" not in bad["peers"]["transformers"]
    json.dumps(result, allow_nan=False)
    says = {
        "raises": "no such tile",
        "long": "at this length",
        "long nan": "error None at this length",
        "nan": f"error None on {CHECK_LENGTH} tokens",
        "coding": "coding: 1 of its pages differ",
    }
    with pytest.raises(RuntimeError, match=r"1 of 2 results are wrong.*2 × 600, 9/3 heads of 16, int4"):
        check_decode_speeds(result)
    with pytest.raises(RuntimeError, match=says.get(broken, f"on {CHECK_LENGTH} tokens")):
        check_decode_speeds(result)
    assert "| 2 × 600, 9/3 heads of 16 | int4 | wrong | – |" in decode_table(result)


def test_needles_are_what_a_length_is_checked_with(machine, monkeypatch):
    monkeypatch.setattr(decode_speed, "needles", lambda problem: 1 / 0)
    assert measure(machine, kinds=["fp8"], peers=[])["rows"][0]["reason"].startswith("ZeroDivisionError")


def test_a_wrong_peer_is_absent(machine, monkeypatch):
    def peer(problem, machine):
        return Contender([(problem.query, problem.key, problem.value)], lambda query, key, value: 2 * query)

    monkeypatch.setitem(PEERS, "fa2", peer)
    found = measure(machine, kinds=["bf16"], peers=["fa2"])["rows"][0]
    assert "its result is wrong: error" in found["peers"]["fa2"]["absent"] and found["correct"]


def test_table_and_merge(machine, tmp_path):
    result = measure(machine)
    text = decode_table(result)
    row = result["rows"][0]
    cells = f"9.0 (0.1) | – | – | 1.00 | 1.00 | 2% | {row['bytes_per_token']:.1f} | 0.023 |"
    assert f"| 2 × 600, 9/3 heads of 16 | int4 | {cells}" in text
    assert "cudnn is absent: needs a CUDA device." in text and "repeated heads copies every KV head" in text
    measured = {**row["peers"], "fa2": {"microseconds": 1.0, "ratio": 2.0}}
    some = {**result, "rows": [result["rows"][1], {**row, "queries": 3, "peers": measured}]}
    assert "fa2 is absent (2 × 600, 9/3 heads of 16): needs a CUDA device." in absences(some)
    assert "| 2 × 600, 9/3 heads of 16, 3 queries | int4 |" in decode_table(some)
    file = tmp_path / "decode.json"
    file.write_text(json.dumps(result))
    faster = replace(machine, ceilings=replace(CEILINGS, read_gb_per_second=2000))
    both = merged_decode(file, measure(faster, kinds=["fp8", "int4"], peers=[]))
    assert [row["kind"] for row in both["rows"]] == ["bf16", "fp8", "int4"]
    assert both["rows"][0]["share"] == pytest.approx(result["rows"][1]["share"] / 2, rel=0.01)
    assert list(both["against"]) == list(PEERS) and merged_decode(tmp_path / "new.json", result) is result


def test_command_keeps_what_it_has(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "cuda", classmethod(lambda cls, ops: machine))
    monkeypatch.setattr("kompakt.compress.decode_speed.check_kernel", lambda device, kinds: None)
    file, page = tmp_path / "new" / "decode.json", tmp_path / "page.md"
    command = ["bench", "decode", "--head-dims", "16", "--heads", "9/3", "-o", str(file)]
    command += ["--against", "transformers"]
    assert main([*command, "--batch-lengths", "1x520", "--kinds", "fp8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert main([*command, "--batch-lengths", "2x520", "--kinds", "int4,bf16", "--append"]) == 0
    printed = capsys.readouterr().out
    assert "2 × 520, 9/3 heads of 16" in printed and "B/token" in printed
    assert len(json.loads(file.read_text())["rows"]) == 3
    page.write_text("<!-- new/decode.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert "| 2 × 520, 9/3 heads of 16 | bf16 |" in page.read_text()
    monkeypatch.setitem(LIMITS, "bf16", 0.0)
    assert main([*command, "--batch-lengths", "1x520", "--kinds", "bf16"]) == 1
    out, err = capsys.readouterr()
    assert "wrong" in out and "error: 1 of 1 results are wrong" in err

    def stop(*call):
        raise KeyboardInterrupt

    saved = []
    with pytest.raises(KeyboardInterrupt):
        measure(machine, ["fp8"], (), ((1, 520), (1, 530)), progress=lambda *_: saved and stop(), keep=saved.append)
    assert [row["length"] for row in saved[0]["rows"]] == [520]


def test_a_device_without_a_kernel_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="of kind evict4x has no kernel on this device: device is cpu"):
        check_kernel(CPU, ["evict4x"])
    monkeypatch.setattr("kompakt.kernels.cache_method.triton_refusal", lambda *_: None)
    check_kernel(CPU, ["int4", "prune50", "evict4x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no CUDA device"),
        (["--kinds", "int3"], "unknown kind 'int3'; known: int4, fp8, pq4, pq2, prune50"),
        (["--kinds", ","], "no kind was named"),
        (["--against", "fa3"], "unknown peer 'fa3'; known: cudnn"),
        (["--batch-lengths", "8"], "cache '8'"),
        (["--queries", "17"], "at most 16"),
        (["--heads", "8/3"], "3 KV heads"),
    ],
)
def test_command_refuses_in_one_sentence(options, says, capsys):
    assert main(["bench", "decode", *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.gpu
def test_pruned_and_evicted_kinds_end_to_end(capsys):
    kinds = "prune50,prune70,prune70-int4,evict4x,evict2x-int4"
    shapes = ["--batch-lengths", "2x3000,3x9000", "--head-dims", "64,128", "--heads", "32/8,9/3"]
    for queries in ("1", "3"):
        command = ["bench", "decode", "--kinds", kinds, *shapes, "--against", "cudnn", "--queries", queries, "--json"]
        assert main(command) == 0
        for row in json.loads(capsys.readouterr().out)["rows"]:
            assert row["correct"] and 0 < row["share"] < 1.2 and row["backend"] == "triton", row


@pytest.mark.gpu
def test_one_shape_end_to_end(tmp_path, capsys):
    file = tmp_path / "decode.json"
    command = ["bench", "decode", "--batch-lengths", "2x3000", "--head-dims", "64,128", "-o", str(file)]
    for queries in ("1", "3"):
        assert main([*command, "--queries", queries, "--append", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        assert row["correct"] and 0 < row["share"] < 1.2 and row["backend"] == "triton", row
        assert row["peers"]["transformers"]["ratio"] > 0 and row["coding"]["microseconds_per_page"] > 0
    assert result["rows"][0]["peers"]["fa2"]["ratio"] > 0
    assert "| 2 × 3,000, 32/8 heads of 64 | int4 |" in decode_table(result)
