"""What `kompakt.json` has to look like. Keys that are absent here are left to whoever reads them.

The versions: 1, the only one yet.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Layer(_Part):
    """One decoder layer, see `walk.LayerReport`."""

    name: str
    error: Finite
    seconds: Finite
    notes: dict[str, Any]


class Line(_Part):
    """One module, see `coverage.Coverage`."""

    name: str
    kind: str
    shape: list[Count]
    parameters: Count
    status: Literal["quantized", "kept"]
    reason: str


class Sizes(_Part):
    """Bytes before and after."""

    base_bytes: Count
    compressed_bytes: Count
    quantized_weights: Count
    quantized_bytes: Count
    bits_per_weight: Finite | None


class Calibration(_Part):
    """See `pipeline.describe_calibration`."""

    source: str
    samples: Count
    length: Count
    tokens: Count


class Logits(_Part):
    """See `fingerprint.py`."""

    sha256: Digest
    positions: list[Count]
    ids: list[list[Count]]
    log_probabilities: list[list[Finite]]
    noise: Finite


class Fingerprint(_Part):
    """See `fingerprint.py`."""

    tokens: Annotated[list[Count], Field(min_length=2, max_length=4096)]
    weights: Logits
    slots: Logits | None = None
    moved: Finite | None = None


class Sidecar(_Part):
    """The whole file."""

    version: int
    recipe: dict[str, Any]
    checksums: dict[str, Digest]
    companions: dict[str, Digest] = {}
    kompakt: str | None = None
    base_model: str | None = None
    command: str | None = None
    environment: dict[str, str] | None = None
    calibration: Calibration | None = None
    sizes: Sizes | None = None
    layers: list[Layer] = []
    coverage: list[Line] = []
    attention: dict[str, Any] | None = None
    kv_cache: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    fingerprint: Fingerprint | None = None


def check_sidecar(content: dict[str, Any], where: str) -> None:
    """ValueError, naming the first place that is wrong, unless `content` is a sidecar. where: for the message."""
    try:
        Sidecar.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where} is damaged: {first_error(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is damaged: it is nested too deeply") from error


def first_error(error: ValidationError) -> str:
    """Place and rule of the first error, without the value, which may be of any size."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part)[:60] for part in first["loc"])
    return f"{place}: {first['msg'][:200]}"
