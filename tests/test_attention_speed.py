"""`kompakt bench attention`: parsed, checked, computed and printed, with a timer that only counts; one GPU run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from kompakt.cli.main import main
from kompakt.compress import attention_contenders, device_speed
from kompakt.compress.attention_cases import (
    MASKS,
    Case,
    Layout,
    attend_rows,
    blocks,
    draw,
    parse_head_dims,
    parse_heads,
    parse_lengths,
    reference_rows,
    worst_error,
)
from kompakt.compress.attention_contenders import PEERS, Absent, Problem
from kompakt.compress.attention_speed import (
    LIMITS,
    PEER_ERROR_LIMIT,
    attention_speed,
    cases,
    check_kernels,
    floor_seconds,
    worst,
)
from kompakt.compress.attention_speed_table import absences, attention_table, check_attention_speeds, merged_attention
from kompakt.compress.device_speed import Ceilings, Machine, graph_time
from kompakt.kernels.attention import MODES, Call, attention_ref, prefill_attention

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CEILINGS = Ceilings(read_gb_per_second=1000, copy_gb_per_second=800, bf16_tflops=1, fp8_tflops=2)
GQA = ((9, 3), (14, 2))


def timer(calls):
    """A microsecond per query, whatever is called, so that times differ and repeat."""
    return 1e-6 * calls[0]().shape[2]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)  # as if it were not installed
    return Machine(CPU, timer, cache_bytes=0, ceilings=CEILINGS)


def measure(machine, masks=("causal",), lengths=(64,), modes=("fp8_fp8", "bf16"), peers=tuple(PEERS), **options):
    found = cases(masks, lengths, [16], [(9, 3)], 1)
    return attention_speed(machine, found, modes, peers, **options)


def test_options_are_parsed_and_each_once():
    assert parse_lengths("4096, 17,4096") == [17, 4096]
    assert parse_head_dims("128,64,64") == [64, 128]
    assert parse_heads("14/2, 9/3,14/2") == [(14, 2), (9, 3)]
    found = cases(["causal", "padding"], [32, 64], [16], [(9, 3)], 1)
    assert [(case.mask, case.length, case.batch) for case in found] == [
        ("causal", 32, 1),
        ("padding", 32, 2),
        ("causal", 64, 1),
        ("padding", 64, 2),
    ]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse_lengths("1k"), "length '1k' is no whole number of at least 16"),
        (lambda: parse_lengths("64,8"), "length '8'"),
        (lambda: parse_lengths(""), "length ''"),
        (lambda: parse_head_dims("64,512"), "head_dim '512' is no whole number up to 256"),
        (lambda: parse_heads("32"), "use e.g. 32/8"),
        (lambda: parse_heads("32/0"), "use e.g. 32/8"),
        (lambda: parse_heads("32/5"), "5 KV heads do not divide 32"),
    ],
)
def test_bad_options_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [16, 33, 150])
@pytest.mark.parametrize("batch", [1, 3])
def test_pairs_are_those_that_are_visible(mask, length, batch):
    layout = Layout.of(Case(mask, length, 16, 9, 3, batch), CPU)
    assert layout.pairs() == int(layout.visible(slice(0, layout.queries), CPU).sum())


def test_masks_are_what_they_are_called():
    def seen(mask, length=100, batch=2):
        layout = Layout.of(Case(mask, length, 16, 2, 2, batch), CPU)
        return layout, layout.visible(slice(0, layout.queries), CPU)

    index = torch.arange(100)
    causal = index[:, None] >= index
    assert torch.equal(seen("causal")[1], causal.expand(2, -1, -1)) and bool(seen("full")[1].all())
    assert torch.equal(seen("window")[1][0], causal & (index[:, None] - index < 50))
    padded = seen("padding")[1]
    assert torch.equal(padded[0], causal)
    assert torch.equal(padded[1], causal & (index >= 33) & (index >= 33)[:, None])
    layout, packed = seen("packed")
    assert layout.segments.table[:5, 1:3].tolist() == [[0, 7], [7, 41], [41, 46], [46, 73], [73, 100]]
    documents = torch.bucketize(index, torch.tensor([7, 41, 46, 73]), right=True)
    assert torch.equal(packed, (causal & (documents[:, None] == documents)).expand(2, -1, -1))
    layout, chunk = seen("chunk")
    assert layout.queries == 25 and torch.equal(chunk[0], causal[75:])
    assert Layout.of(Case("chunk", 33, 16, 2, 2, 1), CPU).queries == 9
    windows = [Layout.of(Case("window", n, 16, 2, 2, 1), CPU).window for n in (1024, 4096, 8192, 32768)]
    assert windows == [512, 1024, 1024, 4096]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", GQA)
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_those_of_the_reference(mask, heads, mode):
    case = Case(mask, 171, 24, *heads, 2)
    layout = Layout.of(case, CPU)
    query, key, value = draw(case, layout, CPU, torch.float32)
    call = Call(mode, layout.causal, layout.window, 24**-0.5, None)
    reference, _ = attention_ref(query, key, value, call, None, layout.segments, dtype=torch.float64)
    runs = blocks(layout.queries)
    for rows, found in zip(runs, reference_rows(query, key, value, layout, mode, runs)):
        # 171 + 24 terms are added in FP32.
        assert worst_error(found, reference.transpose(1, 2)[:, :, rows]) <= 2.0**-24 * (171 + 24)
        if mode == "bf16":
            exact = attend_rows(query[:, :, rows], key, value, layout, rows, torch.float64)
            assert worst_error(exact, reference.transpose(1, 2)[:, :, rows]) <= 2.0**-23


def test_inputs_are_views_with_offsets_and_outliers():
    case = Case("causal", 500, 32, 8, 2, 1)
    query, key, value = draw(case, Layout.of(case, CPU), CPU)
    assert query.shape == (1, 8, 500, 32) and query.transpose(1, 2).is_contiguous()
    assert key.float().mean(dim=2).std() > 2 and value.float().mean(dim=2).std() < 0.2
    large = value.float()[:, :, 30::61].std() / value.float().std()
    assert 2 < large < 3.2
    assert torch.equal(draw(case, Layout.of(case, CPU), CPU)[1], key)


def test_blocks_hold_both_ends_and_errors_are_relative():
    assert blocks(80) == [slice(0, 80)]
    found = blocks(1001)
    assert [rows.stop - rows.start for rows in found] == [16] * 5 and found[0].start == 0 and found[-1].stop == 1001
    ones = torch.ones(2, 3, 5, 4)
    found = ones.clone()
    found[1, 2, 4] = 3.0
    assert worst_error(found, ones) == pytest.approx((4 / 3) ** 0.5) and worst_error(0 * ones, 0 * ones) == 0
    assert math.isinf(worst_error(ones, 0 * ones))
    found[0, 0, 0, 0] = math.nan
    assert math.isnan(worst_error(found, ones))
    assert math.isnan(worst([(found, ones), (ones, ones)])) and math.isnan(worst([(ones, ones), (found, ones)]))


def test_rows_hold_ratios_rates_and_absent_peers(machine):
    result = measure(machine, lengths=(64, 96))
    assert [(row["length"], row["mode"], row["correct"]) for row in result["rows"]] == [
        (64, "fp8_fp8", True),
        (64, "bf16", True),
        (96, "fp8_fp8", True),
        (96, "bf16", True),
    ]
    row = result["rows"][2]
    assert row["pairs"] == 96 * 97 // 2 and row["flops"] == 4 * 9 * 16 * row["pairs"]
    assert row["microseconds"] == 96 and row["tflops"] == round(row["flops"] / 96e-6 / 1e12, 2)
    assert row["share"] == round(row["flops"] / 2e12 / 96e-6, 4)
    assert row["backend"] == "reference" and "reference" in row["quantization"]["absent"]
    # The CPU runs the reference: bf16 rounds its output, and there is nothing else between the two.
    assert row["error"] <= 2.0**-8 and 0.99 < row["cosine"] < 1 and row["length_error"] <= 2.0**-8
    exact = result["rows"][3]
    assert exact["relative_error"] <= 2.0**-8 < row["relative_error"]
    assert row["peers"]["transformers"]["ratio"] == 1 and row["peers"]["transformers"]["error"] < 0.01
    assert row["peers"]["cudnn"] == row["peers"]["fa2"] == {"absent": "needs a CUDA device"}
    assert row["peers"]["sageattention"] == {"absent": "not installed"}
    json.dumps(result, allow_nan=False)
    check_attention_speeds(result)


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_right_and_transformers_agrees(machine, mask):
    rows = measure(machine, masks=[mask], lengths=[75], modes=MODES, peers=["transformers", "sageattention"])["rows"]
    assert all(row["correct"] for row in rows), [row.get("reason") for row in rows]
    assert rows[0]["peers"]["transformers"]["error"] < 0.01
    why = "not installed" if mask in ("causal", "full") else f"it takes no {mask} mask"
    assert rows[0]["peers"]["sageattention"] == {"absent": why}


def test_the_floor_is_that_of_both_products():
    row = {"mode": "fp8_fp8", "flops": 10**10}
    assert floor_seconds(row, CEILINGS) == pytest.approx(5e-3)
    assert floor_seconds({**row, "mode": "int8_fp8"}, CEILINGS) == pytest.approx(5e-3)
    assert floor_seconds({**row, "mode": "int8_fp16"}, CEILINGS) == pytest.approx(7.5e-3)
    assert floor_seconds({**row, "mode": "bf16"}, CEILINGS) == pytest.approx(10e-3)
    assert floor_seconds(row, replace(CEILINGS, fp8_tflops=None)) == pytest.approx(10e-3)


@pytest.mark.parametrize("broken", ["head", "nan", "raises", "long", "long nan"])
def test_a_wrong_result_has_no_time(machine, monkeypatch, broken):
    def wrong(query, key, value, mode, **options):
        out, lse = prefill_attention(query, key, value, mode=mode, **options)
        if mode == "fp8_fp8":
            if broken == "raises":
                raise RuntimeError("no such tile\nmore")
            if broken == "head":
                out[:, 4, -1] = out[:, 5, -1]
            elif broken == "nan":
                out[:, 0, 61] = math.nan
            elif query.shape[2] == 64:
                # The last query, and only of the length that is timed.
                out[:, :, 63] = 0 if broken == "long" else math.nan
        return out, lse

    monkeypatch.setattr(attention_contenders, "prefill_attention", wrong)
    result = measure(machine)
    bad, good = result["rows"]
    assert good["correct"] and not bad["correct"]
    assert "microseconds" not in bad and "share" not in bad and "ratio" not in bad["peers"]["transformers"]
    json.dumps(result, allow_nan=False)
    says = {
        "raises": "no such tile",
        "long": "error 1.0 at this length",
        "long nan": "error None at this length",
        "nan": "error None on 333 tokens",
    }
    with pytest.raises(RuntimeError, match=r"1 of 2 results are wrong.*causal 9/3 heads of 16, 64 tokens, fp8_fp8"):
        check_attention_speeds(result)
    with pytest.raises(RuntimeError, match=says.get(broken, "on 333 tokens")):
        check_attention_speeds(result)
    assert "| 64 | wrong |" in attention_table(result)


def test_a_wrong_peer_is_absent(machine, monkeypatch):
    monkeypatch.setitem(
        PEERS, "fa2", lambda problem, machine: attention_contenders.kompakt_mode("bf16", problem, machine)
    )
    monkeypatch.setattr(
        attention_contenders,
        "prefill_attention",
        lambda *call, **options: prefill_attention(*call, **options | {"causal": False}),
    )
    found = measure(machine, modes=["bf16"], peers=["fa2"])["rows"][0]
    assert "its result is wrong: error" in found["peers"]["fa2"]["absent"] and not found["correct"]


def test_what_a_peer_writes_for_padding_does_not_matter(machine, monkeypatch):
    def peer(problem, machine):
        def run(query, key, value):
            out = prefill_attention(query, key, value, mode="bf16", segments=problem.layout.segments)[0]
            out[1, :, : 64 // 3] = math.nan
            return out

        return attention_contenders.Contender([(problem.query, problem.key, problem.value)], run)

    monkeypatch.setitem(PEERS, "fa2", peer)
    found = measure(machine, masks=["padding"], modes=["bf16"], peers=["fa2"])["rows"][0]
    assert found["batch"] == 2 and found["peers"]["fa2"]["ratio"] == 1


def test_dense_masks_have_a_limit(machine):
    problem = Problem(Case("window", 65536, 16, 2, 2, 1), Layout(1, 65536, 65536, True, 4096, None), *torch.ones(3, 1))
    with pytest.raises(Absent, match=r"dense mask would have 4\.3e\+09 elements"):
        problem.dense_mask()


def test_kv_heads_are_repeated_where_they_must_be(machine):
    problem = Problem.draw(Case("causal", 40, 16, 9, 3, 1), CPU)

    def takes_equal_heads(query, key, value):
        if query.shape[1] != key.shape[1]:
            raise RuntimeError("No available kernel")
        return query

    found = attention_contenders.grouped_or_repeated(problem, machine, takes_equal_heads, takes_equal_heads)
    assert found.repeats and found.inputs[0][1].shape[1] == 9
    assert torch.equal(found.inputs[0][1][:, 2], problem.key[:, 0]) and torch.equal(
        found.inputs[0][1][:, 3], problem.key[:, 1]
    )
    found = attention_contenders.grouped_or_repeated(problem, machine, takes_equal_heads, lambda *inputs: inputs[0])
    assert not found.repeats and found.inputs[0][1].shape[1] == 3


def test_sageattention_gets_keys_of_its_own(machine, monkeypatch):
    class Module:
        __spec__ = object()

        @staticmethod
        def sageattn(query, key, value, tensor_layout, is_causal):
            assert tensor_layout == "HND" and is_causal
            key -= key.mean(dim=2, keepdim=True)
            return prefill_attention(query, key, value, mode="int8_fp16")[0]

    monkeypatch.setitem(sys.modules, "sageattention", Module)
    problem = Problem.draw(Case("causal", 40, 16, 9, 3, 1), CPU)
    before = problem.key.clone()
    contender = PEERS["sageattention"](problem, machine)
    contender.calls()[0]()
    assert torch.equal(problem.key, before)
    row = measure(machine, modes=["bf16"], peers=["sageattention"])["rows"][0]
    assert row["peers"]["sageattention"]["error"] < 0.05


def test_table_and_merge(machine, tmp_path):
    result = measure(machine, masks=["causal", "window"], lengths=[64, 96])
    text = attention_table(result)
    assert "| causal, 9/3 heads: tokens | 16 fp8_fp8 | 16 bf16 |" in text
    assert "| 96 | 0 · – / – | 0 · – / – |" in text and "FP8 2 TFLOP/s" in text
    assert "sageattention is absent (causal): not installed." in text
    assert "sageattention is absent (window): it takes no window mask." in text
    assert "cudnn is absent: needs a CUDA device." in text
    measured = {**result["rows"][-1]["peers"], "fa2": {"microseconds": 1.0, "ratio": 2.0}}
    some = {**result, "rows": [*result["rows"][:-1], {**result["rows"][-1], "length": 128, "peers": measured}]}
    assert "fa2 is absent (64, 96 tokens): needs a CUDA device." in absences(some)
    assert "| 128 | – | 0 · – / 2.00 |" in attention_table(some)
    only = attention_table({**result, "against": {"transformers": "5"}})
    assert "| 96 | 0 · 1.00 | 0 · 1.00 |" in only and "what transformers runs" in only
    file = tmp_path / "attention.json"
    file.write_text(json.dumps(result))
    faster = replace(machine, ceilings=replace(CEILINGS, fp8_tflops=4))
    both = merged_attention(file, measure(faster, modes=["int8_fp8", "fp8_fp8"], peers=[]))
    assert len(both["rows"]) == 9 and both["ceilings"]["fp8_tflops"] == 4
    shares = [
        next(row["share"] for row in found["rows"] if row["mask"] == "window" and row["mode"] == "fp8_fp8")
        for found in (result, both)
    ]
    assert shares[1] == pytest.approx(shares[0] / 2, rel=0.01)
    assert list(both["against"]) == list(PEERS)
    assert merged_attention(tmp_path / "new.json", result) is result
    with pytest.raises(ValueError, match="another cache_bytes"):
        merged_attention(file, {**result, "cache_bytes": 1})


def test_command_keeps_what_it_has(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "cuda", classmethod(lambda cls, ops: machine))
    monkeypatch.setattr("kompakt.compress.attention_speed.check_kernels", lambda *call: None)
    file, page = tmp_path / "new" / "attention.json", tmp_path / "page.md"
    command = ["bench", "attention", "--head-dims", "16", "--heads", "9/3,14/2", "--modes", "bf16", "-o", str(file)]
    command += ["--against", "transformers"]
    assert main([*command, "--lengths", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert main([*command, "--lengths", "48", "--masks", "causal,packed", "--append"]) == 0
    printed = capsys.readouterr().out
    assert "packed, batch 1, 14/2 heads of 16" in printed and "cosine" in printed
    assert len(json.loads(file.read_text())["rows"]) == 6
    page.write_text("<!-- new/attention.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert "| causal, 14/2 heads: tokens | 16 bf16 |" in page.read_text()

    def stop(*call):
        raise KeyboardInterrupt

    saved = []
    with pytest.raises(KeyboardInterrupt):
        measure(machine, lengths=[32, 48], modes=["bf16"], progress=lambda *step: saved and stop(), keep=saved.append)
    assert [row["length"] for row in saved[0]["rows"]] == [32]


def test_command_fails_on_a_wrong_result_and_says_which(machine, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "cuda", classmethod(lambda cls, ops: machine))
    monkeypatch.setattr("kompakt.compress.attention_speed.check_kernels", lambda *call: None)
    monkeypatch.setitem(LIMITS, "bf16", 0.0)
    command = ["bench", "attention", "--lengths", "32", "--head-dims", "16", "--heads", "9/3", "--modes", "bf16"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "wrong" in out and "error: 1 of 1 results are wrong" in err


def test_a_mode_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="mode int8_fp8 has no kernel on this device: device is cpu"):
        check_kernels(cases(["full"], [64], [16], [(9, 3)], 1), ["int8_fp8"], CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no CUDA device"),
        (["--masks", "tree"], "unknown mask 'tree'; known: causal, full"),
        (["--masks", ""], "no mask was named; known: causal"),
        (["--modes", "int4"], "unknown mode 'int4'; known: bf16"),
        (["--modes", ","], "no mode was named"),
        (["--against", "fa3"], "unknown peer 'fa3'; known: cudnn"),
        (["--lengths", "long"], "length 'long'"),
        (["--heads", "8/3"], "3 KV heads"),
        (["--head-dims", "0"], "head_dim '0'"),
    ],
)
def test_command_refuses_in_one_sentence(options, says, capsys):
    assert main(["bench", "attention", *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


class Events:
    """Stands in for CUDA: an event's time is what the last work took, in milliseconds."""

    def __init__(self, clock):
        self.clock, self.at = clock, 0.0

    def record(self):
        self.at = self.clock[0]

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_long_calls_are_timed_without_a_graph(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Events(clock))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)  # calling it fails
    durations = iter([900.0, 30.0, 21.0, 22.0, 80.0, 23.0, 24.0])

    def call():
        clock[0] += next(durations)

    assert graph_time([call]) == pytest.approx(23e-3)
    with pytest.raises(TypeError):
        graph_time([lambda: clock.__setitem__(0, clock[0] + device_speed.LONG_MILLISECONDS / 2)])


@pytest.mark.gpu
def test_one_shape_end_to_end(tmp_path, capsys):
    file = tmp_path / "attention.json"
    command = ["bench", "attention", "--masks", "causal,packed,chunk", "--lengths", "1500", "--head-dims", "64"]
    command += ["--heads", "9/3", "-o", str(file), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 15
    for row in result["rows"]:
        assert row["correct"] and 0 < row["share"] < 1.2, row
        assert row["peers"]["transformers"]["error"] < PEER_ERROR_LIMIT, row["peers"]
        assert row["mode"] == "bf16" or row["quantization"]["microseconds"] < row["microseconds"]
    assert result["rows"][0]["peers"]["fa2"]["ratio"] > 0
    assert "| packed, 9/3 heads: tokens | 64 fp8_fp8 |" in attention_table(result)
