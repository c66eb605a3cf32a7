"""`kompakt bench sparsity`, and `kompakt bench attention` with patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .bench import AttentionPeers, Note, calibration_options, save, some
from .bench_decoding import Config, Model, Recipes, bench
from .session import Session

Videos = Annotated[str, typer.Option(help="Frames x tokens of a frame, comma-separated.", metavar="NxN,NxN")]


@bench.command()
def video(
    context: typer.Context,
    videos: Videos = "33x3600,21x1560",
    heads: Annotated[int, typer.Option(help="Heads of a layer.", min=1)] = 24,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.", min=2)] = 128,
    against: AttentionPeers = "cudnn",
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Sparse-vDiT on made-up videos on this CUDA device: time of the search, and of what it chose beside dense."""
    from ..compress.attention_contenders import PEERS
    from ..compress.device_speed import Machine
    from ..compress.linear_speed import parse_names
    from ..compress.video_speed import Video, video_speed
    from ..compress.video_speed_table import check_video_speeds, video_table
    from .progress import Bar

    session: Session = context.obj
    found, peers = Video.all(videos, heads, head_dim), parse_names(against, list(PEERS), "peer")

    def keep(result: dict[str, Any]) -> None:
        if output is not None:
            save(result, output)

    with session.working(), Bar(session.stderr, "measuring the ceilings") as bar:
        machine = Machine.cuda(())
        result = video_speed(machine, found, peers, note=note, progress=bar, keep=keep)
    session.show(result, lambda content: [video_table(content)], as_json)
    check_video_speeds(result)


@bench.command("search-time")
def search_time(
    context: typer.Context,
    model: Model = None,
    config: Config = None,
    recipes: Recipes = "sparse-minference,sparse-triangle",
    samples: Annotated[int, typer.Option(help="Documents; a search looks at 3.", min=1)] = 3,
    length: Annotated[int, typer.Option(help="Tokens of a document.", min=2)] = 4096,
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """How long a search for sparse patterns takes, on random tokens and with --config on random weights."""
    from ..compress.generation_bench import place
    from ..compress.hf_generation import ModelSource
    from ..compress.search_time import search_time as measure
    from ..compress.search_time import search_time_table, searches
    from .progress import Bar

    session: Session = context.obj
    chosen = searches([item.strip() for item in recipes.split(",") if item.strip()])

    def keep(result: dict[str, Any]) -> None:
        if output is not None:
            save(result, output)

    with session.working(), Bar(session.stderr, "making the model") as bar:
        source = ModelSource.of(model, config)
        result = measure(*(source, place(), chosen), samples=samples, length=length, note=note, progress=bar, keep=keep)
    session.show(result, lambda content: [search_time_table(content)], as_json)
    if any("absent" in row for row in result["rows"]):
        raise RuntimeError("a search failed and has no time; the table says why")


@bench.command()
def sparsity(
    context: typer.Context,
    model: o.Model,
    levels: Annotated[
        str, typer.Option(help="Shares of the causal tiles, comma-separated.", metavar="X,Y")
    ] = "0.125,0.25",
    dataset: o.Dataset = "builtin",
    samples: o.Samples = 3,
    length: o.Length = 4096,
    seed: o.Seed = 0,
    text: o.Text = "builtin",
    window: o.Window = 4096,
    windows: o.Windows = 4,
    retrieval: o.Retrieval = None,
    retrieval_length: o.RetrievalLengths = None,
    retrieval_tests: o.RetrievalTests = None,
    retrieval_samples: o.RetrievalSamples = None,
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """What sparse prefill costs at equal numbers of tiles, searched and the same for all heads (--windows 0: all)."""
    from ..compress.cache_sweep import TESTS
    from ..compress.recipe import EvaluationOptions
    from ..compress.sparsity_sweep import sparsity_sweep, sparsity_table
    from .main import retrieval_options
    from .progress import Bar

    session: Session = context.obj
    tests = retrieval_tests or (",".join(TESTS) if retrieval else None)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = sparsity_sweep(
            model,
            levels=o.shares(levels, "--levels"),
            calibration=calibration_options(dataset, samples, length, 1, seed),
            evaluation=EvaluationOptions(text=text, window=window, windows=windows),
            retrieval=retrieval_options(window, retrieval, retrieval_length, tests, retrieval_samples),
            note=note,
            progress=bar,
        )
        if output is not None:
            save(result, output)
    session.show(result, lambda content: [sparsity_table(content)], as_json)


def sparse_options(
    pattern: str | None, density: str | None, budgets: str | None, append: bool
) -> tuple[list[str], list[Any]] | None:
    """What `--pattern` with `--density` or `--budgets` asks for: patterns, and levels of each; None without them."""
    if pattern is None and density is None and budgets is None:
        return None
    if pattern is None or (density is None and budgets is None):
        raise typer.BadParameter(
            "--pattern and --density (or --budgets) belong together, e.g. --pattern block --density 0.1,0.25"
        )
    if append:
        raise typer.BadParameter("--append adds rows of dense attention; leave it out with --pattern")
    from ..compress.linear_speed import parse_names
    from ..compress.sparse_speed import PATTERNS, Budgets

    names = some(parse_names(pattern, PATTERNS, "pattern"), "pattern", PATTERNS)
    if budgets is not None and names != ["vertical_slash"]:
        raise typer.BadParameter(f"--budgets are of --pattern vertical_slash alone, not of {pattern}")
    levels: list[Any] = [] if density is None else list(o.shares(density, "--density"))
    return names, levels + [Budgets.parse(item) for item in (budgets.split(",") if budgets else ())]


def time_sparse(
    session: Session,
    machine: Any,
    found: Any,
    modes: Any,
    patterns: list[str],
    levels: list[Any],
    peers: list[str],
    note: str,
    bar: Any,
    output: Path | None,
    as_json: bool,
) -> None:
    """`bench attention` with patterns."""
    from ..compress.sparse_speed import sparse_speed
    from ..compress.sparse_speed_table import check_sparse_speeds, sparse_table

    def keep(result: dict[str, Any]) -> None:
        if output is not None:
            save(result, output)

    result = sparse_speed(machine, found, modes, patterns, levels, peers, note=note, progress=bar, keep=keep)
    session.show(result, lambda content: [sparse_table(content)], as_json)
    check_sparse_speeds(result)
