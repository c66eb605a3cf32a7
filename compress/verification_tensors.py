"""What can be wrong with stored tensors: their headers against a line of the coverage table, and their numbers."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from .hf_quantizer import KompaktConfig
from .untrusted import StoredTensor

DTYPES = {"int4": ("weight_packed", "I32"), "fp8": ("weight", "F8_E4M3")}
"""Storage → (tensor of the codes, dtype)."""
FLOATS = ("F64", "F32", "F16", "BF16")
LAYER = re.compile(r"[^\d]*\.\d+(?=\.)")
EXPERT = re.compile(rf"({LAYER.pattern})\..*\bexperts\.\d+\.")
"""A name of a tensor in a decoder layer, and of one of an expert there; the first group is the layer."""


def line_problems(line: dict[str, Any], stored: dict[str, StoredTensor], packed: KompaktConfig | None) -> list[str]:
    """What is wrong with the tensors of one module, by their headers. line: of the coverage table."""
    name = line["name"]
    if line["status"] == "kept":
        if f"{name}.weight_packed" in stored:
            return [f"{name} is packed, and the coverage table says that it was kept"]
        kept = stored.get(f"{name}.weight")
        if kept is not None and (kept.dtype not in FLOATS or list(kept.shape) != line["shape"]):
            return [f"{name}.weight is {kept.dtype} {list(kept.shape)}, not a float of {line['shape']}"]
        return []
    if packed is None or len(line["shape"]) != 2:
        return [f"{name} is said to be quantized, and config.json says that weights are floats"]
    rows, columns = line["shape"]
    scheme = packed.scheme_of(name)
    codes, dtype = DTYPES[scheme.weights]
    width = -(-columns // 8) if scheme.weights == "int4" else columns
    wanted = {codes: (dtype, (rows, width)), "weight_scale": (None, (rows, scheme.groups(columns)))}
    if scheme.weights == "int4":
        wanted["weight_shape"] = ("I64", (2,))
    problems = []
    for key, (kind, shape) in wanted.items():
        tensor = stored.get(f"{name}.{key}")
        if tensor is None:
            problems.append(f"{name}.{key} is in no file")
        elif tensor.shape != shape or (tensor.dtype != kind if kind else tensor.dtype not in FLOATS):
            problems.append(f"{name}.{key} is {tensor.dtype} {tensor.shape}, not {kind or 'a float of'} {shape}")
    return problems


def unknown_tensors(lines: list[dict[str, Any]], stored: dict[str, StoredTensor]) -> tuple[list[str], int]:
    """Stored tensors that belong to no module of the coverage table, and how many are taken for renamed ones.

    transformers stores some modules under the names of the original checkpoint (`embed_out` for the head of gpt_neox):
    a tensor of the shape of a kept module that has none under its own name is taken for that module's. Mixtures of
    experts, which are one module in memory, are stored expert by expert: all of a layer together must have the weights
    of its mixtures. stored: by names in memory; those that differ in the files are renamed too.
    """
    names = {line["name"] for line in lines}
    owners = {name.rpartition(".")[0] for name in stored}
    free = [line["shape"] for line in lines if line["name"] not in owners and line["parameters"]]
    fused, experts = fused_experts(lines, owners), {}
    unknown, renamed = [], sum(name != tensor.name for name, tensor in stored.items())
    for name, tensor in stored.items():
        if name.rpartition(".")[0] in names:
            continue
        if (found := EXPERT.match(name)) and found[1] in fused and tensor.dtype in FLOATS:
            experts.setdefault(found[1], []).append(name)
        elif list(tensor.shape) in free and tensor.dtype in FLOATS:
            free.remove(list(tensor.shape))
            renamed += 1
        else:
            unknown.append(name)
    for layer, found in experts.items():
        if sum(math.prod(stored[name].shape) for name in found) == fused[layer]:
            renamed += len(found)
        else:
            unknown += found
    return unknown, renamed


def fused_experts(lines: list[dict[str, Any]], owners: set[str]) -> dict[str, int]:
    """Weights of the mixtures of experts that are not stored under their own names, by decoder layer."""
    found: dict[str, int] = {}
    for line in lines:
        layer = LAYER.match(line["name"])
        if layer and len(line["shape"]) == 3 and line["status"] == "kept" and line["name"] not in owners:
            found[layer[0]] = found.get(layer[0], 0) + line["parameters"]
    return found


def tensor_problem(values: torch.Tensor, key: str, shape: list[int] | None) -> str:
    """What is wrong with the numbers of one tensor, empty if nothing is. key: its name within its module; shape: of the
    weight, if that is quantized.
    """
    if values.is_floating_point():
        as_float = values.float() if values.element_size() == 1 else values
        if not bool(as_float.isfinite().all()):
            return "holds NaN or infinite numbers"
        if key == "weight_scale" and not bool(values.ne(0).all()):
            return "holds scales of zero"
    if key == "weight_shape" and shape is not None and values.tolist() != shape:
        return f"is {values.tolist()}, and the weight has the shape {shape}"
    if shape is not None and key in ("weight_packed", "weight") and values.numel() > 1:
        flat = values.contiguous().flatten().view(torch.uint8 if values.element_size() == 1 else values.dtype)
        if bool(flat.eq(flat[0]).all()):
            return "holds codes that are all alike"
    return ""
