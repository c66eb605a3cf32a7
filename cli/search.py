"""`kompakt search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .session import Session

SearchLimit = Annotated[
    str, typer.Option("--limit", help="What the recipe may lose, e.g. perplexity=+1%.", metavar="MEASURE=+X%")
]
Target = Annotated[
    str,
    typer.Option(
        help="What is to be least: size, bytes of all weights; decode, time of a step; or prefill, time of prompts.",
        metavar="size|decode|prefill",
    ),
]
SearchContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens of a sequence, for decode and prefill; default 8192. With size, caches count too.",
        show_default=False,
    ),
]
SearchBatch = Annotated[
    int | None,
    typer.Option("--batch", help="Sequences of --context at once; default 1.", show_default=False),
]
SearchDevice = Annotated[
    str | None,
    typer.Option(
        "--runs-on",
        help="Reckon times by the ceilings of h200, h100, a100 or l40s, or of a file of `bench linear`; default: "
        "Linears and attention are measured on the CUDA device that is here.",
        metavar="NAME|FILE",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option("--budget-minutes", help="Stop after that long with the best so far; default: no end.", metavar="X"),
]
GroupSizes = Annotated[
    str, typer.Option(help="Group sizes of INT4 to choose from, comma-separated.", metavar="N,channel")
]
SearchText = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="builtin or a text file to measure on; default: windows of the calibration text that calibration does not "
        "draw. Not the text that the result will be reported on.",
        metavar="FILE|builtin",
    ),
]
SearchWindows = Annotated[int, typer.Option("--windows", help="Windows that recipes are measured on.", min=1)]
LossWindows = Annotated[int, typer.Option(help="Further windows, for the losses of single parts.", min=1)]
Rounds = Annotated[int, typer.Option(help="Solutions that are compressed and measured, at most.", min=1)]
RecipeFile = Annotated[
    Path, typer.Option("--output", "-o", help="The recipe; beside it, as .json, all that was measured.", metavar="FILE")
]


def search(
    context: typer.Context,
    model: o.Model,
    limit: SearchLimit,
    target: Target = "size",
    search_context: SearchContext = None,
    batch: SearchBatch = None,
    runs_on: SearchDevice = None,
    recipe: o.Recipe = "w4a16-gptq",
    output: RecipeFile = Path("searched.yaml"),
    budget_minutes: Minutes = None,
    group_sizes: GroupSizes = "32,64,128,channel",
    rounds: Rounds = 6,
    set_: o.Set = None,
    dataset: o.Dataset = None,
    samples: o.Samples = None,
    length: o.Length = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    text: SearchText = None,
    windows: SearchWindows = 16,
    loss_windows: LossWindows = 4,
    evaluation_window: o.EvaluationWindow = None,
    as_json: o.Json = False,
) -> None:
    """Find the smallest or fastest recipe within a loss: every part of MODEL gets its own bits, and what comes out is
    measured.

    --recipe says what rounds to INT4, activations, and how to calibrate. The same command goes on where an earlier one
    was stopped. `kompakt compress MODEL --recipe FILE` then compresses by the result.
    """
    from ..compress.search_options import SearchOptions, parse_limit
    from ..compress.search_results import write_result
    from ..compress.searching import search as library
    from .main import settings
    from .progress import Bar
    from .search_tables import searched

    if evaluation_window is not None and text is None:
        raise typer.BadParameter(
            "--evaluation-window is for windows of --text; others are as long as samples (--max-seq-length)"
        )
    session: Session = context.obj
    flags: dict[str, Any] = {
        "calibration.source": dataset,
        "calibration.samples": samples,
        "calibration.length": length,
        "calibration.batch_size": batch_size,
        "calibration.seed": seed,
        "evaluation.window": evaluation_window,
    }
    options = SearchOptions(
        limit=parse_limit(limit),
        target=target,
        context=search_context,
        batch=batch,
        runs_on=runs_on,
        group_sizes=[o.size(item.strip()) for item in group_sizes.split(",")],
        rounds=rounds,
        minutes=budget_minutes,
        text=text,
        windows=windows,
        loss_windows=loss_windows,
    )
    overrides = {**settings(set_), **{key: value for key, value in flags.items() if value is not None}}
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = library(model, options=options, recipe=recipe, overrides=overrides, output=output, progress=bar)
        write_result(result, output)
    session.show(result, searched, as_json)
    if not as_json:
        session.print(f"written to {output} and {output.with_suffix('.json')}")
