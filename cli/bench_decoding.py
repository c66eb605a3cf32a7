"""`kompakt bench decode` and `kompakt bench generate`: attention over a cache, and whole models that generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o
from .bench import Append, HeadDims, Heads, Note, bench, save, some
from .session import Session

BatchLengths = Annotated[str, typer.Option(help="Sequences x tokens of a cache, comma-separated.", metavar="NxN,NxN")]
Queries = Annotated[int, typer.Option(help="Newest tokens that attend at once.", min=1)]
Kinds = Annotated[
    str,
    typer.Option(
        help="int4, fp8, pq4, pq2, prune50, prune70, prune70-int4, evict4x, evict2x-int4, bf16, comma-separated.",
        metavar="A,B",
    ),
]
Peers = Annotated[str, typer.Option(help="What to stand beside: cudnn, fa2, transformers, repeated.", metavar="A,B")]

Model = Annotated[
    str | None, typer.Argument(help="Directory or hub id of a float model in safetensors.", metavar="[MODEL]")
]
Config = Annotated[
    str | None,
    typer.Option(help="In place of MODEL, random weights: llama-8b, qwen-0.6b or a directory.", metavar="NAME|DIR"),
]
Contexts = Annotated[str, typer.Option("--context", help="Tokens of a prompt, comma-separated.", metavar="N,N")]
Batches = Annotated[str, typer.Option("--batch", help="Numbers of sequences, comma-separated.", metavar="N,N")]
Shapes = Annotated[
    str | None, typer.Option(help="In place of --context and --batch: sequences x tokens, in order.", metavar="NxN,NxN")
]
Launches = Annotated[bool, typer.Option(help="Time recipes launch by launch, too.")]
Static = Annotated[bool, typer.Option(help="Time transformers' StaticCache, which compiles, too.")]
NewTokens = Annotated[int, typer.Option("--new", help="Tokens to generate.", min=2)]
Recipes = Annotated[str, typer.Option(help="Names from `kompakt list` or YAML files.", metavar="A,B")]
Repeats = Annotated[int, typer.Option(help="Runs that are measured, after one to warm up.", min=1)]


@bench.command()
def decode(
    context: typer.Context,
    batch_lengths: BatchLengths = "1x32768,8x32768,1x131072",
    heads: Heads = "32/8",
    head_dims: HeadDims = "128",
    queries: Queries = 1,
    kinds: Kinds = "int4,fp8,bf16",
    against: Peers = "cudnn,fa2,transformers,repeated",
    note: Note = "",
    append: Append = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Speed of attention over a compressed cache on this CUDA device beside dense ones, checked first."""
    from ..compress.attention_cases import parse_head_dims, parse_heads
    from ..compress.decode_contenders import KINDS, PEERS, decode_cases, parse_batch_lengths
    from ..compress.decode_speed import check_kernel, decode_speed, heading
    from ..compress.decode_speed_table import check_decode_speeds, merged_decode
    from ..compress.device_speed import Machine
    from ..compress.linear_speed import parse_names
    from ..compress.linear_speed_table import CONDITIONS
    from ..compress.sweep import checked_earlier
    from .decoding_tables import decode_speeds
    from .progress import Bar

    session: Session = context.obj
    chosen: list[Any] = some(parse_names(kinds, KINDS, "kind"), "kind", KINDS)
    peers = parse_names(against, list(PEERS), "peer")
    shapes = parse_batch_lengths(batch_lengths), parse_heads(heads), parse_head_dims(head_dims)
    found = decode_cases(*shapes, chosen, queries)
    with session.working(), Bar(session.stderr, "measuring the ceilings") as bar:
        machine = Machine.cuda(())
        check_kernel(machine.device, chosen)
        if output is not None and append:
            checked_earlier(output, heading(machine, peers, note), CONDITIONS)
        earlier = output if append else None

        def merged(result: dict[str, Any]) -> dict[str, Any]:
            return result if earlier is None else merged_decode(earlier, result)

        def keep(result: dict[str, Any]) -> None:
            if output is not None:
                save(merged(result), output)

        result = merged(decode_speed(machine, found, chosen, peers, note=note, progress=bar, keep=keep))
    session.show(result, decode_speeds, as_json)
    check_decode_speeds(result)


@bench.command()
def generate(
    context: typer.Context,
    model: Model = None,
    config: Config = None,
    contexts: Contexts = "4096,32768",
    batches: Batches = "1,8",
    new: NewTokens = 64,
    shapes: Shapes = None,
    recipes: Recipes = "kv-int4,w4a8-kv4",
    launches: Launches = True,
    static: Static = True,
    repeats: Repeats = 2,
    note: Note = "",
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Time to the first token, per token and peak memory: transformers' caches, and models under recipes."""
    from ..compress.attention_cases import parse_lengths
    from ..compress.decode_contenders import parse_batch_lengths
    from ..compress.generation_bench import Way, check_recipes, generation_bench, place_and_bandwidth, shapes_of
    from ..compress.hf_generation import ModelSource
    from ..compress.linear_speed import parse_tokens
    from .decoding_tables import generation_speeds
    from .progress import Bar

    session: Session = context.obj
    ways = Way.all([item.strip() for item in recipes.split(",") if item.strip()], launches=launches, static=static)
    product = [(count, length) for length in parse_lengths(contexts) for count in parse_tokens(batches)]
    pairs = product if shapes is None else parse_batch_lengths(shapes)
    with session.working(), Bar(session.stderr, "reading the config") as bar:
        source = ModelSource.of(model, config)
        found = shapes_of(pairs, new, source)
        check_recipes(source, ways)
        device, bandwidth = place_and_bandwidth()

        def keep(result: dict[str, Any]) -> None:
            if output is not None:
                save(result, output)

        result = generation_bench(
            *(source, device, found, ways),
            bandwidth=bandwidth,
            repeats=repeats,
            note=note,
            progress=bar,
            keep=keep,
        )
    session.show(result, generation_speeds, as_json)
