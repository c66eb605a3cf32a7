"""Steps of one token as one CUDA graph, in a model that generates with a compressed cache.

A step of a large model is thousands of launches, which the host needs longer to make than the device to run. Here the
second such step of a cache is recorded and every later one replayed. That is possible since append and attention take
the lengths of a compressed cache from the device (`kernels/kv_append.py`); the host counts along (`TokenStore.advance`)
and allocates the pages that the device will fill. What moves storage, and every further turn, has the step recorded
again; beam search runs launch by launch. A step that cannot be recorded does so too, with the reason in the log.
Counters that Python keeps see only steps that are launched.

On CUDA devices RMS norms and rotary embeddings are one launch each (`hf_fused.py`), of prompts too, which they spare
reading and writing every hidden state seven times; so that logits differ from those of plain steps by the rounding of
one FP32 sum per norm and by what follows from it.

`generate` asks the model itself whether and how its steps are compiled (`_valid_auto_compile_criteria`,
`get_compiled_call`), and to read its prompt (`_prefill`): all are overridden on the instance, and answer for a
compressed cache on a CUDA device. `disable_compile=True`, transformers' own option, switches it off for a call.
"""

from __future__ import annotations

import gc
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.activations import log_fallback
from ..kernels.kv_append import LENGTHS
from .cache import TokenStore
from .evicting import EvictingStore
from .hf_cache import CACHE, CompressedCache, CompressedLayer
from .hf_fused import fused_on

CRITERIA, COMPILED, PREFILL = "_valid_auto_compile_criteria", "get_compiled_call", "_prefill"
KNOWN = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep", "return_dict", CACHE}
"""Arguments of a step that it may be recorded with; others must be absent, None or False."""
REPEATED = tuple(f"{__package__}.{name}" for name in ("hf_cache_hooks", "hf_eviction", "shared_input"))
"""Modules whose hooks need nothing of Python when a step is replayed: what they did is in the graph, or is for calls
without a cache, or for prompts."""
EMPTIED = 16
"""Recordings after which free memory goes back to the device."""


STEPS: weakref.WeakKeyDictionary[Any, Steps] = weakref.WeakKeyDictionary()


def record_steps(model: Any) -> None:
    """From now on `model.generate` records its steps, until `run_steps_as_before`."""
    setattr(model, CRITERIA, types.MethodType(is_recorded, model))
    setattr(model, COMPILED, types.MethodType(call_of, model))
    setattr(model, PREFILL, types.MethodType(read_prompt, model))


def run_steps_as_before(model: Any) -> None:
    """Undoes `record_steps`. A second call does nothing."""
    for name in (CRITERIA, COMPILED, PREFILL):
        vars(model).pop(name, None)
    STEPS.pop(model, None)


def steps_of(model: Any) -> Steps:
    """What is called in place of a model whose steps are recorded."""
    if model not in STEPS:
        STEPS[model] = Steps(model)
    return STEPS[model]


@contextmanager
def everywhere(model: Any) -> Iterator[None]:
    """While this lasts, devices without CUDA graphs do the same launch by launch, so that it can be tested there."""
    steps_of(model).everywhere = True
    try:
        yield
    finally:
        steps_of(model).everywhere = False


def is_recorded(model: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """In place of the model's `_valid_auto_compile_criteria`."""
    steps = steps_of(model)
    asked = generation_config.disable_compile or generation_config.compile_config is not None
    on_device = steps.everywhere or model.device.type == "cuda"
    steps.call.wanted = isinstance(model_kwargs.get(CACHE), CompressedCache) and on_device and not asked
    return steps.call.wanted or getattr(type(model), CRITERIA)(model, model_kwargs, generation_config)


def call_of(model: Any, compile_config: Any) -> Any:
    """In place of the model's `get_compiled_call`; what `is_recorded` just said decides."""
    steps = steps_of(model)
    return steps if getattr(steps.call, "wanted", False) else getattr(type(model), COMPILED)(model, compile_config)


def read_prompt(
    model: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **options: Any
) -> Any:
    """In place of the model's `_prefill`."""
    wanted = isinstance(model_kwargs.get(CACHE), CompressedCache) and not generation_config.disable_compile
    with fused_on(model.device, model) if wanted else nullcontext():
        return getattr(type(model), PREFILL)(model, input_ids, generation_config, model_kwargs, **options)


class Unrecordable(Exception):
    """A step that does something that a CUDA graph cannot hold."""


class Steps:
    """Called in place of a model for one more token of every row.

    replayed, recorded, plain: how many steps went which way, plain being those that ran launch by launch. everywhere:
    also on devices without CUDA graphs. call: of each thread, with `wanted`, whether its call of `generate` runs this
    way. failure: why nothing is recorded with the present cache. Threads take turns, step by step.
    """

    def __init__(self, model: Any):
        # It must not keep the model alive, which it is looked up by.
        self.owner = weakref.ref(model)
        self.everywhere = False
        self.call, self.lock = threading.local(), threading.RLock()
        self.failure: str | None = None
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
        if (ids := inputs.get("input_ids")) is not None and ids.shape[1] != 1:
            return self.model(**inputs)  # a part of a prompt
        with self.lock:
            return self.one(inputs)

    def one(self, inputs: dict[str, Any]) -> Any:
        """A step of one token."""
        reason = self.refusal(inputs)
        if reason is not None:
            log_fallback("a generation step", reason, "single launches")
            return self.launched(inputs)
        cache = inputs[CACHE]
        stores = cache.compressed_layers
        if cache is not self.known():
            self.begin(cache, inputs["input_ids"])
        self.ids.copy_(inputs["input_ids"])
        self.positions.copy_(self.next_positions(stores[0], inputs))
        self.agree(stores)
        try:
            logits = self.step(cache)
        except Unrecordable as error:
            self.failure = f"it cannot be recorded: {error}"
            log_fallback("a generation step", self.failure, "single launches")
            return self.launched(inputs)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})  # pyright: ignore[reportArgumentType]

    @property
    def model(self) -> Any:
        """Whose steps these are."""
        return self.owner()

    def launched(self, inputs: dict[str, Any]) -> Any:
        """The step launch by launch."""
        self.plain += 1
        return self.model(**inputs)

    def refusal(self, inputs: dict[str, Any]) -> str | None:
        """Why a step cannot be recorded; None if it can."""
        cache, ids = inputs.get(CACHE), inputs.get("input_ids")
        if not isinstance(cache, CompressedCache):
            return "the cache is not compressed"
        known = cache is self.known()
        if known and self.failure is not None:
            return self.failure
        if ids is None:
            return "it is given no token ids"
        positions = inputs.get("position_ids")
        if positions is not None and tuple(positions.shape) not in ((1, 1), tuple(ids.shape)):
            return "positions are not one number for each token"
        if not known and (reason := self.seen_by_others()) is not None:
            return reason
        if not all(isinstance(layer, CompressedLayer) for layer in cache.layers):
            return "some layers of the cache are not compressed"
        if any(store.key is None for store in cache.compressed_layers):
            return "the cache is empty"
        if any(store.key.device != ids.device for store in cache.compressed_layers):  # pyright: ignore
            return "the model lies on several devices"
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
        new = not known or any(store.following is None for store in cache.compressed_layers)
        given = mask is not None or (cache.evicting_layers and any(cache.compressed_layers[0].starts or []))
        if new and given and not (isinstance(mask, Tensor) and self.is_left_padding(cache, mask)):
            return "the mask is not the padding that the cache was made with"
        return None

    def seen_by_others(self) -> str | None:
        """What of the model's modules Python has to do in every step; None if nothing."""
        for name, module in self.model.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(getattr(hook, "__module__", "") not in REPEATED for hook in hooks):
                return f"{name or 'the model'} has a hook"
            if getattr(getattr(module, "_hf_hook", None), "offload", False):
                return f"weights of {name or 'the model'} are offloaded"
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
        self.failure = None
        self.known = weakref.ref(cache)
        self.ids, self.positions = torch.empty_like(ids), torch.empty_like(ids)
        self.lengths = torch.zeros((len(cache.layers), LENGTHS), dtype=torch.int32, device=ids.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=ids.device)

    def next_positions(self, store: TokenStore, inputs: dict[str, Any]) -> Tensor:
        """Position of the token in its row, (batch, 1) or (1, 1)."""
        if (given := inputs.get("position_ids")) is not None:
            return given
        return (store.tokens - torch.tensor(store.starts, device=self.ids.device))[:, None]

    def agree(self, stores: list[TokenStore]) -> None:
        """Every store counts on the device, and what was recorded is of the storage that is there. What evicts while
        generating does so here: it moves storage as long as pages of heads become more, and afterwards none.
        """
        for store in stores:
            store.settle()
            if isinstance(store, EvictingStore) and store.remembers:
                store.place = self.place
                if store is stores[0]:
                    self.place.fill_(store.tokens % store.ring_length)
        if any(store.following is None for store in stores):
            # Other calls came between, and with them perhaps other weights.
            self.forget()
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
        if self.recorded % EMPTIED == EMPTIED - 1:
            torch.cuda.empty_cache()  # memory of graphs that are gone comes back in no other way
        graph, before = torch.cuda.CUDAGraph(), [(store.tokens, store.coded) for store in stores]
        try:
            with recorded(graph, self.ids.device):
                self.logits = self.body(cache)
        except BaseException as error:
            # Nothing has run on the device; the host must not count a token that is not there.
            for store, (tokens, coded) in zip(stores, before, strict=True):
                store.tokens, store.coded, store.following = tokens, coded, None
            self.forget()
            if isinstance(error, Exception):
                raise Unrecordable(str(error).partition("\n")[0]) from error
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


@contextmanager
def recorded(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Records launches as `torch.cuda.graph` does, but keeps the allocator's free memory: without it the next prompt
    would have to allocate all of its own again, which takes longer than many steps.

    A graph that fails takes the generator and the allocator with it, which go on waiting for its end: the generator
    goes back to what it was, and the allocator is told.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[stream.device_index]
    before = generator.clone_state()
    torch.cuda.synchronize(device)
    collecting = gc.isenabled()
    # Tensors that are freed meanwhile would call what cannot be recorded.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # Other threads may allocate and wait meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
                graph.capture_end()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong first says more
                    graph.capture_end()
                with suppress(RuntimeError):  # it has ended, where the graph could
                    torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                generator.graphsafe_set_state(before)
                raise
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream(device).wait_stream(stream)


def places(stores: list[TokenStore]) -> list[tuple[int, ...]]:
    """Where the storage of every layer lies, as far as a recorded launch depends on it."""
    found = []
    for store in stores:
        parts = (store.key, store.value, store.sink_key, store.sink_value, store.sink_starts, store.following)
        found.append(tuple(0 if part is None else part.data_ptr() for part in (*parts, store.table())))
    return found
