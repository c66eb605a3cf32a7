"""A checkpoint of unknown origin against its own config, before transformers allocates anything by that config.

`config.json` decides how many modules there are and how large; the files decide how many bytes there can be. Modules
are built on the meta device, and their tensors must have the shapes that the headers say. A tensor that is in no file
under its module's name, not even after transformers' renamings (some are fused of others), has no shape to be compared;
all tensors together may take twice the bytes of the files, which is what float32 in memory takes of bf16 on disk.
Whether all of them were found, `hf._from_pretrained` asks transformers afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..quant.method import matches
from .coverage import experts_of
from .hf_cache_hooks import cache_maker
from .hf_experts import names_in_memory
from .hf_quantizer import KompaktConfig, swap_linears
from .untrusted import StoredTensor, file_inside, read_json, stored_tensors

COUNTED = re.compile(r"num_|n_|.*(layer|expert|head|block|depth)")
"""Names of config keys by which modules or Python lists are made before a size is known."""
MAX_COUNT = 2**20
LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_labels")
FEW = 1024
"""Layers that may be made whatever the files hold: a second or two of work."""
BUFFER_BYTES = 2**24
"""What tables of positions and the like may take in any model, beside the bytes of the files."""


def check_config(path: Path, *, trust_remote_code: bool = False) -> None:
    """ValueError for a `config.json` that is damaged, asks for code from elsewhere, or for absurdly many modules."""
    file = file_inside(path, "config.json", where="the directory")
    content = read_json(file, infinite=True)
    if "transformers_weights" in content:
        raise ValueError(f"{file} names a weight file of its own; kompakt writes none")
    tensors = len(stored_tensors(path))
    for place, value in _numbers_and_words(content):
        key, where = place[-1], ".".join(place)[:120]
        asks = {part.lstrip("_") for part in place} & {"attn_implementation", "experts_implementation"}
        if asks and value is not None and not trust_remote_code:
            raise ValueError(f"{file} asks for {where} {str(value)[:80]!r}; what runs is not up to the directory")
        if type(value) is not int:
            continue
        few = key in LAYER_KEYS or (key.startswith(("num_", "n_")) and "expert" in key)
        limit = max(FEW, tensors) if few else MAX_COUNT if COUNTED.match(key) else 2**40
        if abs(value) > limit:
            raise ValueError(f"{file} has {where} = {str(value)[:30]}; the files hold {tensors} tensors")


def _numbers_and_words(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys that lead there, value) of everything in nested objects and lists that is neither, however deep it is."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*place, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [((*place, str(index)), item) for index, item in enumerate(value)]
        else:
            yield place, value


def check_stored(path: Path, config: Any, build: Callable[[Any], nn.Module]) -> dict[str, StoredTensor]:
    """What the files hold, by names in memory, if it is what the model described by `config` needs; ValueError if it is
    not.

    build: config → modules on the meta device (`hf.meta_model`).
    """
    files = stored_tensors(path)
    skeleton = expected_model(config, build, len(files))
    renamed = names_in_memory(skeleton, files)
    stored = {renamed[name]: tensor for name, tensor in files.items()}
    if len(stored) < len(files):
        raise ValueError(f"the files in {path} hold a tensor under two names")
    tied, held_by = getattr(skeleton, "all_tied_weights_keys", None) or {}, skeleton.state_dict()
    for name in [name for pair in tied.items() for name in pair if name not in held_by]:
        raise ValueError(f"{path}/config.json has {name} packed, and it is shared between two modules")
    needed = {name: tensor for name, tensor in held_by.items() if name not in tied}
    for name, tensor in needed.items():
        if name in stored and stored[name].shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} has shape {stored[name].shape} in {stored[name].file.name}; "
                f"config.json makes it {tuple(tensor.shape)}"
            )
    held = sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()})
    bytes_needed = sum(tensor.numel() * tensor.element_size() for tensor in needed.values())
    tables = sum(tensor.numel() * tensor.element_size() for tensor in skeleton.buffers())
    if bytes_needed > 2 * held or tables > held + BUFFER_BYTES:
        raise ValueError(
            f"{path}/config.json describes {bytes_needed:,} bytes of weights and {tables:,} of tables, "
            f"and the files hold {held:,}"
        )
    return stored


def expected_model(config: Any, build: Callable[[Any], nn.Module], tensors: int) -> nn.Module:
    """The modules that the loader will fill, on the meta device, with `CompressedLinear` where weights are packed.

    tensors: in the files. ValueError if there are fewer than experts, each of which would become modules.
    """
    plain = copy.deepcopy(config)
    quantization = vars(plain).pop("quantization_config", None)
    skeleton = build(plain)
    if quantization is not None:
        packed = KompaktConfig.from_compressed_tensors(quantization)
        mixtures = [skeleton.get_submodule(name) for name in experts_of(skeleton) if not matches(name, packed.ignore)]
        experts = sum(max(map(len, mixture.parameters()), default=0) for mixture in mixtures)
        if experts > tensors:
            raise ValueError(f"config.json has {experts} experts; the files hold {tensors} tensors")
        swap_linears(skeleton, packed)
    return skeleton


def check_statics(model: Any, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """ValueError unless the static tensors of a cache are finite and fit the model's keys and values.

    layers: attention module → tensors, each a single number, (num_kv_heads, head_dim) or (num_kv_heads, …).
    """
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    modules = dict(model.named_modules())
    for name, tensors in layers.items():
        width = getattr(modules.get(name), "head_dim", None)
        for key, tensor in tensors.items():
            shaped = tensor.numel() == 1 or (tensor.ndim >= 2 and tensor.shape[0] == heads)
            # Of more dimensions, what the second one is depends on the codes; `check_cache` makes them.
            fits = width is None or tensor.numel() == 1 or (shaped and (tensor.ndim > 2 or tensor.shape[1] == width))
            if not shaped or not fits or not bool(tensor.float().isfinite().all()):
                raise ValueError(
                    f"{name[:120]}.{key[:40]} has shape {tuple(tensor.shape)}; what a cache keeps is finite numbers "
                    f"for each of {heads} heads{'' if width is None else f' of {width} channels'}"
                )


def check_cache(model: Any) -> None:
    """ValueError unless a patched model's cache can be made of what was stored; nothing to do for one without."""
    maker = cache_maker(model)
    if maker is None:
        return
    try:
        maker.make()
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no cache can be made of the tensors that are stored for it: {reason}") from error
