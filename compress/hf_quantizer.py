"""transformers' side of our weights: the quantization config and the quantizer that swaps Linears before loading.

On disk the config reads as compressed-tensors, so that stock transformers and vLLM load the weights; in memory `load`
puts `KompaktConfig` in its place and weights stay packed. Importing this module registers the quantizer and nothing
else.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quant.method import WeightScheme
from .coverage import is_ignored
from .linear import CompressedLinear
from .shared_input import share_inputs, unshare_inputs

QUANT_METHOD = "kompakt"
FORMATS = {"int4": "pack-quantized", "fp8": "float-quantized"}
FP8_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


class KompaktConfig(QuantizationConfigMixin):
    """Scheme and kept Linears. `to_dict` writes the compressed-tensors form, `from_compressed_tensors` reads it."""

    def __init__(self, scheme: WeightScheme | dict[str, Any], ignore: list[str], **_: Any):
        self.quant_method: Any = QUANT_METHOD
        self.scheme = WeightScheme(**scheme) if isinstance(scheme, dict) else scheme
        self.ignore = ignore

    def in_memory(self) -> dict[str, Any]:
        """What stands in a loaded config while transformers looks for the quantizer."""
        return {"quant_method": QUANT_METHOD, "scheme": asdict(self.scheme), "ignore": self.ignore}

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` of config.json, compressed-tensors."""
        return compressed_tensors_config(self.scheme, self.ignore)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: everything is written."""
        return self.to_dict()

    @classmethod
    def from_compressed_tensors(cls, config: dict[str, Any]) -> Any:
        """Reads what `compressed_tensors_config` wrote. ValueError for a layout that kompakt does not run."""
        groups = config.get("config_groups")
        if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or len(groups) != 1:
            raise ValueError(
                "quantization_config is not a compressed-tensors config with one group, as kompakt writes it"
            )
        group = next(iter(groups.values()))
        weights = group.get("weights") if isinstance(group, dict) else None
        inputs = group.get("input_activations") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError("quantization_config has a group that does not describe weights")
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError("quantization_config has an ignore that is no list of names")
        if any(name.startswith("re:") for name in ignore):
            raise ValueError("quantization_config ignores by patterns; kompakt writes the names of Linears")
        kinds: list[tuple[tuple[str, int], Any]] = [(("int", 4), "int4"), (("float", 8), "fp8")]
        kind = next((kind for form, kind in kinds if form == (weights.get("type"), weights.get("num_bits"))), None)
        size = weights.get("group_size")
        sized = size is None or (kind == "int4" and type(size) is int and size >= 1)
        if kind is None or not sized or weights.get("symmetric") is not True or inputs not in (None, FP8_INPUTS):
            described = f"quantization_config stores {weights} with inputs {inputs}"
            raise ValueError(f"{described[:400]}, which kompakt does not run")
        return cls(WeightScheme(kind, size, "none" if inputs is None else "fp8"), list(ignore))


def compressed_tensors_config(scheme: WeightScheme, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` that describes `scheme` to compressed-tensors. ignore: Linears that were kept."""
    weights: dict[str, Any] = (
        {"num_bits": 4, "type": "int"} if scheme.weights == "int4" else {"num_bits": 8, "type": "float"}
    )
    weights |= {"symmetric": True, "strategy": "channel", "dynamic": False}
    if scheme.group_size is not None:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    group = {
        "targets": ["Linear"],
        "format": FORMATS[scheme.weights],
        "weights": weights,
        "input_activations": FP8_INPUTS if scheme.activations == "fp8" else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme.weights],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


def swap_linears(model: nn.Module, scheme: WeightScheme, ignore: list[str]) -> None:
    """Puts an empty `CompressedLinear` on the meta device in the place of every Linear that `ignore` does not name.

    ValueError for a Linear that the scheme's groups do not divide.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or is_ignored(name, ignore):
            continue
        if scheme.group_size is not None and module.in_features % scheme.group_size:
            raise ValueError(
                f"quantization_config has group_size {scheme.group_size}, which does not divide the "
                f"{module.in_features} inputs of {name}"
            )
        model.set_submodule(name, CompressedLinear.instead_of(module, scheme, torch.device("meta")))


class KompaktQuantizer(HfQuantizer):
    """Puts `CompressedLinear` where the checkpoint holds packed weights; transformers' loader then fills them."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed beyond torch."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        swap_linears(model, config.scheme, config.ignore)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        share_inputs(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors to save, tied ones once: transformers finds ties by storage, which offloaded weights do not
        have.
        """
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return {name: value for name, value in model.state_dict().items() if name not in tied}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed weights are written as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights take no gradient."""
        return False


register_quantization_config(QUANT_METHOD)(KompaktConfig)
register_quantizer(QUANT_METHOD)(KompaktQuantizer)


def mark_quantized(model: Any, scheme: WeightScheme, kept: list[str]) -> None:
    """Tells transformers that `model` holds packed weights, so that `save_pretrained` writes the right config, and lets
    their Linears share quantized inputs.
    """
    config = KompaktConfig(scheme, kept)
    model.config.quantization_config = config
    model.hf_quantizer = KompaktQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    share_inputs(model)


def unmark_quantized(model: Any) -> None:
    """Undoes `mark_quantized`."""
    unshare_inputs(model)
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if name in vars(owner):
            delattr(owner, name)
