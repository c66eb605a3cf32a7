"""Memory of a `compress` run, stage by stage, estimated from shapes: what is held at the same time, on device and host.

    loading       the whole base model on the host; the device holds nothing yet
    calibration   one decoder layer, hidden states of all samples (twice for methods that compare with the float model),
                  and the worst of these moments: a differentiated pass over one batch beside a float32 matrix of second
                  moments for each Linear; the rounding of one Linear beside the matrices not used up; learned rounding
    attention     one decoder layer, the sequences that attention is judged on, and exact attention on one of them;
                  the same again for a cache that is calibrated
    reading back  the model in memory and the one reloaded from disk, on the host
    evaluation    base and compressed model on the device, and of each the logits of one pass over a few windows

On the CPU there is only one memory: everything stands under `host`, and a layer is no copy of the model's. A limit on
quality keeps the float weights on the host until the end. Not counted: Python and its libraries (0.6 GB on the host),
the CUDA context, fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.attention import REFERENCE_ROWS
from ..kernels.dense_linear import CHUNK_ELEMENTS as CONVERTED_ELEMENTS
from ..kernels.dense_linear import multiplies_slowly
from ..quant.grid import CPU_SEARCH_ELEMENTS, SEARCH_ELEMENTS, SHRINK_STEPS
from ..quant.solver import FACTOR_BLOCK
from .attention_calibration import SEQUENCES
from .ceilings import expert_share
from .evaluation import CHUNK_ELEMENTS, windows_per_pass
from .experts import separate_experts_of
from .pipeline import PROBE_TOKENS
from .recipe import Recipe
from .walk import _home

FLOAT32 = 4
# float32 copies of one Linear that is rounded: itself, and its quotient by the scales; absolute values too in FP8.
ROUNDED_COPIES = {"int4": 2, "fp8": 4}
# float32 tensors of what a search of scales tries at once: codes, which become errors; of one trial when it is refined;
# and for each group, scales and errors with their temporaries.
TRIED_COPIES, REFIT_COPIES, SCALE_COPIES = 1, 3, 4
# Bytes per weight that a reference expands it to: float32 and, of it, 16 bit.
EXPANDED_BYTES, FP8_EXPANDED_BYTES = 6, 4
# float32 strips of a matrix of second moments while it is factored: a panel, its update and the solution.
FACTOR_STRIPS = 3
# A pass that is differentiated keeps the outputs of all Linears, what other operations read, and then the gradients.
GRAPH_COPIES = 3
# Bytes per weight of a learned rounding: codes, weight, offset, two gradients; and what autograd saves in a pass.
LEARNED_BYTES, SAVED_BYTES = 17, 11
# float32 chunks of logits alive at once: both log-softmaxes, probabilities, the terms of the KL and two temporaries.
LOGIT_CHUNKS = 6
# float32 tensors of logits in exact attention: logits, masked, their exponentials and a temporary.
EXACT_COPIES = 4
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
    """What the estimate depends on. model: without storage. reference: Linears multiply in torch."""

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
            *self.chosen(layers, compressed if limited else {}),
            Stage("reading back", {}, {**compressed, "reloaded model": self.compressed_bytes, **kept}),
        ]
        if self.recipe.evaluation.windows:
            widest = max((layer for layer, _ in layers), key=self.width)
            stages.append(Stage("evaluation", self.evaluation(widest), {**compressed, **kept}))
        if self.device.type == "cpu":
            return [Stage(stage.name, {}, {**stage.host, **stage.device}) for stage in stages]
        return stages

    def chosen(self, layers: list[tuple[nn.Module, list[nn.Linear]]], extra: Mapping[str, int]) -> Iterator[Stage]:
        """The stages that look at data: weights, then attention, then the cache."""
        if self.recipe.weights is not None:
            yield self.calibration(layers, extra)
        if self.recipe.attention is not None and self.recipe.attention.needs_data:
            need = self.attention([layer for layer, _ in layers], SEQUENCES)
            yield Stage("attention", need, {"base model": self.base_bytes})
        if self.recipe.kv_cache is not None and self.recipe.kv_cache.needs_data:
            need = self.attention([layer for layer, _ in layers], self.recipe.kv_cache.sequences)
            yield Stage("key-value cache", need, {"base model": self.base_bytes})

    def attention(self, layers: list[nn.Module], sequences: int) -> dict[str, int]:
        """Judging attention: hidden states and one pass of every sequence, then logits of some rows of one."""
        options, config = self.recipe.calibration, self.model.config.get_text_config()
        tokens = min(options.samples, sequences) * options.length
        logits = FLOAT32 * REFERENCE_ROWS * options.length * config.num_attention_heads
        return {
            "decoder layer": max(self.layer(layer) for layer in layers),
            "hidden states": 2 * tokens * self.hidden_size * self.model.dtype.itemsize,
            "forward pass": max(self.activations(layer, tokens) for layer in layers),
            "exact attention": EXACT_COPIES * logits,
        }

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
            {"decoder layer": self.layer(layer), "second moments": moments, "largest transient": transient}
            for layer, linears in layers
            for moments, transient in self.moments(layer, linears, batch)
        ]
        most = max(needs, key=lambda need: sum(need.values()))
        # The first batch is kept beside its output, for the error of the layer.
        states = {"hidden states": hidden.nbytes * (2 if method.needs_reference else 1) + 2 * hidden[:batch].nbytes}
        host = {"base model": self.base_bytes, **extra}
        no_cuda_here = self.device.type == "cuda" and not torch.cuda.is_available()
        if no_cuda_here or _home(self.device, [hidden]).type == self.device.type:
            return Stage("calibration", {**most, **states}, host)
        return Stage("calibration", most, {**host, **states})

    def layer(self, layer: nn.Module) -> int:
        """A decoder layer on the device; on the CPU it is a part of the base model."""
        return 0 if self.device.type == "cpu" else _bytes(layer)

    def moments(self, layer: nn.Module, linears: list[nn.Linear], tokens: int) -> Iterator[tuple[int, int]]:
        """(second moments, everything else) at each moment of a layer that may need most. tokens: of one batch."""
        method = self.recipe.weights
        assert method is not None
        one_pass, graph = self.activations(layer, tokens), GRAPH_COPIES * self.activations(layer, tokens, False)
        graph += self.converted(linears, tokens)
        weights = sum(linear.weight.numel() for linear in linears)
        matrices = [FLOAT32 * linear.in_features**2 * method.needs_data for linear in linears]
        yield 0, one_pass + weights
        if method.needs_data:
            yield sum(matrices), graph
            yield sum(matrices), max((self.rounding(linear) for linear in linears), default=0)
        if method.needs_reference:
            yield 0, weights * (LEARNED_BYTES + SAVED_BYTES) + graph
        done, kept = 0, 1 + FLOAT32 * method.needs_reference
        for index, linear in enumerate(linears):
            yield sum(matrices[index:]), done + self.rounding(linear)
            done += kept * linear.weight.numel()

    def rounding(self, linear: nn.Linear) -> int:
        """Rounding one Linear: float32 copies, codes, and the trials of its scales or the factor of its moments."""
        method, count = self.recipe.weights, linear.weight.numel()
        assert method is not None
        strip = linear.in_features * min(linear.in_features, FACTOR_BLOCK) * method.needs_data
        beside = max(self.trials(linear), FACTOR_STRIPS * strip, (ROUNDED_COPIES[method.storage] - 1) * count)
        return FLOAT32 * (count + beside) + count

    def trials(self, linear: nn.Linear) -> int:
        """float32 numbers that a search of the scales of one Linear holds: several scales for few rows, or one."""
        method = self.recipe.weights
        assert method is not None
        if method.storage != "int4":
            return 0
        limit = CPU_SEARCH_ELEMENTS if self.device.type == "cpu" else SEARCH_ELEMENTS
        rows = min(linear.weight.numel(), limit)
        tried = rows * min(SHRINK_STEPS, max(1, limit // rows))
        scales = tried * method.scheme().groups(linear.in_features) // linear.in_features
        return max(TRIED_COPIES * tried + SCALE_COPIES * scales, REFIT_COPIES * rows)

    def activations(self, layer: nn.Module, tokens: int, compressed: bool = True) -> int:
        """One forward pass of a layer: outputs of all its Linears, float32 copies inside norms, expanded weights.

        compressed: its Linears are, and are expanded to be multiplied.
        """
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        size = tokens * (self.model.dtype.itemsize * self.width(layer) + NORM_COPIES * FLOAT32 * self.hidden_size)
        if self.device.type == "cpu":
            size += 2 * FLOAT32 * tokens * max((linear.in_features for linear in linears), default=0)
        if compressed:
            # Kernels expand weights for many tokens, to FP8 or half of them to 16 bit.
            largest = max((linear.weight.numel() for linear in linears), default=0)
            size += max(largest * (self.expanded_bytes if self.reference else 1), self.converted(linears, tokens))
        return size

    def converted(self, linears: list[nn.Linear], tokens: int) -> int:
        """Rows of the largest weight in float32, and of its product, on a slow CPU (`dense_linear`)."""
        if self.device.type != "cpu" or not multiplies_slowly(self.model.dtype):
            return 0
        sizes = [(linear.weight.numel(), tokens * linear.out_features) for linear in linears]
        return FLOAT32 * max((sum(min(size, CONVERTED_ELEMENTS) for size in pair) for pair in sizes), default=0)

    @property
    def expanded_bytes(self) -> int:
        """Bytes of a weight while a reference multiplies with it."""
        method = self.recipe.weights
        fp8 = method is not None and method.storage == "fp8" and method.activations == "fp8"
        return FP8_EXPANDED_BYTES if fp8 else EXPANDED_BYTES

    def evaluation(self, widest: nn.Module) -> dict[str, int]:
        """Both models, logits of one pass of each, the comparison's float32 chunks, and the pass itself."""
        window, vocabulary = self.recipe.evaluation.window, self.model.config.get_text_config().vocab_size
        windows = windows_per_pass(self.device, self.model.dtype, window, vocabulary)
        logits = window * vocabulary
        return {
            "base weights": self.base_bytes,
            "compressed weights": self.compressed_bytes,
            "logits": 2 * windows * logits * self.model.dtype.itemsize,
            "comparison": LOGIT_CHUNKS * FLOAT32 * min(logits, CHUNK_ELEMENTS),
            "forward pass": self.activations(widest, windows * window),
        }

    def width(self, layer: nn.Module) -> int:
        """Outputs of all Linears of a layer for one token, on average; it goes to some experts of a mixture only."""
        total = sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
        for mixture in separate_experts_of(layer).values():
            inside = sum(module.out_features for module in mixture.modules() if isinstance(module, nn.Linear))
            total -= inside - int(inside * expert_share(self.model, mixture))
        return total

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
