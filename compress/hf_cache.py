"""`CompressedCache`: transformers' cache object over `cache.TokenStore`.

`update` of the first tokens gives back what it was given, so that a prefill runs as if there were no cache. From then
on it gives back two `CachedTensor`: our attention reads the codes behind them, and anything else that touches them sees
the dequantized keys or values as an ordinary tensor.

Where a recipe evicts, keys of a prompt that is to be scored go to the attention function with the store that wants to
see its queries (`AWAITING`), and cannot be dequantized afterwards.

The cache has the layers that `DynamicCache` would have for the same config. Those of plain and of sliding-window
attention are compressed where a policy names them; the others (linear attention, shared keys, …) stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.decode_attention import CompressedKV, dequantized
from ..quant.method import KVCacheMethod
from .cache import Sizes, TokenStore
from .evicting import EvictingStore
from .kv_evict import KVEvict

# What transformers calls a cache among the arguments and outputs of its models; until 5.23 the second.
NAMES = ("cache", "past_key_values")
CACHE = NAMES[0] if NAMES[0] in CausalLMOutputWithPast.__dataclass_fields__ else NAMES[1]

ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values and nothing else."""
AWAITING = "kompakt_store"
"""Attribute of keys that go into an attention function: the store that wants to see it."""
STAYS = "a compressed cache stays on its device; pass cache_implementation='offloaded' for transformers' own offloading"


class Visible:
    """What one call of an attention layer sees; keys and values of one layer share it."""

    def __init__(self, store: TokenStore, read: CompressedKV, dtype: torch.dtype):
        self.store, self.version, self.read, self.dtype = store, store.version, read, dtype
        self.dense: tuple[Tensor, Tensor] | None = None

    def compressed(self) -> CompressedKV:
        """RuntimeError if the cache has changed since."""
        if self.version != self.store.version:
            raise RuntimeError(
                "keys and values of a compressed cache were kept beyond the forward pass that they are of"
            )
        return self.read

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values."""
        kv = self.compressed()
        if self.dense is None:
            self.dense = dequantized(kv, self.dtype)
        return self.dense


class CachedTensor(torch.Tensor):
    """Keys or values, (batch, num_kv_heads, tokens, head_dim), that are dequantized when an operation needs them."""

    visible: Visible
    which: int

    @staticmethod
    def __new__(cls, visible: Visible, which: int) -> CachedTensor:
        """which: 0 for keys, 1 for values."""
        kv = visible.read
        source = (kv.sink_key, kv.sink_value)[which]
        shape = (*source.shape[:2], kv.tokens - kv.first, source.shape[3])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=visible.dtype, device=source.device)  # pyright: ignore
        made.visible, made.which = visible, which
        return made

    def __init__(self, visible: Visible, which: int):
        pass

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"CachedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def dequantize(self) -> Tensor:
        """As an ordinary tensor."""
        return self.visible.dequantized()[self.which]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation on dequantized tensors."""

        def plain(item: Any) -> Any:
            return item.dequantize() if isinstance(item, cls) else item

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class CompressedLayer(CacheLayerMixin):
    """One layer of a `CompressedCache`; see transformers' `DynamicLayer` and `DynamicSlidingWindowLayer`."""

    is_compileable = False
    is_croppable = True

    def __init__(self, store: TokenStore):
        super().__init__()
        self.store = store
        self.sliding_window = store.window

    @property
    def is_sliding(self) -> bool:
        """Whether queries see a window only."""
        return self.store.window is not None

    @property
    def record_past(self) -> bool:
        """Whether tokens that left the window are kept until the next `crop`."""
        return self.store.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.store.recording = value

    def activate_past_recording(self) -> None:
        """From now on a `crop` can take tokens away from a layer with a window."""
        self.store.recording = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for tokens such as these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends, and gives back what the queries of the new tokens see."""
        store = self.store
        read = store.extend(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if read is None:
            return key_states, value_states
        visible = Visible(store, read, key_states.dtype)
        return CachedTensor(visible, 0), CachedTensor(visible, 1)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.store.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, first column) that `query_length` new tokens will see."""
        first = self.store.first
        return self.store.tokens - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or −1."""
        return self.store.window or -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its name before 5.20."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes −`tokens_to_remove` tokens away from the end."""
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop got {-count}; give a negative number, of tokens to remove")
        self.store.crop(count)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.store.forget()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch so many times."""
        rows = self.store.batch or len(self.store.starts or ())
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch; a mask or numbers."""
        rows = self.store.batch or len(self.store.starts or ())
        chosen = torch.arange(rows)[indices.cpu()]
        self.store.map_rows(lambda tensor: tensor.index_select(0, chosen.to(tensor.device)), chosen.tolist())

    def offload(self) -> None:
        """Refused."""
        raise ValueError(STAYS)

    def prefetch(self) -> None:
        """Refused."""
        raise ValueError(STAYS)


class EvictingLayer(CompressedLayer):
    """One layer of a cache that evicts."""

    store: EvictingStore

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.update`. What a second reading of the prompt brings is not stored."""
        first = self.store.tokens == 0
        if self.store.reading is not None:
            found = self.store.beside(key_states, value_states)
        else:
            found = super().update(key_states, value_states)
        if self.store.pending is not None or (first and self.store.remembers):
            setattr(found[0], AWAITING, self.store)
        return found


class CompressedCache(Cache):
    """A key-value cache in codes, for `generate` or a forward pass to be given.

    config: of the model. method: what is stored. statics: layer number → static tensors of `KVCacheMethod.statics`;
    the layers it names are compressed, None compresses all that can be. starts: column of each row's first token in a
    left-padded batch, whose first tokens then stay dense; without it the first columns do.
    """

    def __init__(
        self,
        config: Any,
        method: KVCacheMethod,
        *,
        statics: Mapping[int, Mapping[str, Tensor]] | None = None,
        starts: list[int] | None = None,
    ):
        layers: list[Any] = []
        for index, layer in enumerate(former_cache(config).layers):
            window = getattr(layer, "sliding_window", None)
            if type(layer) in ATTENTION and (statics is None or index in statics):
                known = None if statics is None else statics[index]
                if isinstance(method, KVEvict):
                    check_evictable(config, index, window)
                    layer = EvictingLayer(EvictingStore(method, statics=known, starts=starts))
                else:
                    layer = CompressedLayer(TokenStore(method, statics=known, window=window, starts=starts))
            layers.append(layer)
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            raise ValueError(f"{type(config).__name__} describes no layer whose keys and values can be compressed")
        if isinstance(method, KVEvict):
            check_together(config, method, layers)
        super().__init__(layers=layers)
        self.method = method

    @property
    def compressed_layers(self) -> list[TokenStore]:
        """The layers that hold codes."""
        return [layer.store for layer in self.layers if isinstance(layer, CompressedLayer)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers. ValueError for a layer that the cache does not have, or tokens that do not fit to it."""
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, and layer {layer_idx} asks for it")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def nbytes(self) -> Sizes:
        """Bytes of allocated storage of all layers, those that are not compressed among the dense."""
        total = sum((store.nbytes() for store in self.compressed_layers), Sizes(0, 0, 0))
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        tensors = [tensor for layer in others for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
        return total + Sizes(0, 0, sum(tensor.nbytes for tensor in tensors))

    def reads_codes(self, start: int, stop: int) -> bool:
        """Whether queries of the columns [start, stop), the last that came, attended to any coded token."""
        for store in self.compressed_layers:
            seen = 0 if store.window is None else max(0, start - store.window + 1)
            if min(store.looked_at, start) > max(seen, store.method.sink_tokens):
                return True
        return False

    @property
    def bits_per_element(self) -> float:
        """Bits of codes and scales per key or value channel that pages hold; some must be coded."""
        stores = [store for store in self.compressed_layers if store.page_elements]
        sizes = sum((store.nbytes() for store in stores), Sizes(0, 0, 0))
        return round(8 * (sizes.codes + sizes.scales) / sum(store.page_elements for store in stores), 4)

    @property
    def evicting_layers(self) -> list[EvictingStore]:
        """The layers that evict; all or none of those that hold codes."""
        return [store for store in self.compressed_layers if isinstance(store, EvictingStore)]

    @property
    def coded_tokens(self) -> int:
        """Columns that are in codes, in the layer that has most."""
        return max(store.coded for store in self.compressed_layers)


def check_evictable(config: Any, index: int, window: int | None) -> None:
    """ValueError if a layer cannot evict."""
    if window is not None:
        raise ValueError(
            f"layer {index} of {type(config).__name__} has a sliding window of {window} tokens, which is evicted from "
            "as it moves; kv_evict is for models with full attention in every layer"
        )


def check_together(config: Any, method: KVEvict, layers: list[Any]) -> None:
    """ValueError if other layers of a cache do not go with ones that evict."""
    for index, layer in enumerate(layers):
        if type(layer) in ATTENTION:
            raise ValueError(f"layer {index} would keep all tokens, and one mask serves all layers; evict in all")
        if method.scores == "kvzip" and not isinstance(layer, EvictingLayer):
            raise ValueError(
                f"layer {index} of {type(config).__name__} has a {type(layer).__name__}, which a second reading of the "
                "prompt would change; take scores snapkv or expected"
            )


def layer_kinds(config: Any) -> list[str]:
    """Of each layer of a text model, as `DynamicCache` reads its config: "full_attention", "sliding_attention", …"""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    windowed, chunked = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    alike = "full_attention" if chunked is None else "chunked_attention"
    return ["sliding_attention" if windowed is not None else alike] * config.num_hidden_layers


def former_cache(config: Any) -> Cache:
    """The cache that transformers would make for a model."""
    return DynamicCache(config=config)


def holds_attention_alone(cache: Cache) -> bool:
    """Whether a cache has no recurrent state or the like beside keys and values."""
    return all(type(layer) in ATTENTION for layer in cache.layers)
