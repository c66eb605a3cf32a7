"""Steps of one token as one CUDA graph: `with captured(model): model.generate(…)`.

A step of a large model is thousands of launches, which the host needs longer to make than the device to run. Here the
second such step of a cache is recorded and every later one replayed. That is possible since append and attention take
the lengths of a compressed cache from the device (`kernels/kv_append.py`); the host counts along (`TokenStore.advance`)
and allocates the pages that the device will fill. What moves storage, such as another batch or beams, has the step
recorded again. On CUDA devices RMS norms and rotary embeddings are one launch each (`hf_fused.py`).

`generate` asks the model itself whether and how its steps are compiled (`_valid_auto_compile_criteria`,
`get_compiled_call`): both are overridden on the instance for a while. On a device without CUDA graphs the same steps
run as they are, so that the bookkeeping is the same everywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.activations import log_fallback
from ..kernels.kv_append import LENGTHS
from .cache import TokenStore
from .hf_cache import CACHE, CompressedCache, CompressedLayer
from .hf_cache_hooks import cache_maker
from .hf_fused import fused_on

CRITERIA, COMPILED = "_valid_auto_compile_criteria", "get_compiled_call"
KNOWN = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", CACHE}
"""Arguments of a step that it may be recorded with; others must be absent, None or False."""


@contextmanager
def captured(model: Any) -> Iterator[Any]:
    """While this lasts, `model.generate` records its steps. ValueError for a model without a compressed cache.

    On CUDA devices logits differ from those of plain steps by the rounding of one FP32 sum per norm and by what follows
    from it, since the norms of a step run as one kernel each, which adds in another order.
    """
    if cache_maker(model) is None:
        raise ValueError(f"{type(model).__name__} has no compressed cache; patch it with a recipe that has a kv_cache")
    if COMPILED in vars(model):
        raise ValueError(f"{type(model).__name__} has steps that are captured already")
    steps = Steps(model)

    def wanted(model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        asked = generation_config.disable_compile or generation_config.compile_config is not None
        if isinstance(model_kwargs.get(CACHE), CompressedCache) and not asked:
            return True
        return getattr(type(model), CRITERIA)(model, model_kwargs, generation_config)

    def compiled(compile_config: Any) -> Any:
        return steps if compile_config is None else getattr(type(model), COMPILED)(model, compile_config)

    setattr(model, CRITERIA, wanted)
    setattr(model, COMPILED, compiled)
    try:
        yield model
    finally:
        for name in (CRITERIA, COMPILED):
            vars(model).pop(name, None)


def capture_of(model: Any) -> Steps:
    """What stands in for the compiled call of a model inside `captured`."""
    return vars(model)[COMPILED](None)


class Steps:
    """Called in place of a model for one more token of every row.

    replayed, recorded, plain: how many steps went which way, plain being those that ran launch by launch.
    """

    def __init__(self, model: Any):
        self.model = model
        self.replayed = self.recorded = self.plain = 0
        self.known: Callable[[], CompressedCache | None] = lambda: None
        self.forget()

    def forget(self) -> None:
        """The next step is recorded anew, after one that runs as it is."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.storage: list[tuple[int, ...]] = []

    def __call__(self, **inputs: Any) -> Any:
        """As the model's forward."""
        reason = self.refusal(inputs)
        if reason is not None:
            log_fallback("a generation step", reason, "single launches")
            self.plain += 1
            return self.model(**inputs)
        cache = inputs[CACHE]
        stores = cache.compressed_layers
        if cache is not self.known():
            self.begin(cache, inputs["input_ids"])
        self.ids.copy_(inputs["input_ids"])
        self.positions.copy_(self.next_positions(stores[0], inputs))
        self.agree(stores)
        logits = self.step(cache)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})  # pyright: ignore[reportArgumentType]

    def refusal(self, inputs: dict[str, Any]) -> str | None:
        """Why a step cannot be recorded; None if it can."""
        cache, ids = inputs.get(CACHE), inputs.get("input_ids")
        if not isinstance(cache, CompressedCache):
            return "the cache is not compressed"
        if ids is None or ids.shape[1] != 1:
            return "more than one token comes at once"
        if not all(isinstance(layer, CompressedLayer) for layer in cache.layers):
            return "some layers of the cache are not compressed"
        if any(store.key is None for store in cache.compressed_layers):
            return "the cache is empty"
        strange = [
            name for name in inputs if name not in KNOWN and inputs[name] is not None and inputs[name] is not False
        ]
        if strange:
            return f"the argument {strange[0]} is not known to it"
        denied = [name for name in ("use_cache", "return_dict") if inputs.get(name) is False]
        if denied:
            return f"{denied[0]} is False"
        mask = inputs.get("attention_mask")
        # A mask grows by ones from step to step; after anything else it is looked at again.
        new = cache is not self.known() or any(store.following is None for store in cache.compressed_layers)
        if new and mask is not None and not (isinstance(mask, Tensor) and self.is_left_padding(cache, mask)):
            return "the mask is not the padding that the cache was made with"
        return None

    @staticmethod
    def is_left_padding(cache: CompressedCache, mask: Tensor) -> bool:
        """Whether a mask shows what the cache knows: rows that begin at its starts and have no holes."""
        if mask.ndim != 2:
            return False
        starts = torch.tensor(cache.compressed_layers[0].starts, device=mask.device)
        return bool((mask.bool() == (torch.arange(mask.shape[1], device=mask.device) >= starts[:, None])).all())

    def begin(self, cache: CompressedCache, ids: Tensor) -> None:
        """Another cache, which is not kept alive."""
        self.forget()
        self.known = weakref.ref(cache)
        self.ids, self.positions = torch.empty_like(ids), torch.empty_like(ids)
        self.lengths = torch.zeros((len(cache.layers), LENGTHS), dtype=torch.int32, device=ids.device)

    def next_positions(self, store: TokenStore, inputs: dict[str, Any]) -> Tensor:
        """Position of the token in its row, (batch, 1) or (1, 1)."""
        if (given := inputs.get("position_ids")) is not None:
            return given
        return (store.tokens - torch.tensor(store.starts, device=self.ids.device))[:, None]

    def agree(self, stores: list[TokenStore]) -> None:
        """Every store counts on the device, and what was recorded is of the storage that is there."""
        for store, lengths in zip(stores, self.lengths, strict=True):
            store.check_room()
            if store.following is None:
                store.follow(lengths)
            else:
                store.make_room()
        if self.storage != places(stores):
            self.forget()

    def step(self, cache: CompressedCache) -> Tensor:
        """Logits, (batch, 1, vocabulary), of the token in `ids`."""
        stores = cache.compressed_layers
        if self.graph is not None:
            for store in stores:
                store.advance()
            self.graph.replay()
            self.replayed += 1
            assert self.logits is not None
            return self.logits.clone()
        if not self.storage or self.ids.device.type != "cuda":
            # Kernels are compiled and workspaces made in a step that counts.
            logits = self.body(cache)
            self.storage = places(stores)
            self.plain += 1
            return logits
        graph, before = torch.cuda.CUDAGraph(), [(store.tokens, store.coded) for store in stores]
        torch.cuda.synchronize(self.ids.device)
        try:
            with torch.cuda.graph(graph):
                self.logits = self.body(cache)
        except BaseException:
            # Nothing has run on the device; the host must not count a token that is not there.
            for store, (tokens, coded) in zip(stores, before, strict=True):
                store.tokens, store.coded, store.following = tokens, coded, None
            self.forget()
            raise
        self.graph = graph
        graph.replay()
        self.recorded += 1
        assert self.logits is not None
        return self.logits.clone()

    def body(self, cache: CompressedCache) -> Tensor:
        """What is recorded."""
        stores = cache.compressed_layers
        try:
            for store in stores:
                store.repeatable = True
            with fused_on(self.ids.device, self.model):
                found = self.model(input_ids=self.ids, position_ids=self.positions, use_cache=True, **{CACHE: cache})
        finally:
            for store in stores:
                store.repeatable = False
        return found.logits[:, -1:]


def places(stores: list[TokenStore]) -> list[tuple[int, ...]]:
    """Where the storage of every layer lies, as far as a recorded launch depends on it."""
    found = []
    for store in stores:
        parts = (store.key, store.value, store.sink_key, store.sink_value, store.sink_starts, store.following)
        found.append(tuple(0 if part is None else part.data_ptr() for part in (*parts, store.table())))
    return found
