"""Loading and saving through transformers: base models, tokenizers, and directories that kompakt wrote."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..quant.method import matches
from .coverage import experts_of
from .hf_quantizer import KompaktConfig, mark_quantized, unmark_quantized
from .hf_stored import check_config, check_stored

COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "*.model",
)
"""Files copied from the base model beside the weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(model: str | Path, *, what: str = "model", weights: bool = True) -> Path:
    """Local directory of a model: the directory itself, or a snapshot of a hub id. ValueError if there is none.

    Only safetensors are accepted: a directory with nothing but pickled weights is refused, because reading pickles runs
    code.
    weights: False asks for the config alone; no weights need to be there, and none are downloaded.
    """
    path = Path(model)
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{what} {path} is a file; give the directory that holds config.json")
        path = _snapshot(str(model), what, weights)
    if not (path / "config.json").is_file():
        raise ValueError(f"{what} {path} holds no config.json; it is not a Hugging Face model directory")
    if weights and not any(path.glob("*.safetensors")):
        if any(item for pattern in PICKLES for item in path.glob(pattern)):
            raise ValueError(
                f"{what} {path} has only pickled weights; convert them to safetensors first (pickles can run code)"
            )
        raise ValueError(f"{what} {path} holds no *.safetensors weights")
    return path


def _snapshot(name: str, what: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{what} {name} does not exist")
    try:
        wanted = ["*.json", "*.py", "*.safetensors", *COMPANIONS] if weights else ["config.json"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{what} {name!r} is neither a directory nor a model that the hub can give: {reason}"
        ) from error


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's config. ValueError with one sentence if it cannot be read or its architecture is unknown."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config is data: whatever transformers stumbles over is its fault
        raise ValueError(f"{path}/config.json cannot be used: {_first_sentence(error)}") from error


def load_base(
    path: Path,
    *,
    device_map: Any = None,
    offload: Path | None = None,
    trust_remote_code: bool = False,
    separate_but: Collection[str] | None = None,
) -> PreTrainedModel:
    """The float model as stored, in evaluation mode, without gradients.

    device_map: None loads to the CPU; "disk" leaves the weights in the checkpoint until a layer needs them; anything
    else is accelerate's. offload: folder for weights that must be converted before they can stay on disk. separate_but:
    patterns; mixtures of experts, unless these match all of them, are taken apart (`hf_experts`) before their weights
    are there, if these are stored so.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path} is already quantized; kompakt starts from a float checkpoint")
    options = placement(device_map, offload)
    mixtures = [] if separate_but is None else experts_of(meta_model(config, trust_remote_code=trust_remote_code))
    if all(matches(name, separate_but or ()) for name in mixtures):
        return _from_pretrained(path, config=config, trust_remote_code=trust_remote_code, **options)
    config.quantization_config = KompaktConfig([], []).in_memory()
    model = _from_pretrained(path, config=config, trust_remote_code=trust_remote_code, **options)
    unmark_quantized(model)
    return model


def placement(device_map: Any, offload: Path | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for where the weights go; see `load_base`."""
    options: dict[str, Any] = {} if offload is None else {"offload_folder": str(offload)}
    if device_map is not None:
        options["device_map"] = {"": "disk"} if device_map == "disk" else device_map
    return options


def _from_pretrained(path: Path, **options: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {_first_sentence(error)}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ValueError(f"a safetensors file in {path} is damaged: {error}") from error
        raise
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        names = missing or sorted(str(item) for item in info["mismatched_keys"])
        raise ValueError(
            f"{path} lacks {len(names)} of the model's tensors, e.g. {names[0]}; it would run with random weights"
        )
    return model.eval().requires_grad_(False)


def load_compressed(
    path: Path, *, device_map: Any = None, offload: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A directory in the compressed-tensors layout, with its weights left packed. Placement as in `load_base`."""
    config = read_config(path, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        raise ValueError(f"{path}/config.json has no quantization_config; it was not written by kompakt")
    config.quantization_config = KompaktConfig.from_compressed_tensors(stored).in_memory()
    options = placement(device_map, offload)
    return _from_pretrained(path, config=config, trust_remote_code=trust_remote_code, **options)


def read_written_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a directory that kompakt wrote, or says so. ValueError if it cannot be used or must not be."""
    check_config(path, trust_remote_code=trust_remote_code)
    return read_config(path, trust_remote_code=trust_remote_code)


def load_written(
    path: Path, *, device_map: Any = None, offload: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a directory that kompakt wrote, whether its weights are packed or float; attention as transformers
    has it. Placement as in `load_base`.
    """
    config = read_written_config(path, trust_remote_code=trust_remote_code)
    check_stored(path, config, lambda plain: meta_model(plain, trust_remote_code=trust_remote_code))
    read = load_base if getattr(config, "quantization_config", None) is None else load_compressed
    return read(path, device_map=device_map, offload=offload, trust_remote_code=trust_remote_code)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # its files are data, and the library behind it raises plain Exceptions
        raise ValueError(f"{path} holds no usable tokenizer: {_first_sentence(error)}") from error


def save_weights(
    model: PreTrainedModel, source: Path, target: Path, scheme: Any, kept: list[str], max_shard_size: str
) -> None:
    """Writes weights, config and generation config; copies tokenizer, chat template and licence of the base model.

    scheme: None for float weights, written as they are. kept: Linears that were not quantized.
    """
    if scheme is not None:
        mark_quantized(model, scheme, kept)
    model.save_pretrained(target, max_shard_size=max_shard_size)
    for pattern in (*COMPANIONS, "generation_config.json", "LICENSE*"):
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".safetensors"):
                shutil.copyfile(file, target / file.name)
    _for_older_readers(target / "config.json")


def _for_older_readers(file: Path) -> None:
    """Adds `rope_theta` and `torch_dtype`, which transformers 4 reads instead of `rope_parameters` and `dtype`."""
    config = json.loads(file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def meta_model(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without weights, from its config alone."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # nothing is allocated on the meta device: the config is at fault
        raise ValueError(f"config.json describes no causal language model: {_first_sentence(error)}") from error


def quiet_transformers() -> None:
    """Silences the progress bars and the advice of transformers and, where stderr is not a terminal, of the hub."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def transformers_version() -> str:
    """Version that wrote or reads an artifact."""
    return transformers.__version__


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split()) if lines else ""
    return text[:300] if text else type(error).__name__
