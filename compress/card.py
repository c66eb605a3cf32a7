"""The model card: hub metadata, sizes, quality, coverage, how to load it. Every number comes from the run that wrote
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml

from .recipe import Recipe

TEMPLATE = """\
---
{{ metadata }}---
# {{ title }}

`{{ base_model }}` compressed with kompakt {{ report.kompakt }}, recipe `{{ recipe.name }}`
({{ scheme }}).{% if recipe.description %} {{ recipe.description }}.{% endif %}

| | base | compressed |
|---|---|---|
| weights on disk | {{ megabytes(sizes.base_bytes) }} | {{ megabytes(sizes.compressed_bytes) }} |
| bits per quantized weight, scales included | | {{ "%.3f"|format(sizes.bits_per_weight) }} |
{%- if comparison %}
| perplexity | {{ "%.3f"|format(comparison.base.perplexity) }} | {{ "%.3f"|format(comparison.model.perplexity) }} |
| perplexity increase | | {{ "%+.2f"|format(100 * comparison.perplexity_increase) }} % |
| mean KL to the base, nats per token | | {{ "%.4f"|format(comparison.kl) }} |
| same most likely token | | {{ "%.2f"|format(100 * comparison.top1_agreement) }} % |

Measured on {{ evaluation.text.source }}, {{ evaluation.text.windows }} windows of {{ evaluation.text.window }} tokens,
stride {{ evaluation.text.stride }}.
{%- endif %}
{% if report.calibration %}
{%- set calibration = report.calibration %}
Calibrated on {{ calibration.samples }} × {{ calibration.length }} tokens of {{ calibration.source }}.
{% endif %}
## Use
With kompakt, weights stay packed and run on its kernels:
```python
from kompakt.compress import load
model = load("PATH")
```
Stock transformers with the package `compressed-tensors` installed loads the same directory with
`AutoModelForCausalLM.from_pretrained` (weights are expanded to floats on first use).

## What was quantized
| | modules | weights |
|---|---|---|
{% for row in coverage -%}
| {{ row.label }} | {{ row.count }} | {{ "{:,}".format(row.weights) }} |
{% endfor %}
"""


def write_card(
    staging: Path, recipe: Recipe, report: dict[str, Any], evaluation: dict[str, Any] | None, source: Path
) -> None:
    """Writes README.md into `staging`."""
    inherited = base_metadata(source)
    assert recipe.weights is not None
    metadata = {
        "base_model": base_name(report["base_model"], inherited),
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": inherited.get("pipeline_tag", "text-generation"),
        **({"license": inherited["license"]} if "license" in inherited else {}),
        **({"language": inherited["language"]} if "language" in inherited else {}),
        "tags": ["kompakt", "compressed-tensors", recipe.name],
    }
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=f"{Path(report['base_model']).name} {recipe.name}",
        base_model=metadata["base_model"],
        recipe=recipe,
        scheme=recipe.weights.scheme().describe(),
        report=report,
        sizes=report["sizes"],
        evaluation=evaluation,
        comparison=(evaluation or {}).get("comparison"),
        coverage=coverage_rows(report["coverage"]),
        megabytes=lambda count: f"{count / 1e6:,.1f} MB",
    )
    (staging / "README.md").write_text(text, "utf-8")


def base_name(given: str, inherited: dict[str, Any]) -> Any:
    """What `base_model` should say: the hub id that was given, or for a local directory its own card's base, or its
    name.
    """
    return inherited.get("base_model", Path(given).name) if Path(given).is_dir() else given


def base_metadata(source: Path) -> dict[str, Any]:
    """Front matter of the base model's card, empty if it has none or cannot be read."""
    card = source / "README.md"
    if not card.is_file():
        return {}
    parts = card.read_text("utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def coverage_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules grouped by what happened to them: label, count, weights; quantized first."""
    rows: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["status"] != "quantized"):
        label = "quantized" if line["status"] == "quantized" else f"kept: {line['reason']}"
        row = rows.setdefault(label, {"label": label, "count": 0, "weights": 0})
        row["count"] += 1
        row["weights"] += line["parameters"]
    return list(rows.values())
