"""Tiny mixtures of experts of several families, and their weights as one compressed directory holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import VOCAB, tiny_tokenizer, write_text
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kompakt.kernels.packing import unpack_int4

SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1},
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rope_parameters": None},
}
NAMES = {"mixtral": ("w1", "w3", "w2")}
"""What checkpoints call the Linears of an expert, where it is not gate_proj, up_proj, down_proj."""
BLOCKS = {"mixtral": "block_sparse_moe"}
"""What they call the block of experts, where it is not mlp."""


def names_of(family: str) -> tuple[str, str, str]:
    """Gate, up and down."""
    return NAMES.get(family, ("gate_proj", "up_proj", "down_proj"))


def write_model(folder: Path, family: str, seed: int = 0, **config) -> Path:
    """A random model of a family, with a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **config}))
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:  # zeros, or left unfilled
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def options(folder: Path) -> dict:
    """Recipe options of a quick run, with a text that is written into `folder`."""
    text = str(write_text(folder / "text.txt"))
    return {
        **{"calibration.source": text, "calibration.samples": 4, "calibration.length": 32},
        **{"evaluation.text": text, "evaluation.windows": 2, "evaluation.window": 32},
    }


def dequantized(base: Path, directory: Path, family: str):
    """The base model in transformers' own form, with the weights that a directory of INT4 codes stands for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, experts_implementation="eager").eval()
    stored = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored[name.replace(BLOCKS.get(family, "mlp"), "mlp")] = tensor

    def weight(name: str) -> torch.Tensor:
        rows, columns = stored[f"{name}.weight_shape"].tolist()
        scale = stored[f"{name}.weight_scale"]
        codes = unpack_int4(stored[f"{name}.weight_packed"], columns).view(rows, scale.shape[1], -1)
        return (codes.float() * scale.float().unsqueeze(-1)).view(rows, columns)

    with torch.no_grad():
        for packed in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
            outer, _, inner = packed.partition(".experts.")
            if not inner:
                model.get_submodule(packed).weight.copy_(weight(packed))
                continue
            index, part = int(inner.partition(".")[0]), names_of(family).index(inner.partition(".")[2])
            experts = model.get_submodule(f"{outer}.experts")
            width = experts.down_proj.shape[1] if family == "gpt_oss" else experts.down_proj.shape[2]
            if part == 2:
                experts.down_proj[index].copy_(weight(packed).T if family == "gpt_oss" else weight(packed))
            elif family == "gpt_oss":
                experts.gate_up_proj[index, :, part::2].copy_(weight(packed).T)
            else:
                experts.gate_up_proj[index, part * width : (part + 1) * width].copy_(weight(packed))
    return model
