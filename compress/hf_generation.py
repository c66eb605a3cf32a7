"""Models to time `generate` on, with stored or with random weights, and one run of it with a clock.

Speed does not depend on what weights are, so that a model of a published shape can be timed without its checkpoint.
Nothing else can be said about such a model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .evaluation import Clock, scoring_mode
from .hf import load_base, meta_model, read_config, resolve_model
from .hf_cache import NAMES, CompressedCache
from .hf_decoder import decoder_layers, refuse_experts

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
"""Shapes of Llama 3.1 8B (its rotary frequencies unscaled) and Qwen3 0.6B."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. path: of a float checkpoint; None for random weights."""

    name: str
    config: Any
    path: Path | None

    @classmethod
    def of(cls, model: str | None, config: str | None) -> ModelSource:
        """model: directory or hub id with weights. config: a key of `CONFIGS` or a directory with a config.json.

        Raises ValueError unless one of the two is given, for what cannot be read, and for experts, whose weights a
        step does not read all.
        """
        if (model is None) == (config is None):
            raise ValueError(f"give either MODEL or --config, which is {', '.join(CONFIGS)} or a directory")
        if config in CONFIGS:
            options = dict(CONFIGS[config])
            source = cls(config, CONFIG_MAPPING[options.pop("model_type")](**options), None)
        elif config is not None:
            if not Path(config).is_dir():
                raise ValueError(f"config {config!r} is no directory and not one of {', '.join(CONFIGS)}")
            path = resolve_model(config, what="config", weights=False)
            source = cls(path.resolve().name, read_config(path), None)
        else:
            assert model is not None
            path = resolve_model(model)
            source = cls(path.resolve().name, read_config(path), path)
        if getattr(source.config, "quantization_config", None) is not None:
            raise ValueError(f"{source.name} is already quantized; recipes start from a float model")
        refuse_experts(decoder_layers(meta_model(source.config)))
        return source

    @property
    def positions(self) -> int | None:
        """Longest sequence; None where the config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def open(self, device: torch.device) -> Any:
        """The model on a device; random weights are bf16 and the same every time."""
        if self.path is not None:
            return load_base(self.path, device_map=None if device.type == "cpu" else {"": str(device)})
        torch.manual_seed(0)
        with torch.device(device):
            # A model that is patched changes its config.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=torch.bfloat16)
        return model.eval().requires_grad_(False)


def generate_timed(
    model: Any, prompt: Tensor, new_tokens: int, cache: str | None, *, launches: bool = False
) -> tuple[list[float], Any]:
    """Greedy generation of exactly so many tokens: when the prompt went in and each token came out, in seconds, and
    the cache after the last.

    prompt: (batch, tokens) ids. cache: a `cache_implementation`; None leaves it to the model. launches: no
    step is compiled or recorded.
    """
    clock = Clock(prompt.device)
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    options |= {"disable_compile": True} if launches else {}
    with scoring_mode(model):
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
            return_dict_in_generate=True,
            **options,
        )
    assert len(clock.times) == new_tokens + 1
    return clock.times, next(kept for name in NAMES if (kept := getattr(found, name, None)) is not None)


def cache_facts(cache: Any) -> dict[str, Any]:
    """Bytes that a cache has allocated, and for a compressed one how many of its columns are in codes."""
    if isinstance(cache, CompressedCache):
        return {"allocated_cache_bytes": cache.nbytes().total, "coded_tokens": cache.coded_tokens}
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    return {"allocated_cache_bytes": sum(tensor.nbytes for tensor in tensors), "coded_tokens": 0}


def forget_compiled(model: Any) -> None:
    """Drops compiled graphs, if there are any, and what transformers keeps for the next static cache."""
    if is_compiled(model):
        torch.compiler.reset()
    for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length", "_cache"):
        vars(model).pop(name, None)


def is_compiled(model: Any) -> bool:
    """Whether `generate` ran the model through torch.compile."""
    return "_compiled_call" in vars(model)


def step_weight_bytes(model: Any) -> int:
    """Bytes of weights that a decoding step reads: all but an input embedding that is not the head as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return sum(parameter.nbytes for parameter in model.parameters()) - (0 if tied else embedding.nbytes)
