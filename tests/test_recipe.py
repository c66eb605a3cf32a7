"""Recipes: what is read, what is written back, and what a mistake is answered with."""

from __future__ import annotations

import pytest
import yaml

from kompakt.compress.recipe import Recipe, recipe_names, yaml_value
from kompakt.quant.gptq import GPTQ
from kompakt.quant.rtn import RTN
from kompakt.sparsify.kv_prune import KVPrune


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_survives_yaml(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.load(file) == recipe
    assert Recipe.load(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.load(recipe) == recipe


def test_yaml_writes_every_default():
    written = yaml.safe_load(Recipe.load({"weights": "gptq"}).to_yaml())
    assert written["version"] == 1
    assert written["weights"] == {
        "method": "gptq",
        "group_size": "auto",
        "activations": "fp8",
        "ignore": ["lm_head"],
        "dampening": 0.01,
        "activation_order": True,
        "search": True,
    }
    assert written["calibration"]["samples"] == 128
    assert written["limits"] == {"max_restored": 0.5}


def test_method_may_be_a_word():
    assert Recipe.load({"weights": "rtn"}).weights == RTN()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"weights.group_size": 32}, GPTQ(group_size=32)),
        ({"weights.group_size": "channel"}, GPTQ(group_size="channel")),
        ({"weights.dampening": "0.05"}, GPTQ(dampening=0.05)),
        ({"weights.ignore": ["re:.*down_proj"]}, GPTQ(ignore=("re:.*down_proj",))),
        ({"weights": {"method": "rtn"}}, RTN()),
    ],
)
@pytest.mark.parametrize("source", ["gptq", {"method": "gptq"}], ids=["word", "mapping"])
def test_overrides_reach_the_method(overrides, expected, source):
    assert Recipe.load({"weights": source}, overrides).weights == expected


def test_overrides_reach_every_section_and_leave_the_source_alone():
    source = {"weights": {"method": "rtn"}, "calibration": {"samples": 7}}
    overrides = {"calibration.length": 64, "evaluation.windows": 3, "limits.perplexity_increase": "2%", "name": "mine"}
    recipe = Recipe.load(source, overrides)
    assert (recipe.calibration.samples, recipe.calibration.length) == (7, 64)
    assert (recipe.evaluation.windows, recipe.limits.perplexity_increase, recipe.name) == (3, 0.02, "mine")
    assert source == {"weights": {"method": "rtn"}, "calibration": {"samples": 7}}


@pytest.mark.parametrize(
    ("text", "value"), [("3%", 0.03), (" +3 % ", 0.03), ("0.5%", 0.005), ("0.03", 0.03), (0.03, 0.03), (1, 1.0)]
)
def test_percentages(text, value):
    limits = Recipe.load({"weights": "rtn", "limits": {"perplexity_increase": text}}).limits
    assert limits.perplexity_increase == pytest.approx(value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("w4a8-fireqq", "unknown recipe 'w4a8-fireqq'; did you mean 'w4a8-fireq'?"),
        ("missing.yaml", "recipe file missing.yaml does not exist"),
        ({}, "fills no slot; fill one of weights, attention, kv_cache, sparsity"),
        ({"weights": {}}, "weights needs a `method` (known: awq, "),
        ({"weights": "gptqq"}, "unknown method 'gptqq' in slot weights; did you mean 'gptq'?"),
        ({"weights": {"method": ["rtn"]}}, "unknown method ['rtn'] in slot weights"),
        ({"weights": "rtn", "wieghts": 1}, "unknown key 'wieghts'; did you mean 'weights'?"),
        ({"weights": {"method": "rtn", "groupsize": 8}}, "unknown key 'groupsize'; did you mean 'group_size'?"),
        ({"weights": "rtn", "calibration": {"sample": 8}}, "unknown key 'calibration.sample'; did you mean 'samples'?"),
        ({"weights": "rtn", "evaluation": {"strides": 8}}, "unknown key 'evaluation.strides'; did you mean 'stride'?"),
        ({"weights": "rtn", "limits": {"max_restore": 1}}, "did you mean 'max_restored'?"),
        ({"weights": {"method": "rtn", "group_size": 7}}, "group_size = 7 is not valid"),
        ({"weights": {"method": "rtn", "group_size": "row"}}, "group_size = 'row' is not valid"),
        ({"weights": {"method": "rtn", "activations": "int8"}}, "activations = 'int8' is not valid"),
        ({"weights": {"method": "fp8", "group_size": 64}}, "group_size = 64 is not valid"),
        ({"weights": "rtn", "calibration": {"samples": 0}}, "calibration.samples = 0 is not valid"),
        ({"weights": "rtn", "calibration": 5}, "calibration = 5 is not valid"),
        ({"weights": "rtn", "evaluation": {"window": "wide"}}, "evaluation.window = 'wide' is not valid"),
        (
            {"weights": "rtn", "limits": {"perplexity_increase": "three"}},
            "neither a number nor a percentage such as 3%",
        ),
        ({"weights": "rtn", "limits": {"perplexity_increase": "3..4"}}, "neither a number nor a percentage such as 3%"),
        ({"weights": "rtn", "limits": {"perplexity_increase": 0}}, "limits.perplexity_increase = 0 is not valid"),
        ({"version": 2, "weights": "rtn"}, "recipe version 2 is not supported; this kompakt reads version 1"),
        ({"version": "1", "weights": "rtn"}, "recipe version '1' is not supported"),
        ({"weights": "rtn", "kv_cache": "int4"}, "unknown method 'int4' in slot kv_cache; did you mean 'kv_int4'?"),
        ({"kv_cache": {}}, "kv_cache needs a `method` (known: kv_fp8, kv_int4, kv_pq, kv_prune, kv_evict)"),
        ({"kv_cache": {"method": "kv_fp8", "recent": 4}}, "unknown key 'recent'; did you mean 'recent_tokens'?"),
        (
            {"kv_cache": {"method": "kv_fp8", "rounding": 4}},
            "unknown key 'rounding' (known: sink_tokens, recent_tokens, max_tokens)",
        ),
        ({"kv_cache": {"method": "kv_fp8", "recent_tokens": -1}}, "recent_tokens = -1 is not valid"),
        ({"kv_cache": {"method": "kv_fp8", "max_tokens": 0}}, "max_tokens = 0 is not valid"),
        ({"kv_cache": {"method": "kv_fp8", "key_transform": "none"}}, "unknown key 'key_transform'"),
        ({"kv_cache": {"method": "kv_int4", "key_transform": "rotate"}}, "key_transform = 'rotate' is not valid"),
        ({"kv_cache": {"method": "kv_pq", "bits": 5}}, "bits = 5 is not valid"),
        ({"weights": "rtn", "attention": {"method": "rtn"}}, "unknown method 'rtn' in slot attention (known: sage)"),
        ({"attention": {}}, "attention needs a `method` (known: sage)"),
        ({"attention": {"method": "sage", "mode": "int8"}}, "mode = 'int8' is not valid"),
        ({"attention": {"method": "sage", "min_token": 1}}, "unknown key 'min_token'; did you mean 'min_tokens'?"),
        ({"attention": {"method": "sage", "min_tokens": 0}}, "min_tokens = 0 is not valid"),
        ({"attention": {"method": "sage", "min_tokens": -5}}, "min_tokens = -5 is not valid"),
        ({"attention": {"method": "sage", "min_cosine": 0}}, "min_cosine = 0 is not valid"),
        ({"attention": {"method": "sage", "min_cosine": 1.2}}, "min_cosine = 1.2 is not valid"),
        ({"attention": {"method": "sage", "min_cosine": "nan"}}, "min_cosine = 'nan' is not valid"),
        (
            {"attention": {"method": "sage", "mode": "int8_fp8", "min_cosine": 0.9}},
            "attention (sage): min_cosine 0.9 has no effect with mode int8_fp8; only auto picks by it",
        ),
        ({"sparsity": "minferense"}, "unknown method 'minferense' in slot sparsity; did you mean 'minference'?"),
        ({"sparsity": {"method": "minference", "families": []}}, "families is empty"),
        ({"sparsity": {"method": "minference", "recall": 1.5}}, "recall = 1.5 is not valid"),
        (
            {"sparsity": {"method": "minference", "recall": 0.9, "density": 0.2}},
            "recall 0.9 has no effect with density",
        ),
        ({"sparsity": {"method": "minference", "file": "x", "density": 0.2}}, "patterns of x are not searched"),
        ({"sparsity": {"method": "triangle", "first_layer": 3, "max_error": 0.1}}, "max_error 0.1 has no effect"),
    ],
    ids=str,
)
def test_mistakes_are_named_in_one_sentence(source, says):
    with pytest.raises(ValueError) as caught:
        Recipe.load(source)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("weights: {method: rtn", "is not valid YAML"),
        ("- weights", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("weights: {method: rtn, scael: mse}", "unknown key 'scael'; did you mean 'scale'?"),
    ],
)
def test_mistakes_in_a_file_name_the_file(content, says, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError) as caught:
        Recipe.load(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_of_something_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match=r"name\.first cannot be set: name is not a mapping"):
        Recipe.load("w4a16-rtn", {"name.first": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("falsely", "falsely"),
        ("1", 1),
        ("[", "["),
        ("2026-02-31", "2026-02-31"),
    ],
)
def test_truth_values_are_true_and_false_alone(text, value):
    assert yaml_value(text) == value and type(yaml_value(text)) is type(value)


def test_options_that_are_called_off_are_read_and_written(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("version: 1\nkv_cache: {method: kv_prune, search: off, key_scores: magnitude}\n")
    recipe = Recipe.load(file)
    assert isinstance(recipe.kv_cache, KVPrune) and recipe.kv_cache.search == "off"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file).kv_cache == recipe.kv_cache
