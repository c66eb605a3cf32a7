"""`kompakt bench linear`: what is parsed, checked, computed and printed, with a timer that only counts; one GPU run."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kompakt.cli.main import main
from kompakt.compress import device_speed, linear_contenders
from kompakt.compress.device_speed import Ceilings, Machine, byte_count, copies
from kompakt.compress.linear_contenders import (
    Absent,
    Variant,
    folded_ref,
    quantize_int4,
    relative_error,
    torch_int4_peer,
)
from kompakt.compress.linear_speed import (
    ERROR_LIMIT,
    PEER_ERROR_LIMIT,
    Problem,
    Shape,
    floor_seconds,
    linear_speed,
    parse_names,
    parse_shapes,
    parse_tokens,
    parse_variants,
    sample,
)
from kompakt.compress.linear_speed_table import check_speeds, merged_speeds, speed_table
from kompakt.compress.quantization_speed import in_order, quantization_speed
from kompakt.kernels.activations import quantize_fp8_ref
from kompakt.kernels.packing import unpack_int4
from kompakt.kernels.planes import quantize_planes_ref
from kompakt.kernels.w4a8_linear import w4a8_ref

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
MANY_TOKENS = 4096
SHAPE = Shape("other", "", 48, 128)
CEILINGS = Ceilings(read_gb_per_second=1000, copy_gb_per_second=800, bf16_tflops=100, fp8_tflops=200)


def timer(calls):
    """Ten microseconds per element of what a call returns along the outputs, so that times differ and repeat."""
    found = calls[0]()
    return 1e-5 * (found if isinstance(found, torch.Tensor) else found[0]).shape[0]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemlite", None)  # as if it were not installed
    return Machine(torch.device("cpu"), timer, cache_bytes=0, ceilings=CEILINGS)


def measure(machine, variants=None, tokens=(1, 3), peers=("bf16", "fp8", "torch-int4", "gemlite")):
    result = linear_speed(
        machine, [SHAPE], tokens, variants or [Variant("w4a8", "channel"), Variant("w4a8", 32)], peers
    )
    result["quantization"] = quantization_speed(machine, [128], tokens, [Variant("w4a8", 32)])
    return result


def test_shapes_are_names_or_sizes_and_each_once():
    shapes = parse_shapes("llama-8b,14336x4096, 48×128")
    assert [(shape.out_features, shape.in_features) for shape in shapes] == [
        (14336, 4096),
        (4096, 14336),
        (4096, 4096),
        (6144, 4096),
        (48, 128),
    ]
    assert shapes[0].layer == "gate, up" and shapes[-1].model == "other"
    assert parse_tokens("64,1, 64") == [1, 64]
    assert [item.label for item in parse_variants("w4a8,w4a16", "channel,128", True, shapes[:-1])] == [
        "channel",
        "g128",
        "g128 exact",
        "w4a16 channel",
        "w4a16 g128",
    ]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse_shapes("llama-9b"), "llama-70b"),
        (lambda: parse_shapes("64x0"), "OUTxIN"),
        (lambda: parse_tokens("1,-2"), "'-2'"),
        (lambda: parse_tokens(""), "positive"),
        (lambda: parse_names("bf16,cutlass", ["bf16", "fp8"], "peer"), "unknown peer 'cutlass'; known: bf16, fp8"),
        (lambda: parse_variants("w8a8", "channel", False, [SHAPE]), "w4a16"),
        (lambda: parse_variants("w4a8", "96", False, [SHAPE]), "does not divide"),
        (lambda: parse_variants("w4a8", "rows", False, [SHAPE]), "channel"),
        (lambda: parse_variants("", "channel", False, [SHAPE]), "no method"),
    ],
)
def test_bad_options_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_copies_exceed_the_cache_within_bounds():
    assert copies(10, 100) == 40
    assert copies(10**9, 100) == 2  # never one buffer alone, unless two are too many
    assert copies(2 * 10**9, 100) == 1
    assert copies(1, 10**6) == device_speed.MAX_COPIES
    assert byte_count((torch.empty(3), torch.nn.Linear(2, 2))) == 12 + 24


def test_sample_holds_both_ends():
    generator = torch.Generator().manual_seed(0)
    assert sample(5, 8, generator).tolist() == list(range(5))
    found = sample(100, 8, generator).tolist()
    assert len(set(found)) == 8 and found == sorted(found) and found[0] == 0 and found[-1] == 99


def test_rows_hold_ratios_rates_and_absent_peers(machine):
    result = measure(machine)
    assert [(row["tokens"], row["label"], row["correct"]) for row in result["rows"]] == [
        (1, "channel", True),
        (3, "channel", True),
        (1, "g32", True),
        (3, "g32", True),
    ]
    row = result["rows"][3]
    assert row["weight_bytes"] == 48 * 64 + 48 * 4 * 2
    assert row["bytes"] == row["weight_bytes"] + 3 * 128 * 2 + 3 * 48 * 2
    assert row["flops"] == 2 * 3 * 48 * 128
    assert row["microseconds"] == 30 and row["peers"]["bf16"]["ratio"] == 1
    assert row["tflops"] == round(row["flops"] / 30e-6 / 1e12, 2)
    assert row["share"] == round(row["bytes"] / 1000e9 / 30e-6, 4)
    assert row["peers"]["bf16"]["error"] < 4e-3
    assert "cuda" in row["peers"]["fp8"]["absent"] and "NotImplementedError" in row["peers"]["torch-int4"]["absent"]
    assert row["peers"]["gemlite"] == {"absent": "not installed"}
    assert all(item["correct"] for item in result["quantization"]) and len(result["quantization"]) == 4
    json.dumps(result, allow_nan=False)
    check_speeds(result)


def test_the_floor_is_bytes_or_multiplications():
    row = {"method": "w4a8", "bytes": 10**9, "flops": 10**9}
    assert floor_seconds(row, CEILINGS) == pytest.approx(1e-3)
    row["flops"] = 10**12
    assert floor_seconds(row, CEILINGS) == pytest.approx(5e-3)
    assert floor_seconds({**row, "method": "w4a16"}, CEILINGS) == pytest.approx(1e-2)
    assert floor_seconds(row, replace(CEILINGS, copy_gb_per_second=1e-3)) == pytest.approx(5e-3)


@pytest.mark.parametrize("broken", ["tail", "nan", "raises"])
def test_a_wrong_result_has_no_time(machine, monkeypatch, broken):
    from kompakt.kernels.w4a8_linear import w4a8_linear

    def wrong(x, packed, scale, exact):
        y = w4a8_linear(x, packed, scale, exact=exact)
        if broken == "raises" and len(x) == 3:
            raise RuntimeError("no such tile\nmore")
        y[2:, 47:] = math.nan if broken == "nan" else 0
        return y

    monkeypatch.setattr(linear_contenders, "w4a8_linear", wrong)
    result = measure(machine)
    good, bad = result["rows"][:2]
    assert good["correct"] and not bad["correct"]
    assert "microseconds" not in bad and "share" not in bad and "ratio" not in bad["peers"]["bf16"]
    json.dumps(result, allow_nan=False)
    with pytest.raises(RuntimeError, match=r"2 of 8 results are wrong.* 48×128 channel with 3 tokens"):
        check_speeds(result)
    assert re.search(r"\| 48×128 channel \|.* wrong \|", speed_table(result))
    if broken == "raises":
        assert bad["reason"] == "RuntimeError: no such tile"


def test_a_wrong_peer_is_absent(machine, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: (x @ weight.t()).flip(-1))
    assert "its result is wrong" in measure(machine)["rows"][0]["peers"]["bf16"]["absent"]


def test_folded_weights_are_their_own_reference(machine, monkeypatch):
    problem = Problem.draw(SHAPE, [MANY_TOKENS], machine)
    for groups, low, high in ((1, 0, 1e-6), (4, 0.005, 0.05)):
        packed, scale = quantize_int4(problem.weight, groups)
        expected = w4a8_ref(problem.x.float(), packed, scale)
        assert low <= relative_error(folded_ref(problem.x, packed, scale), expected) <= high
    monkeypatch.setattr(linear_contenders, "planes_refusal", lambda *call: None)
    variants = [Variant("w4a8", "channel"), Variant("w4a8", 32), Variant("w4a8", 32, exact=True), Variant("w4a16", 32)]
    rows = measure(machine, variants, tokens=(1, MANY_TOKENS), peers=[])["rows"]
    assert [row["fold_error"] is not None for row in rows] == [False] * 3 + [True] + [False] * 4
    # The CPU folds nothing, so its result disagrees with the folded weights by what folding costs.
    assert [row["correct"] for row in rows] == [True] * 3 + [False] + [True] * 4
    assert 0.005 < rows[3]["error"] < 0.05


def test_torch_int4_gets_the_even_channel_in_the_high_nibble(machine, monkeypatch):
    weight = torch.randn(16, 256).bfloat16()
    packed, scale = quantize_int4(weight, 2)

    def convert(pairs, tiles):
        assert pairs.dtype == torch.uint8 and tiles == 8
        codes = torch.stack((pairs >> 4, pairs & 0xF), dim=-1).flatten(1).to(torch.int8) - 8
        assert torch.equal(codes, unpack_int4(packed, 256))
        return pairs

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    contender = torch_int4_peer(weight, machine)
    assert contender.max_tokens == 256
    assert torch.equal(contender.weights[0][1][..., 0], scale.t()) and contender.weights[0][1].shape == (2, 16, 2)
    with pytest.raises(Absent, match="no multiple of 128"):
        torch_int4_peer(weight[:, :96], machine)


def test_planes_are_read_in_order_of_channels():
    x = torch.randn(3, 64).bfloat16()
    values, scale = in_order(quantize_planes_ref(x, 40, 0), x)
    expected, expected_scale = quantize_fp8_ref(x)
    assert torch.equal(values.float(), expected.float()) and torch.equal(scale, expected_scale)


def test_table_and_merge(machine, tmp_path):
    result = measure(machine)
    text = speed_table(result)
    assert "| tokens | 1 | 3 |" in text
    assert "| 48×128 g32 | 1.00 / – | 1.00 / – |" in text
    assert "gemlite is absent: not installed." in text and "FP8 200 TFLOP/s" in text
    assert "/ –" not in speed_table({**result, "against": {"bf16": "2"}})
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(result))
    faster = replace(machine, ceilings=replace(CEILINGS, read_gb_per_second=2000))
    both = merged_speeds(file, measure(faster, [Variant("w4a8", 32), Variant("w4a16", 32)], peers=["bf16"]))
    assert [row["label"] for row in both["rows"]] == ["channel"] * 2 + ["g32"] * 2 + ["w4a16 g32"] * 2
    assert both["ceilings"]["read_gb_per_second"] == 2000
    assert both["rows"][0]["share"] == pytest.approx(result["rows"][0]["share"] / 2, rel=1e-3)
    assert list(both["against"]) == ["bf16", "fp8", "torch-int4", "gemlite"] and len(both["quantization"]) == 4
    assert "w4a16 g32" in speed_table(both)
    for row in result["rows"]:
        row["peers"]["gemlite"] = {"microseconds": 1.0, "ratio": 0.5 * row["tokens"]}
    assert "As fast as GemLite A16W4: w4a8 0.50 to 1.50 times." in speed_table(result)
    assert merged_speeds(tmp_path / "new.json", result) is result
    with pytest.raises(ValueError, match="another cache_bytes"):
        merged_speeds(file, {**result, "cache_bytes": 1})
    file.write_text((ROOT / "benchmarks" / "weights.json").read_text("utf-8"), "utf-8")
    with pytest.raises(ValueError, match="another bench"):
        merged_speeds(file, result)


def test_command_writes_what_it_prints(machine, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(Machine, "cuda", classmethod(lambda cls, ops: asked.append(ops) or machine))
    file, page = tmp_path / "new" / "speed.json", tmp_path / "page.md"
    command = ["bench", "linear", "--shapes", "48x128", "--m", "1,3", "--against", "bf16,gemlite", "-o", str(file)]
    assert main([*command, "--group-sizes", "channel", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())
    assert main([*command, "--methods", "w4a8,w4a16", "--group-sizes", "32", "--append"]) == 0
    printed = capsys.readouterr().out
    assert "48×128 (other)" in printed and "w4a16 g32" in printed and "quantization of activations" in printed
    assert asked == [["w4a8_linear"], ["w4a8_linear", "w4a16_linear"]]
    page.write_text("<!-- new/speed.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert "| 48×128 w4a16 g32 | 1.00 | 1.00 |" in page.read_text()


def test_command_fails_on_a_wrong_result_and_says_which(machine, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "cuda", classmethod(lambda cls, ops: machine))
    monkeypatch.setattr(linear_contenders, "w4a8_linear", lambda x, packed, scale, exact: x.new_zeros(len(x), 48))
    arguments = ["bench", "linear", "--shapes", "48x128", "--m", "3", "--group-sizes", "channel", "--against", "bf16"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "wrong" in out and "error: 1 of 3 results are wrong" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no CUDA device"),
        (["--shapes", "llama-1b"], "llama-8b"),
        (["--m", "many"], "number of tokens"),
        (["--against", "marlin"], "torch-int4"),
    ],
)
def test_command_refuses_in_one_sentence(options, says, capsys):
    assert main(["bench", "linear", *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.gpu
def test_one_shape_end_to_end(tmp_path, capsys):
    file = tmp_path / "speed.json"
    arguments = ["bench", "linear", "--shapes", "2048x1024", "--m", "1,64", "--exact", "-o", str(file), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["rows"][::2]] == ["channel", "g128", "g128 exact"]
    for row in result["rows"]:
        assert row["correct"] and row["error"] <= ERROR_LIMIT
        assert 0 < row["share"] < 1.2, row
        for peer in ("bf16", "fp8", "fp8-mm", "torch-int4"):
            assert row["peers"][peer]["ratio"] > 0 and row["peers"][peer]["error"] < PEER_ERROR_LIMIT, row["peers"]
    assert result["ceilings"]["fp8_tflops"] > result["ceilings"]["bf16_tflops"]
    assert all(row["correct"] for row in result["quantization"])
    assert "2048×1024 g128" in speed_table(result)
