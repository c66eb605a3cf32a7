"""transformers' side of our weights: the quantization config and the quantizer that swaps Linears before loading.

On disk the config reads as compressed-tensors, so that stock transformers and vLLM load the weights; in memory `load`
puts `KompaktConfig` in its place and weights stay packed. Importing this module registers the quantizer and nothing
else.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quant.method import WeightScheme, matches
from .coverage import experts_of
from .experts import ONLY_KOMPAKT, separate_experts_of
from .hf_experts import (
    separate_experts,
    stored_fused,
    take_apart_before_loading,
    unpacked_beside_experts,
    without_fusing,
)
from .linear import CompressedLinear
from .shared_input import share_inputs, unshare_inputs

QUANT_METHOD = "kompakt"
FORMATS = {"int4": "pack-quantized", "fp8": "float-quantized"}
MODULE = re.compile(r"\w+(\.\w+)+")
"""A full name of a module, as opposed to a class or a pattern."""
FP8_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


EVERY = ("Linear",)
"""Targets of a group that holds every Linear which is not ignored."""


@dataclass(frozen=True)
class Group:
    """Linears that are stored alike. targets: their full names, or `EVERY`."""

    scheme: WeightScheme
    targets: tuple[str, ...] = EVERY

    @classmethod
    def of(cls, content: Group | dict[str, Any]) -> Group:
        """Itself, or what `asdict` made of one."""
        if isinstance(content, Group):
            return content
        return cls(WeightScheme(**content["scheme"]), tuple(content["targets"]))


class KompaktConfig(QuantizationConfigMixin):
    """How Linears are stored, and which are kept. `to_dict` writes the compressed-tensors form,
    `from_compressed_tensors` reads it. groups: one for `EVERY` Linear, or several that name theirs; none, which no file
    says, only has experts taken apart. only_kompakt: what no other reader finds in the files, empty if they find all.
    """

    def __init__(self, groups: list[Any], ignore: list[str], only_kompakt: str = "", **_: Any):
        self.quant_method: Any = QUANT_METHOD
        self.groups = [Group.of(group) for group in groups]
        self.ignore, self.only_kompakt = ignore, only_kompakt

    def in_memory(self) -> dict[str, Any]:
        """What stands in a loaded config while transformers looks for the quantizer."""
        groups = [asdict(group) for group in self.groups]
        return {
            "quant_method": QUANT_METHOD,
            **{"groups": groups, "ignore": self.ignore, "only_kompakt": self.only_kompakt},
        }

    def scheme_of(self, name: str) -> WeightScheme:
        """How a Linear that is not ignored is stored, by its full name. ValueError if that is not said."""
        for group in self.groups:
            if group.targets == EVERY or name in group.targets:
                return group.scheme
        raise ValueError(f"quantization_config has no group for {name}, and does not ignore it")

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` of config.json, compressed-tensors."""
        content = compressed_tensors_config(self.groups, self.ignore)
        if self.only_kompakt:
            for group in content["config_groups"].values():
                group[ONLY_KOMPAKT] = self.only_kompakt
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: everything is written."""
        return self.to_dict()

    @classmethod
    def from_compressed_tensors(cls, config: dict[str, Any]) -> Any:
        """Reads what `compressed_tensors_config` wrote. ValueError for a layout that kompakt does not run."""
        groups = config.get("config_groups")
        if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict) or not groups:
            raise ValueError("quantization_config is not a compressed-tensors config with groups, as kompakt writes it")
        found = [read_group(group, alone=len(groups) == 1) for group in groups.values()]
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError("quantization_config has an ignore that is no list of names")
        if any(name.startswith("re:") for name in ignore):
            raise ValueError("quantization_config ignores by patterns; kompakt writes the names of Linears")
        only = next((group[ONLY_KOMPAKT] for group in groups.values() if ONLY_KOMPAKT in group), "")
        return cls(found, list(ignore), only if isinstance(only, str) else "")


def read_group(group: Any, *, alone: bool) -> Group:
    """One of `config_groups`. alone: it is the only one, and holds every Linear. ValueError for one that kompakt does
    not run.
    """
    weights = group.get("weights") if isinstance(group, dict) else None
    inputs = group.get("input_activations") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError("quantization_config has a group that does not describe weights")
    kinds: list[tuple[tuple[str, int], Any]] = [(("int", 4), "int4"), (("float", 8), "fp8")]
    kind = next((kind for form, kind in kinds if form == (weights.get("type"), weights.get("num_bits"))), None)
    size = weights.get("group_size")
    sized = size is None or (kind == "int4" and type(size) is int and size >= 1)
    if kind is None or not sized or weights.get("symmetric") is not True or inputs not in (None, FP8_INPUTS):
        described = f"quantization_config stores {weights} with inputs {inputs}"
        raise ValueError(f"{described[:400]}, which kompakt does not run")
    scheme = WeightScheme(kind, size, "none" if inputs is None else "fp8")
    if alone:
        return Group(scheme)
    targets = group.get("targets")
    named = isinstance(targets, list) and all(type(name) is str and MODULE.fullmatch(name) for name in targets)
    if not isinstance(targets, list) or not named:
        raise ValueError("quantization_config has several groups, of which one does not name its Linears")
    return Group(scheme, tuple(targets))


def compressed_tensors_config(groups: list[Group], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` that describes `groups` to compressed-tensors. ignore: Linears that were kept."""
    formats = list(dict.fromkeys(FORMATS[group.scheme.weights] for group in groups))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {f"group_{index}": describe_group(group) for index, group in enumerate(groups)},
    }


def describe_group(group: Group) -> dict[str, Any]:
    """One of `config_groups`."""
    scheme = group.scheme
    weights: dict[str, Any] = (
        {"num_bits": 4, "type": "int"} if scheme.weights == "int4" else {"num_bits": 8, "type": "float"}
    )
    weights |= {"symmetric": True, "strategy": "channel", "dynamic": False}
    if scheme.group_size is not None:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    return {
        "targets": list(group.targets),
        "format": FORMATS[scheme.weights],
        "weights": weights,
        "input_activations": FP8_INPUTS if scheme.activations == "fp8" else None,
        "output_activations": None,
    }


def swap_linears(model: nn.Module, config: KompaktConfig) -> None:
    """Puts an empty `CompressedLinear` on the meta device in the place of every Linear that the config does not ignore,
    those of experts included, which are taken apart unless they are ignored.

    ValueError for a Linear that its groups do not divide, and for a name that is no Linear.
    """
    separate_experts(model, [name for name in experts_of(model) if not matches(name, config.ignore)])
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for group in config.groups:
        if unknown := [name for name in group.targets if group.targets != EVERY and name not in linears]:
            raise ValueError(f"quantization_config has a group for {unknown[0][:120]}, which the model does not have")
    for name, module in linears.items():
        if matches(name, config.ignore):
            continue
        scheme = config.scheme_of(name)
        if scheme.group_size is not None and module.in_features % scheme.group_size:
            raise ValueError(
                f"quantization_config has group_size {scheme.group_size}, which does not divide the "
                f"{module.in_features} inputs of {name}"
            )
        model.set_submodule(name, CompressedLinear.instead_of(module, scheme, torch.device("meta")))


class KompaktQuantizer(HfQuantizer):
    """Puts `CompressedLinear` where the checkpoint holds packed weights; transformers' loader then fills them."""

    requires_calibration = True
    separate = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed beyond torch."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = self.quantization_config
        if config.groups:
            swap_linears(model, config)
        else:
            take_apart_before_loading(model)
        self.separate = bool(separate_experts_of(model))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """How transformers reads the files: without fusing experts where they are taken apart."""
        return without_fusing(weight_conversions) if self.separate else weight_conversions

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


def groups_of(model: nn.Module, scheme: WeightScheme) -> list[Group]:
    """How the packed Linears of a model are stored. scheme: said where there are none."""
    found: dict[WeightScheme, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            found.setdefault(module.scheme, []).append(name)
    if len(found) < 2:
        return [Group(next(iter(found), scheme))]
    return [Group(scheme, tuple(names)) for scheme, names in found.items()]


def mark_quantized(model: Any, scheme: WeightScheme, kept: list[str]) -> None:
    """Tells transformers that `model` holds packed weights, so that `save_pretrained` writes the right config, and lets
    their Linears share quantized inputs. scheme: said where no Linear is packed. kept: Linears that are not packed;
    routers and mixtures of experts that are not are found here.
    """
    ignored = list(dict.fromkeys([*kept, *unpacked_beside_experts(model)]))
    only = "experts, one by one" if any(stored_fused(model, name) for name in separate_experts_of(model)) else ""
    config = KompaktConfig(groups_of(model, scheme), ignored, only)
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
