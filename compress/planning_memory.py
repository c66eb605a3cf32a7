"""Memory of a `compress` run, stage by stage, estimated from shapes: what is held at the same time, on device and host.

    loading       the whole base model on the host; the device holds nothing yet
    calibration   one decoder layer, a float32 matrix of second moments for each of its Linears, hidden states of all
                  samples (old, new and, for methods that compare with the float model, a third copy), and the largest
                  transient: a pass over one batch, float32 copies of a Linear that is rounded, or gradients of learned
                  rounding
    reading back  the model in memory and the one reloaded from disk, on the host
    evaluation    base and compressed model on the device, the logits of one window of each, and one forward pass

On the CPU there is only one memory, and everything stands under `host`. A limit on quality keeps the float weights on
the host until the end. Not counted: Python and its libraries (0.6 GB on the host), the CUDA context, fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quant.grid import SEARCH_ELEMENTS, SHRINK_STEPS
from .evaluation import CHUNK_ELEMENTS
from .pipeline import PROBE_TOKENS
from .recipe import Recipe
from .walk import _home

FLOAT32 = 4
# float32 copies of one Linear that is rounded, and of all that a search of its scales, or the solver, tries at once.
ROUNDED_COPIES, TRIED_COPIES = 4, 3
# float32 matrices (in, in) beside the Hessian: its factor, which is inverted in place.
SOLVER_MATRICES = 1
# A pass that is differentiated keeps what every operation read, and then the gradients.
GRAPH_COPIES = 2
# Bytes per weight of a learned rounding: weight, offset, two gradients; and what autograd saves in a pass.
LEARNED_BYTES, SAVED_BYTES = 16, 11
# float32 chunks of logits alive at once: both log-softmaxes, probabilities, the terms of the KL and two temporaries.
LOGIT_CHUNKS = 6
# float32 copies of the hidden states inside a norm.
NORM_COPIES = 3


@dataclass(frozen=True)
class Stage:
    """Bytes held at the peak of one stage, by what they are for: on the compute device and on the host."""

    name: str
    device: dict[str, int]
    host: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the sums."""
        return {
            "name": self.name,
            "device_bytes": sum(self.device.values()),
            "host_bytes": sum(self.host.values()),
            "device": self.device,
            "host": self.host,
        }


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """What the estimate depends on. model: without storage. reference: Linears expand their weights to multiply."""

    model: Any
    recipe: Recipe
    base_bytes: int
    compressed_bytes: int
    device: torch.device
    reference: bool

    def stages(self, layers: list[tuple[nn.Module, list[nn.Linear]]]) -> list[Stage]:
        """Every stage in order. layers: each decoder layer with those of its Linears that are quantized."""
        limited = self.recipe.limits.perplexity_increase is not None
        kept = {"float weights kept for backing off": self.base_bytes} if limited else {}
        compressed = {"compressed model": self.compressed_bytes}
        stages = [
            Stage("loading", {}, {"base model": self.base_bytes}),
            self.calibration(layers, compressed if limited else {}),
            Stage("reading back", {}, {**compressed, "reloaded model": self.compressed_bytes, **kept}),
        ]
        if self.recipe.evaluation.windows:
            widest = max((layer for layer, _ in layers), key=_width)
            stages.append(Stage("evaluation", self.evaluation(widest), {**compressed, **kept}))
        if self.device.type == "cpu":
            return [Stage(stage.name, {}, {**stage.host, **stage.device}) for stage in stages]
        return stages

    def calibration(self, layers: list[tuple[nn.Module, list[nn.Linear]]], extra: Mapping[str, int]) -> Stage:
        """The walk over the layers, at the one that needs most."""
        method, options = self.recipe.weights, self.recipe.calibration
        assert method is not None
        tokens, batch = (
            (options.samples * options.length, min(options.batch_size, options.samples) * options.length)
            if method.needs_data
            else (PROBE_TOKENS, PROBE_TOKENS)
        )
        hidden = torch.empty(tokens, self.hidden_size, dtype=self.model.dtype, device="meta")
        needs = [
            {
                "decoder layer": _bytes(layer),
                "second moments": sum(FLOAT32 * linear.in_features**2 for linear in linears) * method.needs_data,
                "largest transient": self.transient(layer, linears, batch),
            }
            for layer, linears in layers
        ]
        most = max(needs, key=lambda need: sum(need.values()))
        states = {"hidden states": hidden.nbytes * (3 if method.needs_reference else 2)}
        host = {"base model": self.base_bytes, **extra}
        no_cuda_here = self.device.type == "cuda" and not torch.cuda.is_available()
        if no_cuda_here or _home(self.device, [hidden]).type == self.device.type:
            return Stage("calibration", {**most, **states}, host)
        return Stage("calibration", most, {**host, **states})

    def transient(self, layer: nn.Module, linears: list[nn.Linear], tokens: int) -> int:
        """Largest of: a pass over one batch, rounding one Linear, learning all; beside the codes found so far."""
        method = self.recipe.weights
        assert method is not None
        one_pass = self.activations(layer, tokens)
        rounding = learning = 0
        for linear in linears:
            count = linear.weight.numel()
            tried = min(SHRINK_STEPS * count, SEARCH_ELEMENTS) if method.storage == "int4" else 0
            searched = TRIED_COPIES * max(count, tried)
            solved = TRIED_COPIES * count + SOLVER_MATRICES * linear.in_features**2 if method.needs_data else 0
            rounding = max(rounding, FLOAT32 * (ROUNDED_COPIES * count + max(searched, solved)))
        codes = sum(linear.weight.numel() for linear in linears)
        if method.needs_reference:
            learning = codes * (LEARNED_BYTES + SAVED_BYTES) + one_pass * GRAPH_COPIES
        return max(one_pass * (GRAPH_COPIES if method.needs_data else 1), rounding, learning) + codes

    def activations(self, layer: nn.Module, tokens: int) -> int:
        """One forward pass of a layer: outputs of all its Linears, float32 copies inside norms, expanded weights."""
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        size = tokens * (self.model.dtype.itemsize * _width(layer) + NORM_COPIES * FLOAT32 * self.hidden_size)
        if self.device.type == "cpu":
            size += 2 * FLOAT32 * tokens * max((linear.in_features for linear in linears), default=0)
        if self.reference:
            largest = max((linear.weight.numel() for linear in linears), default=0)
            size += largest * (2 * FLOAT32 + self.model.dtype.itemsize)
        return size

    def evaluation(self, widest: nn.Module) -> dict[str, int]:
        """Both models, logits of one window of each, the comparison's float32 chunks, and one forward pass."""
        window, vocabulary = self.recipe.evaluation.window, self.model.config.get_text_config().vocab_size
        logits = window * vocabulary
        return {
            "base weights": self.base_bytes,
            "compressed weights": self.compressed_bytes,
            "logits": 2 * logits * self.model.dtype.itemsize,
            "comparison": LOGIT_CHUNKS * FLOAT32 * min(logits, CHUNK_ELEMENTS),
            "forward pass": self.activations(widest, window),
        }

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _width(layer: nn.Module) -> int:
    return sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
