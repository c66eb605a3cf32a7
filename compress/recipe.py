"""YAML ⇄ `Recipe`: four slots, calibration, evaluation and limits. Unknown keys and values are errors that name the
nearest.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_serializer,
    model_validator,
)

from ..quant.method import (
    AttentionMethod,
    KVCacheMethod,
    WeightMethod,
    attention_methods,
    weight_methods,
)
from ..sparsify.method import SparsityMethod, sparsity_methods
from .cache_methods import kv_cache_methods
from .calibration import CalibrationOptions

RECIPE_VERSION = 1
YAML_BYTES = 2**20
BOOL = "tag:yaml.org,2002:bool"
SHOWN = 200
"""Characters of a wrong value that a message repeats."""
METHODS = {
    "weights": weight_methods,
    "attention": attention_methods,
    "kv_cache": kv_cache_methods,
    "sparsity": sparsity_methods,
}
"""Slot → its methods by key."""
SLOTS = tuple(METHODS)
Method = WeightMethod | AttentionMethod | KVCacheMethod | SparsityMethod


def percent(value: Any) -> Any:
    """``"3%"`` → 0.03; numbers stay as they are."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*\+?([0-9]*\.?[0-9]+)\s*(%?)\s*", value)
        if not match:
            raise ValueError(f"{value!r} is neither a number nor a percentage such as 3%")
        return float(match[1]) / (100 if match[2] else 1)
    return value


class EvaluationOptions(BaseModel):
    """What the compressed model is compared on. text: "builtin" (held-out part of the Python reference) or a .txt file.

    windows: how many windows of `window` tokens; 0 skips the comparison. stride: tokens between windows, default
    `window`. cache_protocol: how a compressed cache is fed, "chunks" or "decode" (`cache_evaluation.py`); "decode"
    scores what follows the first prompt_tokens of a window, default half of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = "builtin"
    window: Annotated[int, Field(ge=2)] = 2048
    stride: Annotated[int, Field(ge=1)] | None = None
    windows: Annotated[int, Field(ge=0)] = 8
    cache_protocol: Literal["chunks", "decode"] = "chunks"
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> EvaluationOptions:
        if self.cache_protocol == "chunks" and self.prompt_tokens is not None:
            raise ValueError("prompt_tokens is for cache_protocol decode; cache_protocol is chunks")
        if self.prompt > self.window - 2:
            raise ValueError(
                f"a prompt of {self.prompt} tokens leaves nothing to score in a window of {self.window}; it must be "
                "shorter by 2 at least"
            )
        return self

    @property
    def prompt(self) -> int:
        """Tokens of a window that go in at once and are not scored."""
        if self.cache_protocol == "chunks":
            return 0
        return self.window // 2 if self.prompt_tokens is None else self.prompt_tokens


def evaluation_options(**fields: Any) -> EvaluationOptions:
    """`EvaluationOptions`, what is wrong with them in one sentence."""
    try:
        return EvaluationOptions(**fields)
    except ValidationError as error:
        raise ValueError(explain(error, "evaluation", EvaluationOptions)) from error


class Limits(BaseModel):
    """Quality budget. perplexity_increase: relative, 0.03 or "3%"; max_restored: share of layers that may be given
    back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    perplexity_increase: Annotated[float, BeforeValidator(percent), Field(gt=0)] | None = None
    max_restored: Annotated[float, BeforeValidator(percent), Field(ge=0, le=1)] = 0.5


class Recipe(BaseModel):
    """A whole recipe. Slots hold a method object (from `quant` or `sparsify`) or None."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    version: Literal[1] = RECIPE_VERSION
    name: str = "custom"
    description: str = ""
    weights: WeightMethod | None = None
    attention: AttentionMethod | None = None
    kv_cache: KVCacheMethod | None = None
    sparsity: SparsityMethod | None = None
    calibration: CalibrationOptions = CalibrationOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check_protocol(self) -> Recipe:
        if self.kv_cache is None and self.evaluation.cache_protocol != "chunks":
            raise ValueError(
                f"evaluation.cache_protocol {self.evaluation.cache_protocol} is a way to read a compressed cache, and "
                "the recipe fills no slot kv_cache; leave it out"
            )
        return self

    @field_serializer(*METHODS)
    def _write_method(self, method: Method | None) -> dict | None:
        if method is None:
            return None
        options = TypeAdapter(type(method)).dump_python(method, mode="json")
        if "overrides" in options:
            found = [{key: value for key, value in item.items() if value is not None} for item in options["overrides"]]
            options["overrides"] = found
        if not options.get("overrides", True):
            del options["overrides"]
        return {"method": method_key(method), **options}

    @property
    def needs_data(self) -> bool:
        """Whether any slot looks at calibration text."""
        return any(method.needs_data for slot in SLOTS if (method := getattr(self, slot)) is not None)

    def to_yaml(self) -> str:
        """The recipe with every default written out, but no empty list of overrides; `Recipe.load` reads it back to an
        equal recipe.
        """
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, source: str | Path | dict | Recipe, overrides: dict[str, Any] | None = None) -> Recipe:
        """A recipe by name (see `recipe_names`), YAML file, dict or object.

        overrides: dotted keys, e.g. ``{"weights.group_size": 64}``, applied over the file. ValueError for anything
        unknown.
        """
        if isinstance(source, Recipe):
            data, label = source.model_dump(mode="json", exclude_none=True), source.name
        elif isinstance(source, dict):
            data, label = source, "recipe"
        else:
            data, label = _read(source)
        data = _overridden(data, overrides or {})
        slots = {key: value for key, value in data.items() if key in SLOTS and value is not None}
        data = {key: value for key, value in data.items() if key not in SLOTS}
        if not isinstance(data.get("version", 1), int) or data.get("version", 1) > RECIPE_VERSION:
            raise ValueError(
                f"{label}: recipe version {shown(data.get('version'))} is not supported; this kompakt reads version 1"
            )
        if not slots:
            raise ValueError(f"{label}: the recipe fills no slot; fill one of {', '.join(SLOTS)}")
        try:
            return cls(**data, **{slot: _method(slot, content, label) for slot, content in slots.items()})
        except ValidationError as error:
            raise ValueError(explain(error, label, cls)) from error


def method_key(method: Method) -> str:
    """Key of a method object: the name of its file."""
    return type(method).__module__.rpartition(".")[2]


def recipe_names() -> list[str]:
    """Recipes that ship with kompakt."""
    return sorted(
        item.name[:-5] for item in resources.files("kompakt.recipes").iterdir() if item.name.endswith(".yaml")
    )


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def nearest(word: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` and the list of what exists."""
    close = difflib.get_close_matches(str(word)[:SHOWN], known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def _read(source: str | Path) -> tuple[dict, str]:
    path = Path(source)
    if str(source) in recipe_names():
        return _mapping((resources.files("kompakt.recipes") / f"{source}.yaml").read_text("utf-8"), source), str(source)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ValueError(f"unknown recipe {str(source)!r}{nearest(str(source), recipe_names())}")
    if not path.is_file():
        raise ValueError(f"recipe file {path} does not exist")
    return read_yaml(path), str(path)


def read_yaml(path: Path) -> dict:
    """The mapping in a recipe file. ValueError, in one sentence, for anything else."""
    if path.stat().st_size > YAML_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, a recipe at most {YAML_BYTES:,}")
    try:
        return _mapping(path.read_text("utf-8"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


class _Loader(yaml.SafeLoader):
    """YAML without anchors, a few lines of which unfold to gigabytes as soon as they are written out; and true and
    false are the only words for truth values, as in YAML 1.2, so that off and on are what an option calls them.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, pattern) for tag, pattern in known if tag != BOOL]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read in a recipe")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def yaml_value(text: str) -> Any:
    """A value as a recipe file would hold it; the text itself if it is none, as the 31st of February is no date."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text


def _mapping(text: str, label: str | Path) -> dict:
    try:
        data = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError(f"{label} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{label} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{label} does not hold a mapping of recipe keys")
    return data


def _overridden(data: dict, overrides: dict[str, Any]) -> dict:
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for dotted, value in overrides.items():
        head, _, key = dotted.partition(".")
        if not key:
            data[head] = value
            continue
        if head in SLOTS and isinstance(data.get(head), str):
            data[head] = {"method": data[head]}
        if not isinstance(data.setdefault(head, {}), dict):
            raise ValueError(f"{dotted} cannot be set: {head} is not a mapping in the recipe")
        data[head][key] = value
    return data


def _method(slot: str, content: Any, label: str) -> Any:
    methods = METHODS[slot]()
    if isinstance(content, str):
        content = {"method": content}
    if not isinstance(content, dict) or "method" not in content:
        raise ValueError(f"{label}: {slot} needs a `method` (known: {', '.join(methods)})")
    key = content["method"]
    if not isinstance(key, str) or key not in methods:
        raise ValueError(f"{label}: unknown method {shown(key)} in slot {slot}{nearest(key, list(methods))}")
    options = {name: value for name, value in content.items() if name != "method"}
    try:
        return TypeAdapter(methods[key]).validate_python(options)
    except ValidationError as error:
        raise ValueError(explain(error, f"{label}: {slot} ({key})", methods[key])) from error


def _member(owner: Any, part: str | int) -> Any:
    """Type of what `owner`, a model, a dataclass or a tuple type, holds under a field's name or an index."""
    if isinstance(part, int):
        return get_args(owner)[0]
    return owner.model_fields[part].annotation if hasattr(owner, "model_fields") else get_type_hints(owner)[part]


def explain(error: ValidationError, label: str, owner: type) -> str:
    """The first validation error as one sentence that says the bad value, the rule and the nearest valid key."""
    first = error.errors()[0]
    place = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-", "literal["))
    )
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, key = first["loc"]
        for parent in parents:
            owner = _member(owner, parent)
        known = list(getattr(owner, "model_fields", None) or [item.name for item in fields(owner)])  # pyright: ignore
        return f"{label}: unknown key {shown(place)}{nearest(str(key), known)}"
    rule = first["msg"].removeprefix("Value error, ")
    if not place:
        return f"{label}: {rule}"
    return f"{label}: {place[:SHOWN]} = {shown(first['input'])} is not valid: {rule[:1].lower()}{rule[1:]}"
