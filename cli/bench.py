"""`kompakt bench`: measurements that end up as committed JSON, and the tables made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .session import Session

bench = typer.Typer(
    help="Measure methods against each other; JSON with device, versions and date.", no_args_is_help=True
)

Methods = Annotated[str, typer.Option(help="Methods, comma-separated.", metavar="A,B,…")]
Method = Annotated[str, typer.Option(help="The method that quantizes everything else.", metavar="A")]
Ranges = Annotated[int, typer.Option(help="Into how many ranges the decoder layers are divided.", min=1)]
Inputs = Annotated[str, typer.Option("--activations", help="none, fp8 or both, comma-separated.", metavar="A,B")]
Sizes = Annotated[str, typer.Option("--group-sizes", help="Group sizes, comma-separated.", metavar="N,N")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the methods, e.g. scale=amax; may be repeated.", metavar="KEY=VALUE"),
]
Append = Annotated[bool, typer.Option("--append", help="Add rows to an --output file measured in the same way.")]
Label = Annotated[str | None, typer.Option(help="Name of the rows when --set changes a method's options.")]
Note = Annotated[str, typer.Option(help="A sentence to keep with the result, e.g. how it was run.")]
Shapes = Annotated[str, typer.Option(help="llama-8b, llama-70b, qwen-0.6b or OUTxIN, comma-separated.", metavar="A,B")]
Tokens = Annotated[str, typer.Option("--m", help="Numbers of tokens, comma-separated.", metavar="N,N")]
Peers = Annotated[
    str, typer.Option(help="What to stand beside: bf16, fp8, fp8-mm, torch-int4, gemlite.", metavar="A,B")
]
Exact = Annotated[bool, typer.Option("--exact", help="Also w4a8 that never folds group scales into FP8 weights.")]
Masks = Annotated[
    str, typer.Option(help="causal, full, window, padding, packed, chunk, comma-separated.", metavar="A,B")
]
Lengths = Annotated[str, typer.Option(help="Numbers of keys, comma-separated.", metavar="N,N")]
HeadDims = Annotated[str, typer.Option(help="Channels of a head, comma-separated.", metavar="N,N")]
Heads = Annotated[str, typer.Option(help="Query heads / KV heads, comma-separated.", metavar="N/N,N/N")]
Batch = Annotated[int, typer.Option(help="Sequences at once; padding takes at least 2.", min=1)]
Modes = Annotated[
    str, typer.Option(help="fp8_fp8, int8_fp8, int8_fp16, int4_fp8, bf16, comma-separated.", metavar="A,B")
]
AttentionPeers = Annotated[
    str, typer.Option(help="What to stand beside: cudnn, fa2, transformers, sageattention.", metavar="A,B")
]
Patterns = Annotated[
    str | None,
    typer.Option(help="Sparse patterns: a_shape, vertical_slash, block, comma-separated.", metavar="A,B"),
]
Densities = Annotated[
    str | None, typer.Option(help="Shares of the causal tiles that they visit, comma-separated.", metavar="X,Y")
]
Budgets = Annotated[
    str | None,
    typer.Option(help="Of vertical_slash, keys x distances of a head, + between heads that differ.", metavar="NxN,NxN"),
]
Document = Annotated[
    Path | None, typer.Option("--into", help="Markdown file to put the table into.", metavar="FILE.md")
]


@bench.command()
def weights(
    context: typer.Context,
    model: o.Model,
    methods: Methods = "rtn,gptq,awq,fireq,signround",
    activations: Inputs = "none,fp8",
    group_sizes: Sizes = "64,32",
    set_: Options = None,
    label: Label = None,
    dataset: o.Dataset = "builtin",
    samples: o.Samples = 128,
    length: o.Length = 2048,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    text: o.Text = "builtin",
    window: o.Window = 2048,
    windows: o.Windows = 0,
    note: Note = "",
    append: Append = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Perplexity, KL, bits and calibration time of every method × activations × group size (--windows 0: all)."""
    from ..compress.recipe import EvaluationOptions
    from ..compress.sweep import markdown_table, merged, sweep
    from .main import settings
    from .progress import Bar

    session: Session = context.obj
    options = settings(set_)
    chosen: list[dict[str, Any]] = [
        {"method": method, **options, **({"label": label} if label else {})} for method in methods.split(",")
    ]
    calibration = calibration_options(dataset, samples, length, batch_size, seed)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = sweep(
            model,
            methods=chosen,
            activations=activations.split(","),
            group_sizes=[o.size(item) for item in group_sizes.split(",")],
            calibration=calibration,
            evaluation=EvaluationOptions(text=text, window=window, windows=windows),
            note=note,
            onto=output if append else None,
            progress=bar,
        )
        if output is not None:
            result = merged(output, result) if append else result
            save(result, output)
    session.show(result, lambda content: [markdown_table(content)], as_json)


@bench.command()
def sensitivity(
    context: typer.Context,
    model: o.Model,
    method: Method = "gptq",
    activations: o.Activations = "none",
    group_size: o.GroupSize = "64",
    set_: Options = None,
    ranges: Ranges = 5,
    dataset: o.Dataset = "builtin",
    samples: o.Samples = 128,
    length: o.Length = 2048,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    text: o.Text = "builtin",
    window: o.Window = 2048,
    windows: o.Windows = 0,
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Which projections and which ranges of layers carry the loss: each in float again, all else quantized."""
    from ..compress.recipe import EvaluationOptions
    from ..compress.sensitivity import part_table
    from ..compress.sensitivity import sensitivity as measure
    from .main import settings
    from .progress import Bar

    session: Session = context.obj
    weights = {"method": method, **settings(set_), "activations": activations, "group_size": o.size(group_size)}
    calibration = calibration_options(dataset, samples, length, batch_size, seed)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = measure(
            model,
            weights,
            ranges=ranges,
            calibration=calibration,
            evaluation=EvaluationOptions(text=text, window=window, windows=windows),
            note=note,
            progress=bar,
        )
        if output is not None:
            save(result, output)
    session.show(result, lambda content: [part_table(content)], as_json)


@bench.command()
def linear(
    context: typer.Context,
    shapes: Shapes = "llama-8b,llama-70b,qwen-0.6b",
    tokens: Tokens = "1,4,16,64,128,256,512,2048,8192",
    methods: Methods = "w4a8",
    group_sizes: Sizes = "channel,128",
    exact: Exact = False,
    against: Peers = "bf16,fp8,fp8-mm,torch-int4,gemlite",
    note: Note = "",
    append: Append = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Speed of INT4 linear layers on this CUDA device beside other layers, checked against the reference first."""
    from ..compress.device_speed import Machine
    from ..compress.linear_contenders import PEERS
    from ..compress.linear_speed import (
        heading,
        linear_speed,
        parse_names,
        parse_shapes,
        parse_tokens,
        parse_variants,
        with_shares,
    )
    from ..compress.linear_speed_table import CONDITIONS, check_speeds, merged_speeds
    from ..compress.quantization_speed import quantization_speed
    from ..compress.sweep import checked_earlier
    from .progress import Bar
    from .tables import speeds

    session: Session = context.obj
    layers, counts = parse_shapes(shapes), parse_tokens(tokens)
    variants = parse_variants(methods, group_sizes, exact, layers)
    peers = parse_names(against, list(PEERS), "peer")
    with session.working(), Bar(session.stderr, "measuring the ceilings") as bar:
        machine = Machine.cuda(list(dict.fromkeys(f"{variant.method}_linear" for variant in variants)))
        if output is not None and append:
            checked_earlier(output, heading(machine, peers, note), CONDITIONS)
        result = linear_speed(machine, layers, counts, variants, peers, note=note, progress=bar)
        widths = sorted({layer.in_features for layer in layers})
        moved = quantization_speed(machine, widths, counts, variants, progress=bar)
        result = with_shares({**result, "quantization": moved})
        if output is not None:
            result = merged_speeds(output, result) if append else result
            save(result, output)
    session.show(result, speeds, as_json)
    check_speeds(result)


@bench.command()
def attention(
    context: typer.Context,
    masks: Masks = "causal",
    lengths: Lengths = "1024,2048,4096,8192,32768,131072",
    head_dims: HeadDims = "64,128",
    heads: Heads = "32/32,32/8",
    batch: Batch = 1,
    modes: Modes = "fp8_fp8,int8_fp8,int8_fp16,int4_fp8,bf16",
    against: AttentionPeers = "cudnn,fa2,transformers,sageattention",
    pattern: Patterns = None,
    density: Densities = None,
    budgets: Budgets = None,
    note: Note = "",
    append: Append = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Speed of prefill attention on this CUDA device beside other kernels, checked against the reference first."""
    from ..compress.attention_cases import MASKS, parse_head_dims, parse_heads, parse_lengths
    from ..compress.attention_contenders import PEERS
    from ..compress.attention_speed import attention_speed, cases, check_kernels, heading
    from ..compress.attention_speed_table import check_attention_speeds, merged_attention
    from ..compress.device_speed import Machine
    from ..compress.linear_speed import parse_names
    from ..compress.linear_speed_table import CONDITIONS
    from ..compress.sweep import checked_earlier
    from ..kernels.attention import MODES
    from .bench_sparsity import sparse_options, time_sparse
    from .progress import Bar
    from .tables import attention_speeds

    session: Session = context.obj
    families = some(parse_names(masks, MASKS, "mask"), "mask", MASKS)
    chosen: list[Any] = some(parse_names(modes, MODES, "mode"), "mode", MODES)
    peers = parse_names(against, list(PEERS), "peer")
    sparse = sparse_options(pattern, density, budgets, append)
    found = cases(families, parse_lengths(lengths), parse_head_dims(head_dims), parse_heads(heads), batch)
    with session.working(), Bar(session.stderr, "measuring the ceilings") as bar:
        machine = Machine.cuda(())
        check_kernels(found, chosen, machine.device)
        if sparse is not None:
            time_sparse(session, machine, found, chosen, *sparse, peers, note, bar, output, as_json)
            return
        if output is not None and append:
            checked_earlier(output, heading(machine, peers, note), CONDITIONS)
        earlier = output if append else None

        def merged(result: dict[str, Any]) -> dict[str, Any]:
            return result if earlier is None else merged_attention(earlier, result)

        def keep(result: dict[str, Any]) -> None:
            if output is not None:
                save(merged(result), output)

        result = attention_speed(machine, found, chosen, peers, note=note, progress=bar, keep=keep)
        result = merged(result)
    session.show(result, attention_speeds, as_json)
    check_attention_speeds(result)


@bench.command("attention-accuracy")
def attention_accuracy(
    context: typer.Context,
    model: o.Model,
    text: o.Text = "builtin",
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 8192,
    windows: o.Windows = 0,
    modes: Modes = "fp8_fp8,int8_fp8,int8_fp16,int4_fp8",
    choices: o.Choices = None,
    limit: o.Limit = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Answers of --choices scored at once; default 8.", min=1, show_default=False)
    ] = None,
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """What modes of attention cost: every layer's output, random inputs, perplexity, tasks (--windows 0: all)."""
    from ..compress.attention_accuracy import QUANTIZED, accuracy_table
    from ..compress.attention_accuracy import attention_accuracy as measure
    from ..compress.linear_speed import parse_names
    from .progress import Bar

    if choices is None and (limit, batch_size) != (None, None):
        raise typer.BadParameter("--limit and --batch-size are for --choices, the questions that are asked")
    session: Session = context.obj
    chosen: list[Any] = some(parse_names(modes, QUANTIZED, "mode"), "mode", QUANTIZED)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = measure(
            model,
            modes=chosen,
            text=text,
            length=length,
            windows=windows,
            choices=choices,
            limit=limit,
            batch_size=batch_size or 8,
            note=note,
            progress=bar,
        )
        if output is not None:
            save(result, output)
    session.show(result, lambda content: [accuracy_table(content)], as_json)


def some(names: list[str], what: str, known: Sequence[str]) -> list[str]:
    """`names`. ValueError if there are none."""
    if not names:
        raise ValueError(f"no {what} was named; known: {', '.join(known)}")
    return names


def calibration_options(
    dataset: str | None, samples: int | None, length: int | None, batch_size: int | None, seed: int | None
) -> Any:
    """The calibration that a measurement's options ask for."""
    from ..compress.calibration import CalibrationOptions

    given = {"source": dataset, "samples": samples, "length": length, "batch_size": batch_size, "seed": seed}
    return CalibrationOptions.model_validate(given)


def save(result: dict[str, Any], output: Path) -> None:
    """Writes a result, in a folder that need not exist."""
    from ..compress.assess import save_json

    output.parent.mkdir(parents=True, exist_ok=True)
    save_json(result, output)


@bench.command()
def cache(
    context: typer.Context,
    model: o.Model,
    methods: Methods = "kv_fp8,kv_int4",
    set_: Options = None,
    label: Label = None,
    dataset: o.Dataset = "builtin",
    samples: o.Samples = 8,
    length: o.Length = 2048,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    text: o.Text = "builtin",
    window: o.Window = 4096,
    windows: o.Windows = 8,
    retrieval: o.Retrieval = None,
    retrieval_length: o.RetrievalLengths = None,
    retrieval_tests: o.RetrievalTests = None,
    retrieval_samples: o.RetrievalSamples = None,
    retrieval_query_aware: o.RetrievalQueryAware = False,
    note: Note = "",
    append: Append = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """What compressed key-value caches cost: perplexity read from codes, and what is found again (--windows 0: all)."""
    from ..compress.cache_sweep import TESTS, cache_sweep, cache_table
    from ..compress.recipe import EvaluationOptions
    from .main import retrieval_options, settings
    from .progress import Bar

    session: Session = context.obj
    options = {**settings(set_), **({"label": label} if label else {})}
    # Given without --retrieval it is refused with the other options that would have no effect.
    tests = retrieval_tests or (",".join(TESTS) if retrieval else None)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = cache_sweep(
            model,
            methods=[{"method": method, **options} for method in methods.split(",")],
            calibration=calibration_options(dataset, samples, length, batch_size, seed),
            evaluation=EvaluationOptions(text=text, window=window, windows=windows),
            retrieval=retrieval_options(
                window, retrieval, retrieval_length, tests, retrieval_samples, query_aware=retrieval_query_aware
            ),
            note=note,
            onto=output if append else None,
            progress=bar,
        )
        if output is not None:
            save(result, output)
    session.show(result, lambda content: [cache_table(content)], as_json)


def renderer(result: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
    """What makes the Markdown table of a result of any `bench` command."""
    from ..compress.attention_accuracy import accuracy_table
    from ..compress.attention_speed_table import attention_table
    from ..compress.cache_sweep import cache_table
    from ..compress.decode_speed_table import decode_table
    from ..compress.generation_bench_table import generation_table
    from ..compress.linear_speed_table import speed_table
    from ..compress.search_time import search_time_table
    from ..compress.sensitivity import part_table
    from ..compress.sparse_speed_table import sparse_table
    from ..compress.sparsity_sweep import sparsity_table
    from ..compress.sweep import markdown_table
    from ..compress.video_speed_table import video_table

    known = {
        "linear": speed_table,
        "attention": attention_table,
        "attention-accuracy": accuracy_table,
        "cache": cache_table,
        "decode": decode_table,
        "generate": generation_table,
        "search-time": search_time_table,
        "sparse-attention": sparse_table,
        "sparsity": sparsity_table,
        "video": video_table,
    }
    if result.get("bench") in known:
        return known[result["bench"]]
    return part_table if "part" in result["rows"][0] else markdown_table


@bench.command()
def table(context: typer.Context, file: Path, into: Document = None) -> None:
    """The Markdown table of a FILE that a `bench` command wrote."""
    from ..compress.sweep import insert_table, read_result

    result = read_result(file)
    render = renderer(result)
    if into is not None:
        insert_table(into, file, render)
    else:
        context.obj.print(render(result))
