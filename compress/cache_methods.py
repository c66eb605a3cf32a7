"""Every method of the slot `kv_cache`: those that quantize, of `quant/`, those that leave something out, of
`sparsify/`, and what puts both together.
"""

from __future__ import annotations

from ..kernels.cache_method import KVCacheMethod
from ..quant import method as quantizing
from ..sparsify import method as leaving_out
from .kv_evict import KVEvict


def kv_cache_methods() -> dict[str, type[KVCacheMethod]]:
    """By key, the name of a method's file."""
    return {**quantizing.kv_cache_methods(), **leaving_out.kv_cache_methods(), "kv_evict": KVEvict}
