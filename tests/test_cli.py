"""The command line: what is printed where, exit codes, and one sentence for every mistake, with nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_directory, write_text

from kompakt import __version__
from kompakt.cli.main import dashed, main
from kompakt.compress import pipeline
from kompakt.compress.recipe import recipe_names

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
FAST = ["--num-calibration-samples", "4", "--max-seq-length", "32", "--evaluation-window", "32"]
FAST = [*FAST, "--evaluation-windows", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("base") / "tiny", steps=20)


@pytest.fixture(scope="module")
def compressed(base, tmp_path_factory):
    """A finished directory; tests copy it before they change it."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    assert main(["compress", str(base), "--recipe", "w4a16-rtn", "-o", str(output), *FAST]) == 0
    return output


@pytest.fixture
def changed(base, tmp_path):
    """A function that copies the base model, with some of its config changed."""

    def copy(**config):
        target = tmp_path / "models" / "changed"
        shutil.copytree(base, target)
        file = target / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return target

    return copy


@pytest.fixture
def refused(capsys, tmp_path):
    """A function that runs a command, asserts that it fails in one sentence and leaves nothing, and returns that."""

    def run(*arguments, code=2):
        parent = tmp_path / "work"
        parent.mkdir(exist_ok=True)
        before = sorted(parent.rglob("*"))
        arguments = [str(argument).replace("OUT", str(parent / "out")) for argument in arguments]
        assert main(arguments) == code
        assert sorted(parent.rglob("*")) == before
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        return lines[0]

    return run


def read_json(capsys):
    out, _ = capsys.readouterr()
    return json.loads(out)


# What works


def test_compress_prints_recipe_table_and_place(base, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    output = tmp_path / "out"
    assert main(["compress", str(base), "-r", "w4a8-gptq", "-o", str(output), "--dataset", str(text), *FAST]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("recipe w4a8-gptq: gptq, group size auto, activations fp8")
    for expected in (
        f"calibrated on 4 × 32 = 128 tokens of {text}; longest document ",
        "evaluated on 4 × 32 tokens, stride 32, of builtin",
        "weights on disk",
        "bits per quantized weight",
        "perplexity",
        "KL to the base",
        "same top token",
        "kept: shares its weight with model.embed_tokens",
        "on the host",
        f"written to {output}",
    ):
        assert expected in out
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert json.loads((output / "kompakt.json").read_text())["command"].startswith("kompakt compress ")


def test_flags_override_the_recipe_and_underscores_are_accepted(base, tmp_path, capsys):
    arguments = ["compress", str(base), "--recipe", "w4a16-rtn", "--output_dir", str(tmp_path / "out"), "--json"]
    arguments += ["--group_size=32", "--activations", "fp8", "--ignore", "re:.*down_proj", "--ignore", "lm_head"]
    arguments += [
        "--max_seq_length",
        "48",
        "--num_calibration_samples=3",
        "--seed",
        "5",
        "--calibration_batch_size",
        "2",
    ]
    arguments += ["--set", "weights.scale=amax", "--set", "name=mine", "--evaluation_windows", "0"]
    arguments += ["--max_shard_size", "20KB"]
    assert main(arguments) == 0
    report = read_json(capsys)
    recipe = report["recipe"]
    assert recipe["name"] == "mine"
    assert recipe["weights"] == {
        "method": "rtn",
        "group_size": 32,
        "activations": "fp8",
        "ignore": ["re:.*down_proj", "lm_head"],
        "scale": "amax",
    }
    assert recipe["calibration"] | {"samples": 3, "length": 48, "seed": 5, "batch_size": 2} == recipe["calibration"]
    assert report["evaluation"] is None
    assert report["output"] == str(tmp_path / "out")
    assert report["peak_host_bytes"] > 10**7
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_output_directory_is_named_after_model_and_recipe(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(base), "--recipe", "w4a16-rtn", "--evaluation-windows", "0"]) == 0
    assert capsys.readouterr().out.endswith("written to tiny-w4a16-rtn\n")
    assert (tmp_path / "tiny-w4a16-rtn" / "kompakt.json").is_file()


def test_dry_run_prints_the_plan_and_writes_nothing(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compress", str(base), "--recipe", "w4a16-rtn", "--dry-run", "--json"]) == 0
    dry = read_json(capsys)
    assert main(["plan", str(base), "--recipe", "w4a16-rtn", "--json"]) == 0
    assert dry == read_json(capsys)
    assert main(["plan", str(base), "--set", "weights.group_size=32"]) == 0
    out, err = capsys.readouterr()
    assert "memory at the peak of" in out and "W4A8-FP8 g32" in out
    assert "decoder layer 0 B" not in " ".join(out.split())
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluate_alone_names_the_base_model(compressed, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(compressed), "--window", "32", "--windows", "2", "--no-speed"]) == 0
    out, _ = capsys.readouterr()
    assert "perplexity" in out
    assert f"--against {base} adds KL" in out
    assert list(tmp_path.iterdir()) == []


def test_evaluate_against_the_base_with_tasks_and_a_file(compressed, base, tmp_path, capsys):
    rows = [{"question": "Which is a colour?", "choices": ["blue", "tree"], "gold": 0}] * 3
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.jsonl").write_text(json.dumps({"context": "She looked at", "target": "him"}) + "\n")
    arguments = ["evaluate", str(compressed), "--against", str(base), "--window", "32", "--windows", "2"]
    arguments += [
        "--choices",
        str(tmp_path / "choices.jsonl"),
        "--last-word",
        str(tmp_path / "words.jsonl"),
        "--limit",
        "2",
    ]
    assert main([*arguments, "-o", str(tmp_path / "result.json")]) == 0
    out, _ = capsys.readouterr()
    for expected in (
        "KL to the base",
        "choices.jsonl accuracy",
        "words.jsonl accuracy",
        "0 gained and 0 lost",
        "decode",
    ):
        assert expected in out
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["choices"]["model"]["items"] == 2
    assert main([*arguments, "--no-speed", "--json"]) == 0
    assert read_json(capsys)["comparison"] == written["comparison"]


def test_list_names_recipes_and_methods(capsys):
    assert main(["list", "--json"]) == 0
    content = read_json(capsys)
    assert [recipe["name"] for recipe in content["recipes"]] == recipe_names()
    methods = {item["method"]: item for item in content["methods"]["weights"]}
    assert methods["gptq"]["options"]["dampening"] == 0.01
    assert all(item["description"] for item in methods.values())
    assert main(["list"]) == 0
    out, _ = capsys.readouterr()
    assert all(name in out for name in [*recipe_names(), *methods])


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kompakt {__version__}\n"
    for arguments in ([], ["--help"], ["compress", "--help"]):
        main(arguments)
        out, err = capsys.readouterr()
        assert "Usage" in out and err == ""


def test_only_names_of_options_are_changed():
    given = [
        "compress",
        "my_model",
        "--max_seq_length=8",
        "--set",
        "a_b=c_d",
        "--ignore",
        "q_proj",
        "--set=x_y=z_w",
        "-o",
        "a_b",
    ]
    expected = ["compress", "my_model", "--max-seq-length=8", "--set", "a_b=c_d", "--ignore", "q_proj"]
    assert dashed(given) == [*expected, "--set=x_y=z_w", "-o", "a_b"]


def test_help_and_version_are_quick(tmp_path):
    """No library that takes its time may be imported before a command runs."""
    (tmp_path / "kompakt").symlink_to(ROOT)
    code = "import sys; from kompakt.cli.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for arguments in (["--help"], ["compress", "--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        imported = {name.partition(".")[0] for name in done.stderr.split()}
        assert "kompakt" in imported and done.stdout
        assert not imported & {"torch", "transformers", "numpy", "yaml", "jinja2"}


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compres"], "No such command 'compres'"),
        (["compress"], "Missing argument 'MODEL'"),
        (["compress", "x", "--recipee", "y"], "No such option"),
        (["compress", "x", "--num-calibration-samples", "few"], "Invalid value for '--num-calibration-samples'"),
        (["compress", "x", "--num-calibration-samples", "0"], "'--num-calibration-samples': Input should be greater"),
        (["bench", "weights", "x", "--num-calibration-samples", "0"], "'--num-calibration-samples': Input should be"),
        (["bench", "sensitivity", "x", "--max-seq-length", "1"], "'--max-seq-length': Input should be greater"),
        (["compress", "x", "--set", "weights.group_size"], "--set weights.group_size is not KEY=VALUE"),
        (["evaluate", "x", "--window", "1"], "Invalid value for '--window'"),
        (["compress", "x", "--recipe", "w4a8-firq"], "did you mean 'w4a8-fireq'?"),
        (["compress", "x", "--set", "wieghts.group_size=8"], "unknown key 'wieghts'; did you mean 'weights'?"),
        (["compress", "x", "--set", "weights.group=8"], "unknown key 'group'; did you mean 'group_size'?"),
        (
            ["compress", "x", "--set", "weights.method=gtpq"],
            "unknown method 'gtpq' in slot weights; did you mean 'gptq'?",
        ),
        (
            ["compress", "x", "--set", "kv_cache=int4"],
            "unknown method 'int4' in slot kv_cache; did you mean 'kv_int4'?",
        ),
        (["compress", "x", "--set", "sparsity=triangl"], "unknown method 'triangl' in slot sparsity"),
        (["compress", "x", "--group-size", "big"], "group_size = 'big' is not valid"),
        (["compress", "x", "--max-perplexity-increase", "little"], "'little' is neither a number nor a percentage"),
        (["compress", "./no/such/model", "-o", "OUT"], "model ./no/such/model does not exist"),
        (["evaluate", "./no/such/model"], "model ./no/such/model does not exist"),
        (["plan", "./no/such/model"], "model ./no/such/model does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, says, refused):
    assert says in refused(*arguments)


@pytest.mark.parametrize("line", ["wieghts: {method: rtn}", "weights: {method: rtnn}", "pruning: {method: rtn}"])
def test_wrong_recipe_files(line, base, tmp_path, refused):
    (tmp_path / "mine.yaml").write_text(f"version: 1\nweights: {{method: rtn}}\n{line}\n")
    assert str(tmp_path / "mine.yaml") in refused("compress", base, "--recipe", tmp_path / "mine.yaml", "-o", "OUT")


def test_pickled_weights(changed, refused):
    model = changed()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "convert them to safetensors first" in refused("compress", model, "-o", "OUT")


def test_no_decoder_layers(changed, refused):
    message = refused("compress", changed(num_hidden_layers=0), "--recipe", "w4a16-rtn", "-o", "OUT")
    assert "has no decoder layers" in message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_in_weights(name, changed, refused):
    model = changed()
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = refused("compress", model, "--recipe", "w4a16-rtn", "-o", "OUT", "--evaluation-windows", "0")
    assert f"{name} holds NaN or infinite values" in message


def test_damaged_base_weights(changed, refused):
    model = changed()
    os.truncate(model / "model.safetensors", 5000)
    assert "a safetensors file in" in refused("compress", model, "-o", "OUT")


@pytest.mark.parametrize(("text", "says"), [("", "holds no text"), ("Too short.", "one sample needs 32")])
def test_calibration_text_without_enough_text(text, says, base, tmp_path, refused):
    (tmp_path / "text.txt").write_text(text)
    message = refused("compress", base, "--dataset", tmp_path / "text.txt", "-o", "OUT", *FAST)
    assert says in message


def test_evaluation_text_without_enough_text(base, tmp_path, refused):
    (tmp_path / "text.txt").write_text("Too short.")
    message = refused("compress", base, "--evaluation-text", tmp_path / "text.txt", "-o", "OUT", *FAST)
    assert "fewer than one window of 32" in message
    assert "cannot be read" in refused("compress", base, "--evaluation-text", tmp_path / "none.txt", "-o", "OUT", *FAST)


def test_group_size_that_does_not_divide(base, refused):
    message = refused("compress", base, "--recipe", "w4a16-rtn", "--group-size", "48", "-o", "OUT")
    assert "these divide every Linear: 64, 32, 16, channel (or auto)" in message


def test_output_that_exists(base, tmp_path, refused):
    (tmp_path / "work" / "out").mkdir(parents=True)
    (tmp_path / "work" / "out" / "notes.txt").write_text("mine")
    arguments = ["compress", base, "--recipe", "w4a16-rtn", "-o", "OUT"]
    assert "exists and is not empty; choose another or pass --overwrite" in refused(*arguments)
    assert "was not written by kompakt" in refused(*arguments, "--overwrite")
    assert (tmp_path / "work" / "out" / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_directory_of_ours(base, compressed, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(compressed, output)
    arguments = [
        "compress",
        str(base),
        "--recipe",
        "fp8",
        "-o",
        str(output),
        "--overwrite",
        "--evaluation-windows",
        "0",
    ]
    assert main(arguments) == 0
    assert json.loads((output / "kompakt.json").read_text())["recipe"]["name"] == "fp8"
    assert not (output / "evaluation.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("FILE/out", "cannot be created"),
        ("FILE/a/b", "cannot be created"),
        ("/proc/kompakt/out", "output"),
        ("FILE" + "x" * 300, "File name too long"),
    ],
    ids=["below a file", "far below a file", "proc", "long name"],
)
def test_output_that_cannot_be_written(place, says, base, tmp_path, refused):
    (tmp_path / "file").write_text("")
    output = place.replace("FILE", str(tmp_path / "file"))
    message = refused("compress", base, "--recipe", "w4a16-rtn", "-o", output, "--evaluation-windows", "0")
    assert says in message


@pytest.mark.parametrize("command", [["evaluate", "DIR", "--windows", "1", "--window", "32", "--no-speed"]])
def test_damaged_directories(command, compressed, tmp_path, refused):
    def damaged(change):
        target = tmp_path / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(compressed, target)
        change(target)
        return refused(*[part.replace("DIR", str(target)) for part in command])

    def edit(target):
        content = bytearray((target / "model.safetensors").read_bytes())
        content[-7] ^= 1
        (target / "model.safetensors").write_bytes(content)

    def newer(target):
        content = json.loads((target / "kompakt.json").read_text())
        (target / "kompakt.json").write_text(json.dumps({**content, "version": 2}))

    assert "model.safetensors is truncated or was changed" in damaged(
        lambda target: os.truncate(target / "model.safetensors", 9000)
    )
    assert "model.safetensors is truncated or was changed" in damaged(edit)
    assert "has version 2, this kompakt reads up to 1; upgrade kompakt" in damaged(newer)
    assert "kompakt.json is damaged" in damaged(lambda target: os.truncate(target / "kompakt.json", 40))
    assert "lacks kompakt.safetensors" in damaged(lambda target: (target / "kompakt.safetensors").unlink())


def test_already_quantized(compressed, refused):
    assert "is already quantized" in refused("compress", compressed, "--recipe", "w4a16-rtn", "-o", "OUT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this device may have the kernel")
def test_kernels_that_this_device_lacks(base, tmp_path, refused, capsys):
    arguments = ["compress", base, "--recipe", "w4a16-rtn", "--evaluation-windows", "0"]
    assert "w4a16_linear has no kernel on this device" in refused(*arguments, "-o", "OUT", "--strict")
    assert main([*map(str, arguments), "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: w4a16_linear runs through the torch reference: ")


def test_limit_that_cannot_be_met(base, refused, monkeypatch):
    evaluation = {"comparison": {"perplexity_increase": 0.07}}
    monkeypatch.setattr(pipeline, "verify_quality", lambda *arguments: evaluation)
    arguments = ["compress", base, "--recipe", "w4a16-rtn", "-o", "OUT", *FAST, "--set", "limits.max_restored=0"]
    message = refused(*arguments, "--max-perplexity-increase", "3%", code=3)
    assert "perplexity grew by 7.00%, the limit is 3.00%" in message


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RuntimeError("the reloaded model differs\nand more"), 1, "error: the reloaded model differs"),
        (MemoryError(), 1, "error: not enough memory"),
        (OSError(5, "Input/output error", "disk"), 2, "error: disk: Input/output error"),
    ],
)
def test_failures_of_the_run(error, code, says, base, refused, monkeypatch):
    monkeypatch.setattr(pipeline, "reload_and_compare", failing(error))
    arguments = ["compress", base, "--recipe", "w4a16-rtn", "-o", "OUT", "--evaluation-windows", "0"]
    assert refused(*arguments, code=code) == says


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_interruption_leaves_nothing(error, code, base, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "reload_and_compare", failing(error))
    arguments = ["compress", str(base), "--recipe", "w4a16-rtn", "-o", str(tmp_path / "a" / "out")]
    try:
        found = main([*arguments, "--evaluation-windows", "0"])
    except SystemExit as exit:
        found = exit.code
    assert found == code
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_ours_is_not_hidden(base, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "reload_and_compare", failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        main(["compress", str(base), "--recipe", "w4a16-rtn", "-o", str(tmp_path / "out"), "--evaluation-windows", "0"])
    assert list(tmp_path.iterdir()) == []


def test_debug_adds_the_traceback(capsys):
    assert main(["--debug", "plan", "./no/such/model"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: model ./no/such/model does not exist\n")
