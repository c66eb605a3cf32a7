"""`kompakt bench attention-accuracy`: the baseline, figures of layers and random inputs, and a patched tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_directory, write_text

from kompakt.cli.main import main
from kompakt.compress import attention_accuracy as module
from kompakt.compress import attention_error
from kompakt.compress.attention_accuracy import QUANTIZED, accuracy_table, attention_accuracy, summary
from kompakt.compress.attention_error import (
    BASELINE,
    HEAD_DIMS,
    KINDS,
    compare_all,
    described,
    one_scale,
    per_tensor_fp8,
    relative,
    synthetic_inputs,
)
from kompakt.compress.evaluation_tasks import MultipleChoice
from kompakt.kernels.attention import MODES
from kompakt.kernels.segments import Segments
from kompakt.quant.method import AttentionInputs
from kompakt.quant.output_error import exact_output

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"causal": True, "window": None, "segments": None, "scaling": 0.2, "softcap": None}
CASES = {
    "plain": {},
    "full": {"causal": False, "scaling": 0.1},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2, 3, 14)},
    "padded": {
        "segments": Segments(torch.tensor([[0, 0, 37, 0, 37], [1, 12, 37, 12, 37]], dtype=torch.int32), 37, (2, 37, 37))
    },
}


def inputs_of(heads=14, kv_heads=2, tokens=37, dim=24, **options):
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(2, n, tokens, dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    return AttentionInputs(query, key + 3, value, {**PLAIN, **options})


def dense_baseline(inputs):
    """The module's formula, densely and without grouping heads."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    q = one_scale(inputs.query)
    k, v = (one_scale(tensor).repeat_interleave(groups, dim=1) for tensor in (inputs.key, inputs.value))
    options, tokens = inputs.options, q.shape[2]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = (j <= i) if options["causal"] else torch.ones(tokens, tokens, dtype=torch.bool)
    if options["window"] is not None:
        mask = mask & (i - j < options["window"])
    mask = mask.expand(2, 1, -1, -1).clone()
    if options["segments"] is not None:
        mask[1] &= (i >= 12) & (j >= 12)
    s = q @ k.mT * options["scaling"]
    if options["softcap"] is not None:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    p = torch.where(mask, torch.exp(s - s.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)), 0.0)
    total = p.sum(-1, keepdim=True)
    if "sinks" in options:
        top = s.masked_fill(~mask, -math.inf).amax(-1, keepdim=True)
        total = total + torch.exp(options["sinks"][None, :, None, None] - top)
    p8 = (448 * p).to(torch.float8_e4m3fn).float() / 448
    return (p8 @ v / total).nan_to_num(0.0).transpose(1, 2)


@pytest.mark.parametrize("rows", [8, 256])
@pytest.mark.parametrize("name", CASES)
def test_the_baseline_is_its_formula(name, rows, monkeypatch):
    monkeypatch.setattr(attention_error, "REFERENCE_ROWS", rows)
    inputs = inputs_of(**CASES[name])
    found, expected = per_tensor_fp8(inputs), dense_baseline(inputs)
    # FP32 sums in another order; none of these p lies so close to the middle of two values of e4m3 that it tips over.
    assert float((found - expected).norm() / expected.norm()) <= 2.0**-20
    if name == "padded":
        assert not found[1, :12].any() and found[1, 12:].any()


def test_one_scale_is_one_for_the_tensor():
    x = torch.tensor([[448.0, 1.0], [0.001, -3.3]])
    # The scale is 1: the least value of e4m3 is 2⁻⁹, and from 2 on they are 1/4 apart.
    assert torch.equal(one_scale(x), torch.tensor([[448.0, 1.0], [2.0**-9, -3.25]]))
    assert torch.allclose(one_scale(3 * x), 3 * one_scale(x), rtol=1e-6)


def test_figures_are_against_exact_attention_of_the_same_tensors():
    inputs = inputs_of(heads=9, kv_heads=3)
    found = compare_all(inputs, MODES)
    assert list(found) == [*MODES, BASELINE]
    exact = exact_output(inputs)
    error = float((per_tensor_fp8(inputs) - exact).norm() / exact.norm())
    # Sequences of a batch are compared one by one, so each has scales of its own.
    assert relative(found[BASELINE]) == pytest.approx(error, rel=0.2)
    # FP32 in, and bf16 rounds nothing: the reference is exact attention itself.
    assert found["bf16"].sqnr_db is None and relative(found["bf16"]) == 0
    assert found["int8_fp16"].cosine > found["int8_fp8"].cosine > found["fp8_fp8"].cosine > found["int4_fp8"].cosine
    table = described(found)
    assert table["bf16"]["times_below"] is None and table[BASELINE]["times_below"] == 1
    assert table["int8_fp8"]["times_below"] == pytest.approx(relative(found[BASELINE]) / relative(found["int8_fp8"]))


def test_offsets_cost_the_baseline_and_not_the_modes():
    def errors(kind):
        return {name: relative(item) for name, item in compare_all(inputs[kind], ["int8_fp8"]).items()}

    inputs = {kind: synthetic_inputs(kind, 64, 150, torch.device("cpu")) for kind in KINDS}
    plain, offset, large = (errors(kind) for kind in ("normal", "channel offsets", "large channel offsets"))
    assert large[BASELINE] > 3 * offset[BASELINE] > 4 * plain[BASELINE]
    assert offset["int8_fp8"] == pytest.approx(plain["int8_fp8"], rel=0.1)
    assert large[BASELINE] > 5 * large["int8_fp8"]
    spread = {kind: float(item.key.float().mean(dim=2).std()) for kind, item in inputs.items()}
    assert spread["normal"] < 0.2 and spread["outliers"] < 0.3
    assert 3 < spread["channel offsets and outliers"] < 5 and 12 < spread["large channel offsets"] < 20
    largest = {kind: float(item.value.float().abs().max()) for kind, item in inputs.items()}
    assert largest["normal"] < 6 < 15 < largest["outliers"]


def test_summary_is_of_the_worst_layer():
    layers = {
        str(index): {"cosine": 1 - index, "relative_l1": index, "sqnr_db": sqnr, "times_below": sqnr}
        for index, sqnr in ((1, 10.0), (2, None), (3, 4.0))
    }
    found = summary(layers)
    assert found["count"] == 3 and found["each"] is layers
    assert found["cosine"] == {"worst": -2, "mean": -1} and found["relative_l1"] == {"worst": 3, "mean": 2}
    assert found["sqnr_db"] == {"worst": 4, "mean": 7}
    assert summary({"0": {**layers["2"]}})["sqnr_db"] is None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    questions = [
        {"question": f"What is {word}?", "choices": ["a name", "a number", "a list of them"], "gold": index % 3}
        for index, word in enumerate(("int", "str", "object", "range", "module", "class"))
    ]
    (folder / "choices.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions))
    return tiny_directory(folder / "base"), write_text(folder / "text.txt"), folder / "choices.jsonl"


def test_rows_are_of_layers_random_inputs_perplexity_and_choices(base, monkeypatch):
    directory, text, choices = base
    monkeypatch.setattr(module, "KINDS", KINDS[:2])
    result = attention_accuracy(
        directory, modes=["fp8_fp8", "int4_fp8"], text=str(text), length=48, windows=3, choices=choices, limit=5
    )
    json.dumps(result, allow_nan=False)
    fast, low, baseline = result["rows"]
    assert (fast["mode"], low["mode"], baseline["mode"]) == ("fp8_fp8", "int4_fp8", BASELINE)
    assert result["text"]["windows"] == 3 and result["length"] == 48 and result["not_captured"] == {}
    for row in (fast, low):
        assert row["backend"] == "reference" and row["layers"]["count"] == 4
        assert list(row["layers"]["each"])[3] == "model.layers.3.self_attn"
        assert row["perplexity"]["model"]["nll"] != row["perplexity"]["base"]["nll"]
        assert row["perplexity"]["perplexity_increase_stderr"] > 0
        assert row["attention"]["ran"] == "quantized" and row["attention"]["layers"] == 4
        assert row["choices"]["items"] == row["choices"]["flips"]["items"] == result["choices"]["items"] == 5
        # 3 windows and 5 × 3 choices in batches of 8, in 4 layers each.
        assert row["attention"]["calls"] == {row["mode"]: 4 * (3 + 2)}
    assert low["layers"]["cosine"]["worst"] < fast["layers"]["cosine"]["worst"]
    assert low["perplexity"]["kl"] > fast["perplexity"]["kl"] > 0
    assert [(item["kind"], item["head_dim"]) for item in low["synthetic"]] == [
        (kind, head_dim) for kind in KINDS[:2] for head_dim in HEAD_DIMS
    ]
    assert "perplexity" not in baseline and baseline["layers"]["times_below"]["worst"] == 1
    text = accuracy_table(result)
    assert "| fp8_fp8 | 0.99" in text and f"| {BASELINE} |" in text and "gained" in text
    assert f"| random inputs, head_dim | fp8_fp8 | int4_fp8 | {BASELINE} |" in text
    assert text.count("\n| channel offsets, ") == 2 and "Modes ran as their reference" in text
    assert "Accuracy on 5 items of choices.jsonl" in text
    only = {**result, "choices": None, "rows": [{**row, "backend": "gluon"} for row in result["rows"]]}
    assert "gained" not in accuracy_table(only) and "reference" not in accuracy_table(only)


def test_changed_answers_are_counted_by_length_of_the_choices(base, monkeypatch):
    directory, text, choices = base
    monkeypatch.setattr(module, "KINDS", KINDS[:1])
    right = iter(((True, False, False), (False, True, True)))

    def answered(*call, **options):
        norm = next(right)
        return MultipleChoice(3, 1.0, 0.0, sum(norm) / 3, 0.1, (True,) * 3, norm)

    monkeypatch.setattr(module, "multiple_choice", answered)
    options = {"text": str(text), "length": 32, "windows": 1, "choices": choices}
    result = attention_accuracy(directory, modes=["fp8_fp8"], **options)
    found = result["rows"][0]["choices"]
    assert (found["flips"]["lost"], found["flips"]["gained"]) == ([0], [1, 2])
    assert found["accuracy"] == 2 / 3 and result["choices"]["accuracy"] == 1 / 3
    assert "| 66.7 ± 10.0 %, 2 gained, 1 lost |" in accuracy_table(result)


def test_a_model_that_runs_dense_is_an_error(base, monkeypatch):
    directory, text, _ = base
    monkeypatch.setattr(module, "KINDS", KINDS[:1])
    monkeypatch.setattr("kompakt.compress.hf_attention.refusal", lambda mode, inputs: "no such kernel")
    with pytest.raises(ValueError, match=r"no attention layer of base ran in int8_fp8.*no such kernel"):
        attention_accuracy(directory, modes=["int8_fp8"], text=str(text), length=32, windows=1)


def test_a_mode_that_would_run_exactly_is_refused(monkeypatch):
    monkeypatch.setattr(attention_error, "refusal", lambda mode, inputs: "needs compute capability 8.9")
    with pytest.raises(ValueError, match="mode fp8_fp8 cannot be measured on this device: needs compute capability"):
        compare_all(inputs_of(), ["fp8_fp8"])


def test_command_writes_what_it_prints(base, tmp_path, monkeypatch, capsys):
    directory, text, _ = base
    monkeypatch.setattr(module, "KINDS", KINDS[:1])
    file, page = tmp_path / "new" / "accuracy.json", tmp_path / "page.md"
    command = ["bench", "attention-accuracy", str(directory), "--text", str(text), "--length", "32", "--windows", "2"]
    assert main([*command, "--modes", "int8_fp8", "--note", "Tiny.", "-o", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    assert result["bench"] == "attention-accuracy" and result["version"] == 1 and result["choices"] is None
    page.write_text("<!-- new/accuracy.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert "| int8_fp8 | " in page.read_text() and "Tiny." in page.read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--modes", "bf16"], f"unknown mode 'bf16'; known: {', '.join(QUANTIZED)}"),
        (["--modes", ""], "no mode was named"),
        (["--length", "300"], "length 300 exceeds the 256 positions of base"),
        (["--length", "32", "--text", "none.txt"], "none.txt cannot be read"),
        (["--limit", "3"], "--limit and --batch-size are for --choices"),
        (["--batch-size", "3"], "--limit and --batch-size are for --choices"),
    ],
)
def test_command_refuses_in_one_sentence(base, options, says, capsys):
    directory, text, _ = base
    assert main(["bench", "attention-accuracy", str(directory), "--text", str(text), *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_no_layer_that_can_be_measured_is_an_error(base, monkeypatch):
    directory, text, _ = base
    monkeypatch.setattr(module, "observe_attention", lambda *call: {"layer": "the mask has holes"})
    with pytest.raises(ValueError, match="no attention layer of base can be measured: the mask has holes"):
        attention_accuracy(directory, modes=["int8_fp8"], text=str(text), length=32, windows=1)


@pytest.mark.gpu
def test_kernels_are_measured_end_to_end(base, capsys):
    directory, text, _ = base
    command = ["bench", "attention-accuracy", str(directory), "--text", str(text), "--length", "200", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    for row in result["rows"][:-1]:
        assert row["backend"] in ("gluon", "triton") and row["attention"]["ran"] == "quantized", row["attention"]
        assert row["layers"]["cosine"]["worst"] > 0.95
        assert row["perplexity"]["perplexity_increase"] < 0.1
    large = {row["mode"]: row["synthetic"][2 * KINDS.index("large channel offsets")] for row in result["rows"]}
    assert large["int8_fp8"]["times_below"] > 5
