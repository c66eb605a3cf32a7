"""What `compress` wrote, loaded again: the logits of the model in memory bit for bit, and quality against the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..quant.method import AttentionPolicy, CachePolicy
from .artifact import read_cache, read_policies, write_cache, write_policies
from .assess import describe_text, measure_text, read_text
from .cache_evaluation import probe_logits
from .hf import load_base, load_written
from .hf_attention import at_least
from .hf_cache_hooks import running
from .hf_decoder import decoder_layers, execute_on, layerwise_logits
from .recipe import Recipe

Progress = Callable[[str, int, int, str], None]


def reload_and_compare(
    model: Any,
    staging: Path,
    probe: torch.Tensor,
    device: torch.device,
    trust_remote_code: bool,
    policies: dict[str, AttentionPolicy] | None = None,
    cache: CachePolicy | None = None,
    offload: Path | None = None,
) -> None:
    """RuntimeError unless the directory, loaded from disk, gives exactly the logits of the model in memory.

    policies: attention runs by them in both, however short the probe is. cache: logits are compared once more with
    tokens that read the compressed cache. offload: a folder says that weights wait on the disk.
    """
    policies = policies or {}
    stored = read_policies(json.loads(json.dumps(write_policies(policies))))
    waiting = None if offload is None else "disk"
    reloaded = load_written(staging, device_map=waiting, offload=offload, trust_remote_code=trust_remote_code)
    logits = []
    for subject, chosen in ((model, policies), (reloaded, stored)):
        with running(subject, chosen), at_least(subject, 1):
            logits.append(layerwise_logits(subject, decoder_layers(subject), probe, device))
    compare_logits(*logits)
    if cache is not None:
        again = read_cache(json.loads(json.dumps({"kv_cache": write_cache(cache)})), staging)
        assert again is not None
        compare_logits(
            probe_logits(model, policies, cache, probe),
            probe_logits(reloaded, stored, again, probe),
            "compressed cache: ",
        )


def compare_logits(expected: torch.Tensor, got: torch.Tensor, where: str = "") -> None:
    """RuntimeError unless they are equal."""
    if not torch.equal(expected, got):
        worst = float((expected.float() - got.float()).abs().max())
        raise RuntimeError(
            f"{where}the reloaded model differs from the one in memory (largest logit difference {worst:g}); "
            "nothing was written"
        )


def verify_quality(
    staging: Path,
    source: Path,
    windows: torch.Tensor | None,
    recipe: Recipe,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
    policies: dict[str, AttentionPolicy] | None = None,
    cache: CachePolicy | None = None,
    offload: Path | None = None,
) -> dict[str, Any] | None:
    """Perplexity, KL and agreement of the written directory, run by `policies` and `cache`, against the base model.

    offload: a folder says that weights wait on the disk, and come to the device module by module.
    """
    if windows is None:
        return None
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "offload": offload}
    how["device_map"] = "disk" if offload is not None else None if device.type == "cpu" else {"": str(device)}
    compressed, base = load_written(staging, **how), load_base(source, **how)
    if offload is not None:
        execute_on(compressed, device)
        execute_on(base, device)
    options = recipe.evaluation
    with running(compressed, policies or {}, cache):
        return {
            "text": describe_text(options, read_text(options.text)[1], windows),
            **measure_text(compressed, base, windows, options, progress),
        }
