"""The model card: hub metadata, sizes, quality, coverage, how to load it. Every number comes from the run that wrote
it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ..kernels.attention import MODES
from ..quant.method import AttentionPolicy
from ..sparsify.method import SparsityPolicy
from .artifact import read_policies
from .cache_methods import kv_cache_methods
from .expert_calibration import expert_sentence
from .experts import ONLY_KOMPAKT
from .layer_policies import arithmetic_of, sparsity_of
from .recipe import Recipe

TEMPLATE = """\
---
{{ metadata }}---
# {{ title }}

`{{ base_model }}` compressed with kompakt {{ report.kompakt }}, recipe `{{ recipe.name }}`
({{ scheme or "weights as they are" }}).{% if recipe.description %} {{ recipe.description }}.{% endif %}

| | base | compressed |
|---|---|---|
| weights on disk | {{ megabytes(sizes.base_bytes) }} | {{ megabytes(sizes.compressed_bytes) }} |
{%- if sizes.bits_per_weight %}
| bits per quantized weight, scales included | | {{ "%.3f"|format(sizes.bits_per_weight) }} |
{%- endif %}
{%- if comparison %}
| perplexity | {{ spread(comparison.base.perplexity, comparison.base.perplexity_stderr, ".3f") }} | \
{{ spread(comparison.model.perplexity, comparison.model.perplexity_stderr, ".3f") }} |
| perplexity increase | | {{ percent(comparison.perplexity_increase, comparison.perplexity_increase_stderr, "+.2f") }} |
| mean KL to the base, nats per token | | {{ spread(comparison.kl, comparison.kl_stderr, ".4f") }} |
| same most likely token | | {{ percent(comparison.top1_agreement, comparison.top1_agreement_stderr, ".2f") }} |

Measured on {{ evaluation.text.source }}, {{ evaluation.text.windows }} windows of {{ evaluation.text.window }} tokens,
stride {{ evaluation.text.stride }}
{%- if evaluation.text.prompt_tokens is defined -%}
, scored behind the first {{ evaluation.text.prompt_tokens }} of each
{%- endif %}; ± is the standard error, of the increase that of the paired difference.
{%- if evaluation_sentence %} {{ evaluation_sentence }}{% endif %}
{%- if cache_evaluation %} {{ cache_evaluation }}{% endif %}
{%- endif %}
{% if report.calibration %}
{%- set calibration = report.calibration %}
Calibrated on {{ calibration.samples }} × {{ calibration.length }} tokens of {{ calibration.source }}.
{%- if experts %} {{ experts }}.{% endif %}
{% endif %}
{%- if report.layers %}
{%- set worst = report.layers|sort(attribute="error")|last %}
The layer whose output changed most is `{{ worst.name }}`, by a relative error of {{ "%.3g"|format(worst.error) }} on \
{% if report.calibration %}calibration text{% else %}random tokens{% endif %}.
{% endif %}
Written on {{ report.environment.device }} with torch {{ report.environment.torch }} and transformers \
{{ report.environment.transformers }}. `kompakt verify PATH` checks these files, `kompakt report PATH` \
shows all that is known about them.

## Use
With kompakt, {{ use }}:
```python
from kompakt.compress import load
model = load("PATH")
```
{% if alone -%}
No other reader: the experts of this model are stored one by one, where others want them fused.
{%- elif scheme -%}
Stock transformers with the package `compressed-tensors` installed loads the same directory with
`AutoModelForCausalLM.from_pretrained` (weights are expanded to floats on first use
{%- if attention %}, attention is dense{% endif %}{% if cache %}, its cache is that of transformers{% endif %}).
{%- else -%}
Stock transformers loads the same directory with `AutoModelForCausalLM.from_pretrained` as the base model.
{%- endif %}

{% if attention -%}
## Attention
Calls of at least {{ "{:,}".format(attention[0].min_tokens) }} queries; shorter ones, and decoding, are dense.

| runs in | layers | cosine, least | relative L1, largest | SQNR in dB, least |
|---|---|---|---|---|
{% for row in attention -%}
| {{ row.mode }} | {{ row.count }} | {{ row.cosine }} | {{ row.relative_l1 }} | {{ row.sqnr_db }} |
{% endfor %}
{{ judged }}

{% endif -%}
{% if sparsity -%}
## Sparse prefill
{{ sparsity }}

{% endif -%}
{% if cache -%}
## Key-value cache
{{ cache }}

{% endif -%}
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
    policies = read_policies(report)
    metadata = {
        "base_model": base_name(report["base_model"], inherited),
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": inherited.get("pipeline_tag", "text-generation"),
        **({"license": inherited["license"]} if "license" in inherited else {}),
        **({"language": inherited["language"]} if "language" in inherited else {}),
        "tags": ["kompakt", *(["compressed-tensors"] if recipe.weights is not None else []), recipe.name],
    }
    environment = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=f"{Path(report['base_model']).name} {recipe.name}",
        base_model=metadata["base_model"],
        recipe=recipe,
        scheme=None if recipe.weights is None else recipe.weights.describe(),
        use=in_use(recipe),
        alone=ONLY_KOMPAKT in (staging / "config.json").read_text("utf-8"),
        experts=expert_sentence(report["layers"]),
        attention=attention_rows(arithmetic_of(policies)),
        judged=judged_sentence(arithmetic_of(policies)),
        sparsity=sparsity_sentence(sparsity_of(policies)),
        evaluation_sentence=attention_sentence((evaluation or {}).get("attention")),
        cache=cache_sentence(report.get("kv_cache"), (evaluation or {}).get("kv_cache")),
        cache_evaluation=cache_evaluation_sentence((evaluation or {}).get("kv_cache")),
        report=report,
        sizes=report["sizes"],
        evaluation=evaluation,
        comparison=(evaluation or {}).get("comparison"),
        coverage=coverage_rows(report["coverage"]),
        spread=spread,
        percent=percent,
        megabytes=lambda count: f"{count / 1e6:,.1f} MB",
    )
    (staging / "README.md").write_text(text, "utf-8")


def spread(value: float, stderr: float | None, form: str) -> str:
    """``value ± standard error``."""
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:{form.removeprefix('+')}}"


def percent(value: float, stderr: float | None, form: str) -> str:
    """A share as ``x ± y %``."""
    return f"{spread(100 * value, None if stderr is None else 100 * stderr, form)} %"


def in_use(recipe: Recipe) -> str:
    """What kompakt does with the directory."""
    parts = []
    if recipe.weights is not None:
        parts.append("weights stay packed and run on its kernels")
    if recipe.attention is not None:
        parts.append("attention of long prompts runs in the arithmetic chosen below")
    if recipe.sparsity is not None:
        parts.append("prefill of long prompts visits the keys described below")
    if recipe.kv_cache is not None:
        parts.append("`generate()` keeps past keys and values compressed")
    return ", and ".join(parts)


def attention_rows(policies: dict[str, AttentionPolicy]) -> list[dict[str, Any]]:
    """Attention layers grouped by arithmetic: mode, count, min_tokens, and the worst figures of the layers as text."""
    rows = []
    for mode in MODES:
        group = [policy for policy in policies.values() if policy.mode == mode]
        figures = [policy.tried[mode] for policy in group if mode in policy.tried]
        decibels = [item.sqnr_db for item in figures if item.sqnr_db is not None]
        if group:
            rows.append(
                {
                    "mode": "dense" if mode == "bf16" else mode,
                    "count": len(group),
                    "min_tokens": group[0].min_tokens,
                    "cosine": f"{min(item.cosine for item in figures):.5f}" if figures else "",
                    "relative_l1": f"{max(item.relative_l1 for item in figures):.4f}" if figures else "",
                    "sqnr_db": f"{min(decibels):.1f}" if decibels else "",
                }
            )
    return rows


def judged_sentence(policies: dict[str, AttentionPolicy]) -> str:
    """On what the layers were judged."""
    tokens = max((policy.tokens for policy in policies.values()), default=0)
    if not tokens:
        return "The recipe names the arithmetic; layers were not judged."
    return f"Each layer was judged on {tokens:,} tokens of the calibration text against exact attention."


def attention_sentence(used: dict[str, Any] | None) -> str:
    """Whether attention ran quantized in an evaluation, and how it runs in use; empty for a model as transformers has
    it.
    """
    if used is None:
        return ""
    calls = ", ".join(f"{count} × {way}" for way, count in used["calls"].items())
    text = f"Attention ran {used['ran']} in this evaluation ({used['layers']} layers; calls: {calls})"
    if "quantized" in used["ran"] and used["min_tokens"] > used["window"]:
        text += f"; in use, windows this short run dense, below {used['min_tokens']:,} queries"
    sparse = used.get("sparsity")
    if sparse is not None and sparse["density"] is not None:
        text += f"; sparse layers ({sparse['layers']}) visited {sparse['density']:.1%} of the tiles of dense attention"
        if sparse["min_length"] > used["window"]:
            text += f", and in use visit all below {sparse['min_length']:,} keys"
    return f"{text}."


def sparsity_sentence(policies: dict[str, SparsityPolicy]) -> str:
    """Which keys prefill visits; empty if the recipe leaves that alone."""
    if not policies:
        return ""
    sparse = [policy for policy in policies.values() if policy.sparse]
    if not sparse:
        return "No layer is sparse."
    kinds = Counter(head.key for policy in sparse for head in policy.heads)
    heads = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    text = (
        f"{len(sparse)} of {len(policies)} attention layers visit fewer keys in calls over "
        f"{sparse[0].min_length:,} keys and more; shorter ones, and decoding, are dense. Their heads: {heads}."
    )
    figures = [policy.figures for policy in sparse if policy.figures is not None]
    if figures:
        density, recall = (sum(getattr(item, key) for item in figures) / len(figures) for key in ("density", "recall"))
        length = max(policy.calibrated_length for policy in sparse)
        text += (
            f" On {figures[0].tokens:,} tokens of calibration text"
            f"{' that they were not chosen on' if figures[0].held_out else ', which they were chosen on'}, a layer "
            f"visits {density:.1%} of the tiles and {recall:.1%} of the probability on average; the largest error of a "
            f"layer's output is {max(item.error for item in figures):.3f} of its size."
        )
        if length:
            text += f" Budgets are for {length:,} tokens and grow with longer prompts."
    return text


def cache_sentence(content: dict[str, Any] | None, measured: dict[str, Any] | None) -> str:
    """How the key-value cache is kept; empty if the recipe leaves it alone. content: of the sidecar."""
    if content is None:
        return ""
    text = (
        f"`{content['method']}` in {len(content['layers'])} layers; the first {content['sink_tokens']} tokens and at "
    )
    text += f"least the last {content['recent_tokens']} stay dense."
    if "scores" in content:
        sizes = {"ratio": "{}× fewer", "tokens": "{} tokens per head", "threshold": "scores from {} on"}
        size = next(form.format(content[name]) for name, form in sizes.items() if content[name] is not None)
        most = content.get("decode_budget")
        later = "later tokens all stay" if most is None else f"generated ones too, {most:,} tokens per head in all"
        text += (
            f" Of the other tokens of a first prompt every KV head keeps its own, chosen by {content['scores']}, "
            f"budget {content['budget']} ({size}); {later}."
        )
    if any(content["layers"].values()):
        text += f" {kv_cache_methods()[content['method']].calibrated}"
    if content["max_tokens"] is not None:
        text += f" Sequences of more than {content['max_tokens']:,} tokens are refused."
    if measured is not None and measured["bits_per_element"] is not None:
        text += f" Coded tokens take {measured['bits_per_element']:.3f} bits per element, scales included."
    return text


def eviction_sentence(measured: dict[str, Any] | None) -> str:
    """What a cache that evicts did in an evaluation; empty for another. measured: of `eviction_in_use`."""
    if measured is None:
        return ""
    kind = "query-agnostic" if measured["query_agnostic"] else "query-aware where a prompt holds the question"
    text = f"Eviction by {measured['scores']} ({kind}), budget {measured['budget']}: "
    if not measured["evicted_prompts"]:
        return f"{text}NO prompt was long enough to be evicted from."
    return (
        f"{text}of {measured['evicted_prompts']:,} of {measured['prompts']:,} prompts; {measured['kept']:.1%} of their "
        f"tokens were kept, in {measured['allocated']:.1%} of a dense cache's bytes, all that is allocated counted."
    )


def cache_evaluation_sentence(measured: dict[str, Any] | None) -> str:
    """Whether an evaluation read the compressed cache; empty for a model with a cache as transformers has it."""
    if measured is None:
        return ""
    if not measured["positions"]:
        return "The compressed cache was not read in this evaluation."
    if measured["protocol"] == "chunks":
        text = f"Text went through the compressed cache {measured['chunk']} tokens at a time; "
    else:
        prompt = measured["prompt_tokens"]
        first = "What comes before" if prompt is None else f"The first {prompt:,} tokens of a window"
        text = (
            f"{first} went in as one prompt, attended to exactly, and what was scored through the compressed cache, at "
            f"most {measured['chunk']} tokens at a time; "
        )
    if not measured["reading_codes"]:
        return f"{text}NO position had coded tokens to read, the sequences are too short: this measured a dense cache."
    text += f"{measured['reading_codes']:,} of {measured['positions']:,} positions had coded tokens to read."
    return f"{text} {eviction_sentence(measured.get('eviction'))}".rstrip()


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
