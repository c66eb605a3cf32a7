"""`kompakt bench generate` on tiny models: what is run, counted and printed; one GPU run."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tiny import tiny_directory
from transformers import LlamaConfig

from kompakt.cli.main import main
from kompakt.compress import generation_bench as bench
from kompakt.compress import hf_generation
from kompakt.compress.generation_bench import Way, check_recipes, put_in, shapes_of, uncalibrated, with_floor
from kompakt.compress.generation_bench_table import absences, generation_table, ratios
from kompakt.compress.hf_cache import CACHE, CompressedCache
from kompakt.compress.hf_cache_hooks import cache_maker
from kompakt.compress.hf_capture import everywhere, steps_of
from kompakt.compress.hf_generation import CONFIGS, ModelSource, cache_facts, generate_timed, step_weight_bytes
from kompakt.compress.linear import CompressedLinear, storage
from kompakt.compress.prescribed_sparsity import prescribed
from kompakt.compress.recipe import Recipe
from kompakt.quant.rtn import RTN
from kompakt.sparsify.method import SparsityMethod

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def config_dir(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


@pytest.fixture
def source(config_dir):
    return ModelSource.of(None, str(config_dir))


def measure(source, contexts=(280,), batches=(1,), new=3, recipes=("kv-int4",), **options):
    shapes, ways = (
        shapes_of([(count, length) for length in contexts for count in batches], new, source),
        Way.all(recipes),
    )
    return bench.generation_bench(source, CPU, shapes, ways, bandwidth=1e9, repeats=1, **options)


def test_published_shapes_have_their_sizes():
    for name, billions in (("llama-8b", 8.03), ("qwen-0.6b", 0.596)):
        source = ModelSource.of(None, name)
        skeleton = bench.meta_model(source.config)
        assert sum(parameter.numel() for parameter in skeleton.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
        assert source.path is None and source.positions >= 32768 and name in CONFIGS


def test_random_weights_are_the_same_every_time_and_bf16(source):
    first, second = source.open(CPU), source.open(CPU)
    assert first.dtype == torch.bfloat16 and not any(parameter.requires_grad for parameter in first.parameters())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config is not second.config
    # Rotary frequencies are FP32 whatever the weights are.
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_a_step_reads(source, tmp_path):
    model = source.open(CPU)
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert step_weight_bytes(model) == total - 300 * 64 * 2
    LlamaConfig(**SIZES, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tied = ModelSource.of(None, str(tmp_path / "tied")).open(CPU)
    assert step_weight_bytes(tied) == total - 300 * 64 * 2


def test_times_are_of_every_token(source):
    model = source.open(CPU)
    prompt = bench.random_tokens(model, 2, 20)
    times, cache = generate_timed(model, prompt, 5, "dynamic")
    assert len(times) == 6 and times == sorted(times)
    assert cache_facts(cache) == {"allocated_cache_bytes": 2 * 2 * 2 * 2 * 24 * 16 * 2, "coded_tokens": 0}
    assert type(generate_timed(model, prompt, 2, "static")[1]).__name__ == "StaticCache"


def test_recipes_are_put_in_without_calibration_text(source):
    model = source.open(CPU)
    full = step_weight_bytes(model)
    recipe = Recipe.load("w4a8-kv4")
    put_in(model, recipe, CPU)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert len(linears) == 14 and linears[0].scheme.describe() == "W4A8-FP8 g64"
    assert step_weight_bytes(model) < 0.5 * full and storage(model)["bits_per_weight"] < 4.5
    maker = cache_maker(model)
    assert maker is not None and maker.method.kind == "int4" and len(maker.statics) == 2
    cache = generate_timed(model, bench.random_tokens(model, 1, 300), 2, None)[1]
    assert isinstance(cache, CompressedCache) and cache_facts(cache)["coded_tokens"] == 128
    # No float weight is kept in the model, or memory would be overstated.
    assert not any(isinstance(module, torch.nn.Linear) for name, module in model.named_modules() if name != "lm_head")


@pytest.mark.parametrize("name", ["kv-fp8", "w4a8-kv4", "w4a8-pq4", "w4a8-sage-kv4"])
def test_steps_of_whole_recipes_can_be_recorded(source, name):
    """What compression itself hangs on a model is not in the way of its graphs."""
    model = source.open(CPU)
    put_in(model, Recipe.load(name), CPU)
    tokens = bench.random_tokens(model, 1, 300)
    cache = generate_timed(model, tokens, 2, None)[1]
    assert steps_of(model).refusal({"input_ids": tokens[:, :1], CACHE: cache}) is None
    with everywhere(model):
        generate_timed(model, tokens, 6, None)
    assert steps_of(model).plain == 5


def test_sparse_prefill_is_prescribed_and_what_it_visited_is_counted(source):
    """By hand: rows of tiles 0 to 4 visit their own tile, the one before, and the first; the last row everything."""
    triangle = Recipe.load("sparse-triangle", {"sparsity.min_length": 128, "sparsity.window": 64, "sparsity.tail": 1})
    picked = Recipe.load("sparse-minference", {"sparsity.min_length": 128})
    named = Recipe.load("sparse-triangle", {"sparsity.min_length": 128, "sparsity.first_layer": 0})
    ways = [Way("dynamic", cache="dynamic"), *(Way(*pair) for pair in zip("abc", (triangle, picked, named)))]
    shapes = shapes_of([(1, 300), (1, 100)], 2, source)
    result = bench.generation_bench(source, CPU, shapes, ways, bandwidth=None, repeats=1)
    rows = {(row["way"], row["context"]): row for row in result["rows"]}
    assert rows["a", 300]["sparsity"]["layers"] == 1 and rows["a", 300]["sparsity"]["density"] == round(14 / 15, 5)
    assert rows["b", 300]["sparsity"]["layers"] == 2 and "1000 keys and 200" in rows["b", 300]["sparsity"]["patterns"]
    assert rows["c", 300]["sparsity"] == {"patterns": None, "layers": 2, "density": 1.0}
    assert "no prompt is as long as the 128 keys" in rows["a", 100]["absent"] and "sparsity" not in rows["dynamic", 300]
    assert rows["a", 300]["recipe"]["sparsity"]["window"] == 64
    table = generation_table(json.loads(json.dumps(result)))
    assert "| 93.3% of 1 layers |" in table and "first token × dynamic" in table
    assert "Patterns of a are prescribed, not searched: the later half" in table and "Patterns of c" not in table


def test_a_search_that_nothing_stands_in_for():
    class Other(SparsityMethod):
        pass

    with pytest.raises(ValueError, match="nothing stands in for a search by Other"):
        prescribed(Other())


def test_static_cache_can_be_left_out():
    assert [way.name for way in Way.all(["sparse-triangle"], static=False)] == ["dynamic", "sparse-triangle"]


def test_only_int4_methods_are_replaced():
    nearest = uncalibrated(Recipe.load("w4a8-fireq", {"weights.group_size": 32, "weights.activations": "none"})).weights
    assert isinstance(nearest, RTN) and (nearest.group_size, nearest.activations) == (32, "none")
    for name in ("fp8", "kv-int4"):
        recipe = Recipe.load(name)
        assert uncalibrated(recipe) is recipe


def test_rows_hold_times_bytes_and_floors(source):
    saved = []
    result = measure(source, contexts=(270, 300), batches=(2,), new=2, keep=saved.append)
    rows = result["rows"]
    ways = ["dynamic", "kv-int4", "kv-int4, launch by launch", "static"]
    assert [row["way"] for row in rows] == [way for way in ways for _ in range(2)]
    assert [(row["context"], row["batch"]) for row in rows[:2]] == [(270, 2), (300, 2)]
    assert [len(part["rows"]) for part in saved] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert result["random_weights"] and result["model"] == "shape"
    dynamic, compressed = rows[1], rows[5]
    assert dynamic["cache_bytes"] == 2 * 300 * 2 * 2 * 2 * 16 * 2 and dynamic["coded_tokens"] == 0
    assert dynamic["allocated_cache_bytes"] == 2 * 301 * 2 * 2 * 2 * 16 * 2
    assert compressed["coded_tokens"] == 128 and compressed["cache_bytes"] == compressed["allocated_cache_bytes"]
    for row in rows:
        floor = 1e3 * (row["weight_bytes"] + row["cache_bytes"]) / 1e9
        assert row["floor_ms"] == round(floor, 6) and row["share"] == round(floor / row["token_ms"], 6)
        assert row["first_token_ms"] > 0 and row["peak_bytes"] is None and not row["compiled"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["token_ms"], rel=0.01)
    assert compressed["recipe"]["kv_cache"]["method"] == "kv_int4" and dynamic["recipe"] is None
    json.dumps(result, allow_nan=False)


def test_medians_are_of_what_follows_the_warm_up(source, monkeypatch):
    runs = iter([[0, 100, 200, 300], [0, 2, 3, 9], [0, 4, 5, 7], [0, 3, 3.5, 4.5]])
    caches = []

    def timed(model, prompt, new_tokens, cache, *, launches=False):
        caches.append(cache)
        return next(runs), hf_generation.generate_timed(model, prompt, 1, cache)[1]

    monkeypatch.setattr(bench, "generate_timed", timed)
    [shape] = shapes_of([(4, 32)], 3, source)
    row = bench.measured(source.open(CPU), Way("static", cache="static"), shape, 3, CPU)
    assert caches == ["static"] * 4
    assert row["first_token_ms"] == 3000 and row["token_ms"] == 1000 and row["tokens_per_second"] == 4


def test_a_cache_without_codes_has_no_time(source):
    result = measure(source, contexts=(64,))
    assert "token_ms" in result["rows"][0]
    assert result["rows"][2]["absent"] == "a cache of 67 tokens is dense yet; use a longer context"
    text = generation_table(result)
    assert "| 1 × 64 | kv-int4 | – | – | – | – | – | – |" in text
    assert "kv-int4 has no time (1 × 64): a cache of 67 tokens is dense yet; use a longer context." in text


def test_one_way_that_fails_costs_no_other(source, monkeypatch):
    def timed(model, prompt, new_tokens, cache, *, launches=False):
        if cache == "static":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return hf_generation.generate_timed(model, prompt, new_tokens, cache)

    monkeypatch.setattr(bench, "generate_timed", timed)
    result = measure(source, recipes=())
    assert [row.get("absent") for row in result["rows"]] == [None, "OutOfMemoryError: CUDA out of memory"]
    assert ratios(result["rows"][0], result["rows"]) == [1.0, None]
    assert absences(result)[0].startswith("transformers, StaticCache, compiled has no time (1 × 280): OutOfMemory")


def test_table_says_what_was_measured(source):
    result = measure(source, recipes=("w4a8-kv4",))
    for row, milliseconds, peak in zip(result["rows"], (8.0, 2.0, 1.0, 4.0), (30e9, 12.5e9, 13e9, 31e9), strict=True):
        row |= {"first_token_ms": 1234.5, "token_ms": milliseconds, "peak_bytes": peak, "floor_ms": 1.234}
        row |= {"allocated_cache_bytes": 2_500_000_000, "compiled": row["way"] == "static"}
    text = generation_table(result)
    assert "| 1 × 280 | transformers, DynamicCache | 1,234 | 8.00 (1.23) | 1.00 | 0.50 | 30.0 | 2.50 |" in text
    assert "| 1 × 280 | transformers, StaticCache, compiled | 1,234 | 4.00 (1.23) | 2.00 | 1.00 | 31.0 | 2.50 |" in text
    assert "| 1 × 280 | w4a8-kv4 | 1,234 | 2.00 (1.23) | 4.00 | 2.00 | 12.5 | 2.50 |" in text
    assert "| 1 × 280 | w4a8-kv4, launch by launch | 1,234 | 1.00 (1.23) | 8.00 | 4.00 | 13.0 | 2.50 |" in text
    assert "shape with random weights: this is speed and nothing else; random prompts, 3 tokens" in text
    assert "rounded to nearest" in text and "medians over 1 run after" in text and "TB/s" in text
    assert "Arithmetics" not in text
    own = generation_table({**result, "random_weights": False, "bandwidth_gb_per_second": None})
    assert "shape with its own weights" in own and "TB/s" not in own


def test_ratios_are_between_rows_of_one_shape():
    rows = [
        {"way": way, "context": context, "batch": batch, "new_tokens": 2, "token_ms": milliseconds}
        for way, context, batch, milliseconds in (
            ("dynamic", 300, 1, 8.0),
            ("dynamic", 300, 2, 6.0),
            ("static", 400, 2, 3.0),
            ("kv-int4", 300, 2, 2.0),
        )
    ]
    assert [ratios(row, rows) for row in rows] == [[1.0, None], [1.0, None], [None, 1.0], [3.0, None]]


def test_compiled_graphs_are_dropped(source, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    model = source.open(CPU)
    generate_timed(model, bench.random_tokens(model, 1, 20), 2, "static")
    assert not hf_generation.is_compiled(model)
    hf_generation.forget_compiled(model)
    assert not resets and not {"_previous_max_cache_length", "_cache"} & set(vars(model))
    model._compiled_call = model.__call__
    assert hf_generation.is_compiled(model)
    hf_generation.forget_compiled(model)
    assert resets == [1] and not hf_generation.is_compiled(model)


def test_no_bandwidth_no_floor():
    row = {"weight_bytes": 10, "cache_bytes": 5}
    assert with_floor(row, None) == {**row, "floor_ms": None, "share": None}
    assert with_floor(row, 1e3) == {**row, "floor_ms": 15.0, "share": None}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda path: ModelSource.of(None, None), "give either MODEL or --config"),
        (lambda path: ModelSource.of("a", "llama-8b"), "give either MODEL or --config"),
        (lambda path: ModelSource.of(None, "llama-9b"), "config 'llama-9b' is no directory and not one of llama-8b"),
        (lambda path: ModelSource.of(str(path), None), "holds no"),
        (lambda path: shapes_of([(1, 500)], 13, ModelSource.of(None, str(path))), "exceed the 512 positions of shape"),
        (lambda path: Way.all(["nope"]), "unknown recipe 'nope'"),
        (
            lambda path: check_recipes(
                ModelSource.of(None, str(path)),
                [Way("odd", Recipe.load({"weights": {"method": "gptq", "group_size": 48}}))],
            ),
            "48",
        ),
    ],
)
def test_bad_options_are_named(call, says, config_dir):
    with pytest.raises(ValueError, match=says):
        call(config_dir)


def test_experts_are_refused(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="experts are not supported"):
        ModelSource.of(None, str(tmp_path / "moe"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_runs_on_the_cpu(tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR)
    model = tiny_directory(tmp_path / "model", steps=1, max_position_embeddings=512, num_hidden_layers=2)
    file, page = tmp_path / "generate.json", tmp_path / "page.md"
    command = ["bench", "generate", str(model), "--context", "280", "--batch", "1", "--new", "2", "--repeats", "1"]
    assert main([*command, "--recipes", "kv-fp8,sage", "-o", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text()) and not result["random_weights"]
    assert [row["way"] for row in result["rows"]] == ["dynamic", "kv-fp8", "kv-fp8, launch by launch", "sage", "static"]
    page.write_text("<!-- generate.json -->\n<!-- end -->\n")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert "| 1 × 280 | kv-fp8 |" in page.read_text() and "chosen on random tokens" in page.read_text()
    assert main([*command, "--recipes", "kv-fp8", "--no-launches", "--shapes", "1x512", "--json"]) == 2
    assert "context 512 and 2 new tokens exceed the 512 positions" in capsys.readouterr().err
    assert main([*command, "--recipes", ""]) == 0
    printed = capsys.readouterr().out
    assert "transformers, StaticCache" in printed and "its own weights" in printed
    for options, says in ((["--new", "1"], "--new"), (["--recipes", "nope"], "unknown recipe 'nope'")):
        assert main([*command, *options]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


@pytest.mark.gpu
def test_one_shape_end_to_end(tmp_path, capsys):
    LlamaConfig(**{**SIZES, "hidden_size": 256, "head_dim": 64}).save_pretrained(tmp_path / "shape")
    file = tmp_path / "generate.json"
    command = ["bench", "generate", "--config", str(tmp_path / "shape"), "--context", "400", "--batch", "1,2"]
    assert main([*command, "--new", "8", "--recipes", "kv-int4,w4a8-kv4", "-o", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bandwidth_gb_per_second"] > 100 and len(result["rows"]) == 12
    for row in result["rows"]:
        assert "absent" not in row and 0 < row["share"] < 1 < row["peak_bytes"] / row["weight_bytes"], row
        assert row["compiled"] == (row["way"] == "static")
        assert (row["coded_tokens"] > 0) == row["way"].startswith(("kv-int4", "w4a8-kv4"))
        # Three runs, the warm-up included, of seven steps each, of which two are not replayed.
        assert row.get("replayed_steps", 15) == 15
    assert "| 2 × 400 | w4a8-kv4 |" in generation_table(result)
