"""KV cache in FP8 (e4m3), one dynamic scale per token and KV head, no calibration.

For head_dim 128 a token takes 132 bytes per KV head and for keys or values each: 8.25 bits per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kernels.kv_codes import Kind
from .method import KVCacheMethod


@dataclass(frozen=True, kw_only=True)
class KVFP8(KVCacheMethod):
    """FP8 codes of past keys and values."""

    kind: ClassVar[Kind] = "fp8"
