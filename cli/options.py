"""Types of the command line's options, so that the commands in `main.py` stay readable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RUN, CALIBRATION, EVALUATION = "Where and how", "Calibration", "Evaluation"
RETRIEVAL = "Long contexts"

Model = Annotated[str, typer.Argument(help="Directory or hub id of a float model in safetensors.", metavar="MODEL")]
Directory = Annotated[str, typer.Argument(help="A directory that `compress` wrote, or any model.", metavar="DIR")]
Artifact = Annotated[Path, typer.Argument(help="A directory that `compress` wrote.", metavar="DIR")]
Artifacts = Annotated[list[Path], typer.Argument(help="Directories that `compress` wrote.", metavar="DIR...")]
Page = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The page; default report.html, with --json none.", metavar="FILE", show_default=False
    ),
]
Recipe = Annotated[str, typer.Option("--recipe", "-r", help="A name from `kompakt list`, or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any key of the recipe, e.g. weights.rounding=rtn; may be repeated.", metavar="KEY=VALUE"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Device = Annotated[
    str | None, typer.Option(help="Where one layer at a time is worked on; default cuda if there is one.")
]
Contexts = Annotated[
    str | None,
    typer.Option(help="Tokens of a sequence, comma-separated; default 1024,8192,32768.", metavar="N,N"),
]
Batches = Annotated[
    str | None, typer.Option("--batch", help="Sequences at once, comma-separated; default 1.", metavar="N,N")
]
RunsOn = Annotated[
    str | None,
    typer.Option(
        help="Say how fast it could be at most on h200, h100, a100 or l40s (data sheets), or by the ceilings that "
        "`bench linear -o FILE` measured.",
        metavar="NAME|FILE",
    ),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="Where the model is held: auto, cpu, disk, cuda:0 …", rich_help_panel=RUN)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=RUN)
]
OutputDirectory = Annotated[
    Path | None, typer.Option("--output-dir", "-o", help="New directory; default MODEL-RECIPE.", show_default=False)
]
GroupSize = Annotated[
    str | None,
    typer.Option(help="Input channels that share a scale: a number, channel or auto.", metavar="N|channel|auto"),
]


def size(text: str | None) -> Any:
    """A group size as a recipe has it: a number, or a word."""
    return int(text) if text and text.isdigit() else text


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Comma-separated numbers. A usage error names the option."""
    items = [item.strip() for item in text.split(",")]
    if not all(item.isdecimal() for item in items):
        raise typer.BadParameter(f"{option} {text} is not a list of numbers such as 1024,4096")
    return tuple(map(int, items))


def shares(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated shares between 0 and 1. A usage error names the option."""
    try:
        found = tuple(float(item) for item in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < item <= 1 for item in found):
        raise typer.BadParameter(f"{option} {text} is not a list of shares such as 0.125,0.25")
    return found


Activations = Annotated[str | None, typer.Option(help="What inputs of Linears are rounded to.", metavar="fp8|none")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Linears to leave alone: a name, or re:PATTERN; may be repeated.", metavar="PATTERN"),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="builtin, a .txt or .jsonl file, or org/name.", metavar="SOURCE", rich_help_panel=CALIBRATION),
]
Samples = Annotated[
    int | None, typer.Option("--num-calibration-samples", min=1, metavar="N", rich_help_panel=CALIBRATION)
]
Length = Annotated[
    int | None,
    typer.Option("--max-seq-length", help="Tokens of a sample.", min=2, metavar="N", rich_help_panel=CALIBRATION),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--calibration-batch-size", help="Samples at once.", min=1, metavar="N", rich_help_panel=CALIBRATION),
]
Seed = Annotated[int | None, typer.Option(help="Draw of the samples.", min=0, metavar="N", rich_help_panel=CALIBRATION)]
EvaluationText = Annotated[
    str | None, typer.Option(help="builtin or a text file.", metavar="TEXT", rich_help_panel=EVALUATION)
]
EvaluationWindows = Annotated[
    int | None, typer.Option(help="How many windows; 0 skips it.", metavar="N", rich_help_panel=EVALUATION)
]
EvaluationWindow = Annotated[
    int | None, typer.Option(help="Tokens of a window.", metavar="N", rich_help_panel=EVALUATION)
]
MaxIncrease = Annotated[
    str | None,
    typer.Option(
        "--max-perplexity-increase",
        help="Give layers their float weights back, or fail, beyond this, e.g. 3%.",
        metavar="SHARE",
        rich_help_panel=EVALUATION,
    ),
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest weight file.", rich_help_panel=RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that kompakt wrote.", rich_help_panel=RUN)
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse when this device lacks the recipe's kernels.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep finished layers until all are done, and go on from those of an interrupted run.",
        rich_help_panel=RUN,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=RUN)]
Against = Annotated[
    str | None, typer.Option(help="Base model to compare with: adds KL, agreement, paired differences.")
]
Text = Annotated[str, typer.Option(help="builtin or a text file.", metavar="FILE|builtin")]
Window = Annotated[int, typer.Option(help="Tokens of a window.", min=2)]
Stride = Annotated[int | None, typer.Option(help="Tokens between windows; default: the window.", min=1)]
Windows = Annotated[int, typer.Option(help="How many windows; 0 skips the text.", min=0)]
Choices = Annotated[str | None, typer.Option(help="Multiple-choice questions, JSONL.", metavar="FILE")]
LastWord = Annotated[str | None, typer.Option(help="Texts whose last word is to be guessed, JSONL.", metavar="FILE")]
Limit = Annotated[int | None, typer.Option(help="Rows of each task file.", min=1)]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks that lm-eval runs: names it knows, .yaml files (may run code), or .jsonl files with the rows of "
        "--choices or --last-word; comma-separated.",
        metavar="A,B",
    ),
]
NumFewshot = Annotated[
    int | None, typer.Option(help="With --tasks: examples before a question; default: what a task says.", min=0)
]
NoKeptBase = Annotated[
    bool,
    typer.Option(
        "--no-kept-base", help="Neither read nor keep the base's answers to tasks and retrieval; ask it again."
    ),
]
CacheProtocol = Annotated[
    str,
    typer.Option(
        help="How text goes through a compressed cache: chunks reads codes from the start; decode takes a prompt "
        "exactly, then scores the rest.",
        metavar="chunks|decode",
    ),
]
PromptTokens = Annotated[
    int | None, typer.Option(help="With decode: tokens of a window that are the prompt; default: half.", min=1)
]
Retrieval = Annotated[
    str | None,
    typer.Option(
        help="Ask for what stands early in long contexts of this text: copies, needles, keys.",
        metavar="FILE|builtin",
        rich_help_panel=RETRIEVAL,
    ),
]
RetrievalLengths = Annotated[
    str | None,
    typer.Option(
        "--retrieval-length",
        help="Tokens of a case, comma-separated; default: the window.",
        metavar="N,N",
        rich_help_panel=RETRIEVAL,
    ),
]
RetrievalTests = Annotated[
    str | None,
    typer.Option(
        help="copy_text, copy_words, needle, key_value, comma-separated; default: all.",
        metavar="A,B",
        rich_help_panel=RETRIEVAL,
    ),
]
RetrievalSamples = Annotated[
    int | None,
    typer.Option(
        help="Cases of each test, length and depth; default: 4, at 5 depths.", min=1, rich_help_panel=RETRIEVAL
    ),
]
RetrievalQueryAware = Annotated[
    bool,
    typer.Option(
        "--retrieval-query-aware",
        help="Put the question into the prompt: what a cache evicts may then depend on it.",
        rich_help_panel=RETRIEVAL,
    ),
]
Generation = Annotated[
    str | None,
    typer.Option(
        help="Continue prompts of this text greedily, beside the base model.",
        metavar="FILE|builtin",
        rich_help_panel=RETRIEVAL,
    ),
]
GenerationPrompts = Annotated[
    int | None, typer.Option(help="How many prompts; default: 16.", min=1, rich_help_panel=RETRIEVAL)
]
GenerationTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a window that are generated; default: 64.", min=1, rich_help_panel=RETRIEVAL),
]
NoSpeed = Annotated[bool, typer.Option("--no-speed", help="Do not measure tokens per second.")]
Kernels = Annotated[
    bool, typer.Option("--kernels", help="Compare every kernel that DIR would use here with its reference.")
]
NoLogits = Annotated[bool, typer.Option("--no-logits", help="Do not load and run the model.")]
OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.", metavar="FILE")
]
Permute = Annotated[
    int | None,
    typer.Option(
        "--permute-channels", help="Permute channels, which keeps the function and makes losses honest.", metavar="SEED"
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks, and everything that libraries log.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]
