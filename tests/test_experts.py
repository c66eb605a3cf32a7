"""Mixtures of experts: refused by name and share, or kept on request with their routers, beside quantized Linears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_tokenizer, write_text
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kompakt.cli.main import main
from kompakt.compress import compress, load, plan, verify
from kompakt.compress.coverage import cover
from kompakt.compress.hf_decoder import decoder_layers
from kompakt.compress.untrusted import StoredTensor
from kompakt.compress.verification_tensors import unknown_tensors
from kompakt.quant.rtn import RTN

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that writes a model of a family, once."""
    folders = {}

    def make(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "base"
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family]}))
            model.to(torch.bfloat16).save_pretrained(folders[family])
            tiny_tokenizer().save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_refused_with_their_share_and_what_to_do(family, made, tmp_path, capsys):
    base = made(family)
    sentence = r"model\.layers\.0\.mlp\.experts is a mixture-of-experts module .*2 of them hold \d\d% .*weights\.ignore"
    with pytest.raises(ValueError, match=sentence):
        compress(base, "w4a16-rtn", tmp_path / "out")
    assert main(["plan", str(base), "--recipe", "w4a16-rtn"]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_and_routers_are_kept_bit_for_bit_beside_quantized_linears(family, made, tmp_path):
    base = made(family)
    text = str(write_text(tmp_path / "text.txt"))
    options = {
        **{"weights.ignore": ["experts"], "calibration.source": text, "calibration.samples": 2},
        **{"calibration.length": 32, "evaluation.windows": 2, "evaluation.window": 32},
    }
    result = compress(base, "w4a16-gptq", tmp_path / "out", overrides=options)
    lines = {line.name: line for line in result.coverage}
    for layer in range(2):
        assert lines[f"model.layers.{layer}.self_attn.q_proj"].status == "quantized"
        experts = lines[f"model.layers.{layer}.mlp.experts"]
        assert (experts.status, experts.reason) == ("kept", "mixture of experts, which no method quantizes yet")
    routers = [line for line in result.coverage if line.reason == "router of a mixture of experts"]
    assert len(routers) == (4 if family == "qwen2_moe" else 2) and all(line.status == "kept" for line in routers)
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto").state_dict()
    after = load(tmp_path / "out").state_dict()
    kept = [name for name in before if any(part in name for part in (".experts", ".gate.", ".router", "expert_gate"))]
    assert len(kept) >= 6
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert verify(tmp_path / "out").passed
    assert plan(base, "w4a16-gptq", overrides=options).as_dict()["coverage"]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_stock_transformers_reads_the_same_or_refuses(family, made, tmp_path):
    pytest.importorskip("compressed_tensors")
    options = {"weights.ignore": ["experts"], "evaluation.windows": 0}
    compress(made(family), "w4a16-rtn", tmp_path / "out", overrides=options)
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    except RuntimeError as error:  # 5.24 wants experts packed where they are stored one by one
        assert family == "qwen3_moe" and "conversion of the weights" in str(error)
        return
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, load(tmp_path / "out")(tokens).logits)


def test_a_missing_expert_is_noticed():
    lines = [{"name": "model.layers.0.mlp.experts", "shape": [2, 8, 4], "parameters": 96, "status": "kept"}]
    names = [f"model.layers.0.moe.experts.{index}.{part}.weight" for index in range(2) for part in ("w1", "w2", "w3")]
    stored = {name: StoredTensor(Path(), name, "BF16", (4, 4)) for name in names}
    assert unknown_tensors(lines, stored) == ([], 6)
    del stored[names[-1]]
    assert unknown_tensors(lines, stored) == (names[:-1], 0)


def test_a_router_that_is_a_linear_is_not_quantized():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = torch.nn.Linear(32, 4), torch.nn.ModuleList([torch.nn.Linear(32, 32)])
            self.gate_proj = torch.nn.Linear(32, 32)

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Block()])})
    lines = {line.name.rpartition(".")[2]: line.status for line in cover(model, ["layers.0"], RTN(ignore=("experts",)))}
    assert lines == {"gate": "kept", "0": "kept", "gate_proj": "quantized"}


def test_a_gate_without_experts_is_a_linear_like_others(made):
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"gate": torch.nn.Linear(32, 32)})])}
    )
    assert [line.status for line in cover(model, ["layers.0"], RTN(ignore=()))] == ["quantized"]


def test_attention_and_cache_recipes_work_on_experts(made, tmp_path):
    base = made("qwen3_moe")
    assert decoder_layers(AutoModelForCausalLM.from_pretrained(base))
    options = {"evaluation.windows": 2, "evaluation.window": 32}
    result = compress(base, "kv-fp8", tmp_path / "out", overrides=options)
    assert result.evaluation is not None and result.evaluation["kv_cache"]["protocol"] == "chunks"
