"""`verify`: what is in order passes, and every kind of damage fails the check that is there for it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from damage import EVERYTHING, forge, forget_peak, peak_bytes
from safetensors.torch import load_file, save_file
from tiny import tiny_directory
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from kompakt.cli.main import main
from kompakt.compress import compress, evaluate, load, verify
from kompakt.compress.artifact import read_cache, read_policies
from kompakt.compress.fingerprint import compare_fingerprint, nudged
from kompakt.compress.hf import load_written
from kompakt.compress.hf_cache_hooks import CacheMaker
from kompakt.compress.hf_stored import check_statics
from kompakt.compress.recipe import EvaluationOptions
from kompakt.compress.untrusted import StoredTensor
from kompakt.compress.verification import CHECKS
from kompakt.compress.verification_tensors import tensor_problem, unknown_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = {
    "everything": EVERYTHING,
    "fp8": {"weights": {"method": "rtn", "group_size": "channel"}, "evaluation": {"windows": 0}},
    "cache": {"kv_cache": {"method": "kv_fp8"}, "evaluation": {"windows": 0}},
}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=60, num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name, recipe in RECIPES.items():
        compress(base, recipe, folder / name, max_shard_size="40KB" if name == "everything" else "5GB")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy with every slot filled, and a neighbour that nobody may read."""
    shutil.copytree(made / "everything", tmp_path / "place" / "out")
    shutil.copyfile(made / "fp8" / "model.safetensors", tmp_path / "place" / "secret.safetensors")
    return tmp_path / "place" / "out"


def edit_json(file, change):
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def edit_tensors(directory, change):
    """Changes the tensors of all weight files at once; the index follows."""
    files = sorted(directory.glob("model-*.safetensors"))
    held = {file: load_file(file) for file in files}
    tensors = {name: tensor for content in held.values() for name, tensor in content.items()}
    home = {name: file for file, content in held.items() for name in content}
    change(tensors)
    for file in files:
        save_file({n: t for n, t in tensors.items() if home.get(n, files[0]) == file}, file, {"format": "pt"})
    places = {name: home.get(name, files[0]).name for name in tensors}
    edit_json(directory / "model.safetensors.index.json", lambda content: content.update(weight_map=places))


def failed(directory):
    return {check.name: check for check in verify(directory).checks if check.status == "failed"}


@pytest.mark.parametrize("name", RECIPES)
def test_what_compress_writes_is_in_order(name, made):
    found = verify(made / name)
    assert [check.name for check in found.checks] == list(CHECKS)
    assert {check.status for check in found.checks} == {"passed"}, found.as_dict()
    assert found.passed
    assert "bit for bit" in found.checks[-1].detail
    assert ("attention and cache" in found.checks[-1].detail) == (name != "fp8")


def test_numbers_of_a_directory_are_in_the_table(made, capsys):
    assert main(["verify", str(made / "everything"), "--no-logits"]) == 0
    out, _ = capsys.readouterr()
    assert f"{made / 'everything'} is in order" in out and "14 modules quantized" in out and "logits" not in out
    assert main(["verify", str(made / "everything"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] and [check["name"] for check in content["checks"]] == list(CHECKS)


def test_a_directory_of_something_else_is_bad_usage(base, tmp_path, capsys):
    for directory, says in ((base, "was not written by kompakt"), (tmp_path / "none", "is not a directory")):
        assert main(["verify", str(directory)]) == 2
        assert says in capsys.readouterr().err


def set_scale(value):
    return lambda tensors: tensors[f"{UP}.weight_scale"].view(-1)[3:4].fill_(value)


def swap(tensors):
    for key in ("weight_packed", "weight_scale"):
        one, other = f"{UP}.{key}", f"{UP.replace('up', 'gate')}.{key}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def noise(tensors):
    codes = tensors[f"{UP}.weight_packed"]
    codes.copy_(torch.randint(-(2**31), 2**31 - 1, codes.shape, generator=torch.Generator().manual_seed(1)))


TENSORS = {
    "nan scale": (set_scale(float("nan")), "numbers", "NaN or infinite"),
    "infinite scale": (set_scale(float("inf")), "numbers", "NaN or infinite"),
    "zero scale": (set_scale(0.0), "numbers", "scales of zero"),
    "codes alike": (lambda t: t[f"{UP}.weight_packed"].fill_(7), "numbers", "all alike"),
    "nan norm": (lambda t: t["model.norm.weight"].fill_(float("nan")), "numbers", "model.norm.weight holds NaN"),
    "shape tensor": (lambda t: t[f"{UP}.weight_shape"].fill_(64), "numbers", "the weight has the shape [128, 64]"),
    "scale as integers": (
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].to(torch.int16)}),
        "coverage",
        "is I16",
    ),
    "missing": (lambda t: t.pop(f"{UP}.weight_packed"), "coverage", f"{UP}.weight_packed is in no file"),
    "unknown": (lambda t: t.update(other=torch.ones(3)), "coverage", "belongs to no module"),
    "shorter": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:64].clone()}),
        "shapes",
        "has shape (64, 8)",
    ),
    "swapped": (swap, "logits", "mean |Δ log p|"),
    "random codes": (noise, "logits", "mean |Δ log p|"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_found_even_with_forged_checksums(name, copied):
    change, check, says = TENSORS[name]
    edit_tensors(copied, change)
    honest = failed(copied)
    assert "checksums" in honest
    forge(copied)
    found = failed(copied)
    assert check in found and "checksums" not in found, found
    assert any(says in problem for problem in found[check].problems), found[check]


def settings(**values):
    return lambda directory: edit_json(directory / "config.json", lambda content: content.update(values))


def one_group(config):
    return config["quantization_config"]["config_groups"]["group_0"]


FILES = {
    "tokenizer": (lambda d: (d / "tokenizer_config.json").write_text("{}"), "checksums", "tokenizer_config.json was"),
    "pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "files", "is a pickle"),
    "code": (lambda d: (d / "modeling.py").write_text("boom"), "files", "is code"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "files", "weights of another model"),
    "more weights": (
        lambda d: shutil.copyfile(d / "kompakt.safetensors", d / "more.safetensors"),
        "files",
        "belongs to no part",
    ),
    "recipe": (
        lambda d: (d / "recipe.yaml").write_text("version: 1\nkv_cache: {method: kv_fp8}\n"),
        "recipe",
        "is not the recipe in kompakt.json",
    ),
    "rotary base": (settings(rope_parameters={"rope_type": "default", "rope_theta": 20.0}), "logits", "mean |Δ log p|"),
    "more layers": (settings(num_hidden_layers=3), "logits", "lacks"),
    "other width": (settings(intermediate_size=96), "shapes", "config.json makes it"),
    "floats": (settings(quantization_config=None), "shapes", "bytes of weights"),
    "packed head": (
        lambda d: edit_json(d / "config.json", lambda content: content["quantization_config"].update(ignore=[])),
        "shapes",
        "lm_head.weight packed, and it is shared",
    ),
    "other activations": (
        lambda d: edit_json(d / "config.json", lambda content: one_group(content).update(input_activations=None)),
        "shapes",
        "stores model.layers.0.mlp.down_proj as W4A16 g32, the recipe as W4A8-FP8 g32",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_found(name, copied):
    change, check, says = FILES[name]
    change(copied)
    if check == "logits":
        forge(copied)
    found = failed(copied)
    assert any(says in problem for problem in found[check].problems), found


def test_problems_are_listed_and_exit_code_is_1(copied, capsys):
    edit_tensors(copied, lambda tensors: [tensors.pop(f"{UP}.{key}") for key in ("weight_packed", "weight_scale")])
    forge(copied)
    assert main(["verify", str(copied)]) == 1
    out, _ = capsys.readouterr()
    assert f"{UP}.weight_packed is in no file, and 1 more" in out
    assert f"  {UP}.weight_scale is in no file" in out
    assert f"{copied} FAILED: coverage" in out


# Names, links and sizes


def link_outside(directory):
    (directory / "model-00001-of-00003.safetensors").unlink()
    (directory / "model-00001-of-00003.safetensors").symlink_to(directory.parent / "secret.safetensors")


def pipe(directory):
    (directory / "tokenizer.json").unlink()
    os.mkfifo(directory / "tokenizer.json")


def in_index(name):
    def change(content):
        content["weight_map"]["model.norm.weight"] = name

    return lambda directory: edit_json(directory / "model.safetensors.index.json", change)


def in_checksums(name):
    return lambda d: edit_json(d / "kompakt.json", lambda content: content["checksums"].update({name: "0" * 64}))


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


ESCAPES = {
    "index up": (in_index("../secret.safetensors"), "is not the plain name of a file"),
    "index absolute": (in_index("/etc/hosts"), "is not the plain name of a file"),
    "index hidden": (in_index(".safetensors"), "is not the plain name of a file"),
    "checksum up": (in_checksums("../secret.safetensors"), "is not the plain name of a file"),
    "checksum of nothing": (in_checksums("none.safetensors"), "lacks none.safetensors"),
    "link": (link_outside, "outside the directory; it is not followed"),
    "pipe": (pipe, "is neither a file nor a folder"),
    "attention from the hub": (settings(attn_implementation="some/repo"), "what runs is not up to the directory"),
    "part of attention from the hub": (settings(attn_implementation={"": "some/repo"}), "what runs is not up to"),
    "another weight file": (settings(transformers_weights="../secret.safetensors"), "names a weight file of its own"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leads_out_of_the_directory(name, copied):
    change, says = ESCAPES[name]
    change(copied)
    uses = (load, lambda path: evaluate(path, options=EvaluationOptions(window=32, windows=1), speed=False))
    for use in uses:
        with pytest.raises(ValueError) as caught:
            use(copied)
        # A tokenizer, which is read first, is refused by transformers.
        assert says in str(caught.value) or (name == "pipe" and "no usable tokenizer" in str(caught.value))
    assert any(says in check.detail for check in failed(copied).values())


def test_links_of_the_hubs_own_cache_are_followed_and_no_others(made, tmp_path):
    repository, shared = tmp_path / "models--a--b", tmp_path / "blobs" / "ab"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for index, file in enumerate((made / "fp8").iterdir()):
        shutil.copyfile(file, shared / f"{index}")
        (blobs / f"blob-{index}").symlink_to(f"../../blobs/ab/{index}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{index}")
    assert verify(snapshot).passed
    repository.rename(tmp_path / "elsewhere")
    assert "outside the directory" in verify(tmp_path / "elsewhere" / "snapshots" / "0123").checks[0].detail


@pytest.mark.parametrize("depth", [200, 900])
def test_deep_nesting_is_no_traceback(depth, copied):
    settings(deep=nested(depth))(copied)
    try:
        load(copied)
    except ValueError as error:
        assert depth == 900 and "\n" not in str(error)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"hidden_size": 2**33},
        {"vocab_size": 10**7},
        {"head_dim": 2**18},
        {"torch_dtype": "float64", "dtype": "float64"},
    ],
    ids=str,
)
def test_sizes_are_checked_before_anything_is_allocated(values, copied):
    settings(**values)(copied)
    forget_peak()
    held = peak_bytes()
    with pytest.raises(ValueError) as caught:
        load(copied)
    assert "\n" not in str(caught.value)
    assert peak_bytes() - held < 2**25


def test_a_config_may_hold_infinity_and_the_sidecar_may_not(copied):
    settings(time_step_limit=[0.0, float("inf")])(copied)
    assert "Infinity" in (copied / "config.json").read_text("utf-8")
    load(copied)
    edit_json(copied / "kompakt.json", lambda content: content["sizes"].update(bits_per_weight=float("inf")))
    with pytest.raises(ValueError, match="Infinity is no number"):
        load(copied)


# The fingerprint


def test_other_roundings_are_tolerated_and_other_models_are_not(made):
    directory = made / "everything"
    sidecar = json.loads((directory / "kompakt.json").read_text("utf-8"))
    policies, cache = read_policies(sidecar), read_cache(sidecar, directory)
    recorded = sidecar["fingerprint"]
    assert 0 < recorded["weights"]["noise"] < 0.1 and recorded["moved"] > 0
    model = load_written(directory)
    with nudged(model):
        nudge = compare_fingerprint(model, recorded, policies, cache)
    single = compare_fingerprint(torch.nn.Module.float(load_written(directory)), recorded, policies, cache)
    for results in (nudge, single):
        assert [agrees for _, agrees, _ in results] == [True, True]
        assert all("mean |Δ log p|" in words for _, _, words in results)
    model.get_submodule(UP).weight_scale.data.mul_(3)
    assert [agrees for _, agrees, _ in compare_fingerprint(model, recorded, policies, cache)] == [False, False]


def test_a_head_that_transformers_stores_under_another_name(tmp_path):
    settings = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**settings, num_attention_heads=4)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    recipe = {"weights": {"method": "rtn", "group_size": 16, "activations": "none"}, "evaluation": {"windows": 0}}
    compress(tmp_path / "base", recipe, tmp_path / "out")
    assert verify(tmp_path / "out").passed
    line = {"name": "lm_head", "shape": [8, 4], "parameters": 32}
    names = ("embed_out.weight", "other.weight")
    tensors = {name: StoredTensor(tmp_path, name, "BF16", (8, 4)) for name in names}
    assert unknown_tensors([line], tensors) == (["other.weight"], 1)


def test_static_tensors_of_a_cache_fit_the_model(made):
    model = load_written(made / "cache")
    name = "model.layers.1.self_attn"
    check_statics(model, {name: {"key_factors": torch.ones(2, 16), "flag": torch.ones(1, dtype=torch.uint8)}})
    for wrong in (torch.ones(3, 16), torch.ones(2, 8), torch.ones(2), torch.full((2, 16), float("nan"))):
        with pytest.raises(ValueError, match="for each of 2 heads of 16 channels"):
            check_statics(model, {name: {"key_factors": wrong}})


def test_a_cache_that_cannot_be_made_is_one_sentence(made, monkeypatch):
    def make(maker, *arguments):
        raise KeyError("key_mean")

    monkeypatch.setattr(CacheMaker, "make", make)
    with pytest.raises(ValueError, match="no cache can be made of the tensors that are stored for it: 'key_mean'"):
        load(made / "cache")


def test_numbers_of_one_tensor():
    ones = torch.ones(4, 4)
    assert tensor_problem(ones, "weight_scale", [4, 32]) == ""
    assert tensor_problem(ones, "weight", None) == ""
    assert "all alike" in tensor_problem(ones.to(torch.float8_e4m3fn), "weight", [4, 4])
    assert "NaN" in tensor_problem(torch.full((2, 2), float("nan")).to(torch.float8_e4m3fn), "weight", [2, 2])
    assert tensor_problem(torch.tensor([[5]], dtype=torch.int32), "weight_packed", [1, 1]) == ""
    assert tensor_problem(torch.tensor([1, 1]), "weight_shape", [1, 1]) == ""
