"""KV cache without the tokens that a prompt can do without: every KV head of every layer keeps its own, in any codec.

Once, at the end of the first prompt that goes into a cache, keys are scored and the best of every head are kept
(`sparsify.kv_evict`), in pages of its own, coded as `codec` says; the others are gone, and their memory with them. The
first `sink_tokens` and the last `recent_tokens` of a prompt always stay, dense. Tokens that come later, generated or of
further turns, go the ordinary way of the cache; all of them stay, or with a `decode_budget` the best of them and of
what is left of the prompt (`evicting_again.py`). The prompt itself is attended to exactly: eviction does to it what
coding does, nothing.

Time to the first token includes the scoring: of `snapkv` and `expected` the attention of a few queries, of `kvzip` a
second pass over the prompt, during which the whole dense prompt is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..kernels.kv_codec import PAGE, Codec
from ..kernels.kv_pages import TokenCodec
from ..quant.kv_fp8 import KVFP8
from ..quant.kv_int4 import KVINT4
from ..quant.method import AttentionInputs, KVCacheMethod
from ..sparsify.kv_evict import Eviction

CODECS: dict[str, type[KVCacheMethod]] = {"fp8": KVFP8, "int4": KVINT4}


@dataclass(frozen=True, kw_only=True)
class KVEvict(KVCacheMethod, Eviction):
    """Whole tokens evicted, per KV head. codes: how what is kept is coded: fp8 and int4 as by kv_fp8 and kv_int4 with
    their defaults; none leaves it in bf16, which loses nothing of a bf16 model.
    """

    calibrated: ClassVar[str] = KVINT4.calibrated

    codes: Literal["none", "fp8", "int4"] = "none"

    def __post_init__(self) -> None:
        """ValueError for what does not go together, and for a `decode_budget` without room for a page that is kept."""
        super().__post_init__()
        least = self.dense_tokens + 2 * PAGE
        if self.decode_budget is not None and self.decode_budget < least:
            raise ValueError(
                f"decode_budget is {self.decode_budget}; {self.dense_tokens} tokens are dense (sink_tokens, "
                f"recent_tokens and a page of {PAGE}), a page comes and one is kept: give {least} or more, or fewer "
                "recent_tokens"
            )

    @property
    def decode_pages(self) -> int:
        """Pages that a head keeps in the mean while generating, one that comes not counted."""
        assert self.decode_budget is not None
        return (self.decode_budget - self.dense_tokens) // PAGE - 1

    @property
    def coded(self) -> KVCacheMethod | None:
        """The method whose codes these are; None for bf16."""
        if self.codes == "none":
            return None
        dense = {"sink_tokens": self.sink_tokens, "recent_tokens": self.recent_tokens}
        return CODECS[self.codes](**dense, max_tokens=self.max_tokens)

    @property
    def needs_data(self) -> bool:
        """Whether the codes do; scores look at the prompt itself."""
        return self.coded is not None and self.coded.needs_data

    def statics(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        """See `KVCacheMethod.statics`."""
        assert self.coded is not None
        return self.coded.statics(inputs)

    def blank_statics(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """See `KVCacheMethod.blank_statics`."""
        return {} if self.coded is None else self.coded.blank_statics(heads, head_dim)

    def codec(self, statics: Mapping[str, Tensor]) -> Codec:
        """See `KVCacheMethod.codec`."""
        return TokenCodec("bf16") if self.coded is None else self.coded.codec(statics)

    @property
    def dense_tokens(self) -> int:
        """Tokens per head that there is storage for whatever is kept: sinks, recent tokens, the page they fill."""
        return self.sink_tokens + self.recent_tokens + PAGE

    @property
    def shortest_prompt(self) -> int:
        """Tokens of the shortest prompt that anything is evicted from."""
        return self.shortest(self.dense_tokens)
