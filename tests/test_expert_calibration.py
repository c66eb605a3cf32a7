"""Calibrating experts: tokens counted, experts that few or none go to seen with all tokens, and the same result from a
resumed run and from two processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_models import options, write_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from kompakt.cli.tables import compression
from kompakt.compress import compress, verify
from kompakt.compress.artifact import read_sidecar
from kompakt.compress.expert_calibration import expert_sentence, prepare_experts
from kompakt.compress.experts import Expert, Gate, SeparateExperts, separate_experts_of
from kompakt.compress.hf_decoder import LayerCalls, decoder_layers
from kompakt.compress.hf_experts import take_apart
from kompakt.compress.hf_folds import find_folds
from kompakt.compress.processes import ALONE
from kompakt.quant.block import Block
from kompakt.quant.gptq import GPTQ
from kompakt.quant.grid import storage_snap
from kompakt.quant.learning import learn_rounding
from kompakt.quant.method import WeightScheme
from kompakt.quant.solver import start_linears

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
NEVER, OFTEN = 2, 0


def lopsided(folder):
    """A gpt-oss model whose routers send every token to one expert, and none to another."""
    base = write_model(folder, "gpt_oss")
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor[NEVER], tensor[OFTEN] = -100, 5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return lopsided(tmp_path_factory.mktemp("lopsided") / "base")


def first_block(base, batches=3, tokens=30):
    """The first layer of a model, its experts taken apart, with random text."""
    model = AutoModelForCausalLM.from_pretrained(base).float().eval().requires_grad_(False)
    layers = decoder_layers(model)
    take_apart(model, layers, ())
    text = torch.randint(3, 200, (batches, 1, tokens), generator=torch.Generator().manual_seed(1))
    calls = LayerCalls(model, layers, list(text))
    name, layer = layers[0]
    linears = {child: module for child, module in layer.named_modules() if isinstance(module, nn.Linear)}
    device = torch.device("cpu")
    return Block(
        name=name,
        module=layer,
        linears=linears,
        folds=[],
        inputs=calls.hidden,
        arguments=calls.of_layer(0, device),
        schemes=dict.fromkeys(linears, WeightScheme("int4", 32, "none")),
        scale_dtype=torch.bfloat16,
        device=device,
    )


def test_tokens_are_counted_and_experts_with_few_see_all(base):
    block, plain = first_block(base), first_block(base)
    prepare_experts(block, ALONE)
    noted = block.notes["experts"]["mlp.experts"]
    assert noted["needed"] == 64 and sum(noted["tokens"]) == 2 * 90
    assert noted["tokens"][OFTEN] == 90 and noted["tokens"][NEVER] == 0
    few = [index for index, count in enumerate(noted["tokens"]) if count < 64]
    assert OFTEN not in few and len(few) >= 2
    assert {name.split(".")[2] for name in block.rarely_run} == {str(index) for index in few}
    found = block.statistics
    assert {statistics.tokens for statistics in found.values()} == {90}
    with pytest.raises(ValueError, match=rf"mlp\.experts\.{NEVER}\.gate_proj.* never ran"):
        _ = plain.statistics
    # What others see is what they see without them.
    plain.linears = {name: linear for name, linear in plain.linears.items() if name not in block.rarely_run}
    for name, statistics in plain.statistics.items():
        assert torch.equal(statistics.hessian, found[name].hessian), name


def test_showing_all_tokens_changes_no_output(base):
    block = first_block(base)
    prepare_experts(block, ALONE)
    expected = block.run(block.inputs[0], 0)
    with block.observing(), torch.enable_grad():
        assert torch.equal(block.run(block.inputs[0].requires_grad_(), 0), expected)
    mixture = separate_experts_of(block.module)["mlp.experts"]
    assert mixture.unrouted == frozenset() and mixture.routed is None


def test_an_unrouted_token_counts_as_if_it_went_there_with_the_average_weight():
    torch.manual_seed(0)
    gate = Gate(lambda gate, up: nn.functional.silu(gate) * up, linear_in_up=True)
    shapes = ((8, 16), (8, 16), (16, 8))
    experts = [
        Expert(("g", "u", "d"), tuple(nn.Linear(*shape, bias=False) for shape in shapes), gate) for _ in range(3)
    ]
    mixture, x = SeparateExperts(experts), torch.randn(5, 8)
    index = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2], [1, 0]])
    weights, seen = torch.rand(5, 2), []
    experts[2].d.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    wanted = torch.randn(5, 8)
    with mixture.on_every_token(frozenset({2})):
        output = mixture(x.requires_grad_(), index, weights)
    assert torch.equal(output, mixture(x, index, weights))
    gradients = torch.autograd.grad((output * wanted).sum(), [y for _, y in seen[:2]])
    torch.testing.assert_close(gradients[0], wanted[3:4] * weights[3, 1])
    torch.testing.assert_close(gradients[1], wanted[[0, 1, 2, 4]] * weights.mean())
    inside = nn.functional.silu(experts[2].g(x)) * experts[2].u(x)
    torch.testing.assert_close(seen[1][0], inside[[0, 1, 2, 4]])


def test_scales_move_inside_an_expert_only_where_its_gate_allows(base, tmp_path):
    linear = first_block(write_model(tmp_path / "mixtral", "mixtral"))
    sources = [fold.source for fold in find_folds(linear)]
    assert [f"mlp.experts.{index}.w3" for index in range(4)] == [name for name in sources if "experts" in name]
    assert not any("experts" in fold.name for fold in find_folds(first_block(base)))


class SharedBeside(nn.Module):
    """A layer whose router reads a view of what a shared expert reads, with little effect on the output."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(32), nn.Module()
        self.mlp.experts, self.mlp.shared_expert = nn.ModuleList([nn.Linear(32, 32)]), nn.Linear(32, 32)
        self.mlp.router = nn.Linear(32, 4)

    def forward(self, hidden):
        x = self.norm(hidden)
        return hidden + self.mlp.shared_expert(x) + 1e-4 * self.mlp.router(x.view(-1, 32)).sum()


def test_a_norm_that_a_router_reads_is_left_alone():
    layer, scheme = SharedBeside(), WeightScheme("int4", 32, "none")
    block = Block(
        name="layer",
        module=layer,
        linears={"mlp.shared_expert": layer.mlp.shared_expert},
        folds=[],
        inputs=[torch.randn(1, 6, 32)],
        arguments=[((), {})],
        schemes={"mlp.shared_expert": scheme},
        scale_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert find_folds(block) == []
    del layer.mlp.experts
    assert [fold.source for fold in find_folds(block)] == ["norm"]


def test_an_expert_without_tokens_is_rounded_by_the_moments_of_all(base, tmp_path):
    errors = {}
    for recipe in ("w4a16-rtn", "w4a16-gptq"):
        result = compress(base, recipe, tmp_path / recipe, overrides=options(tmp_path))
        checks = verify(tmp_path / recipe).checks
        assert not [(check.name, check.detail) for check in checks if check.status != "passed"]
        errors[recipe] = output_error(base, tmp_path / recipe)
    assert errors["w4a16-gptq"] < 0.95 * errors["w4a16-rtn"]
    counts = [layer["notes"]["experts"]["mlp.experts"]["tokens"] for layer in result.report["layers"]]
    assert all(tokens[NEVER] == 0 and tokens[OFTEN] == 128 for tokens in counts)
    sentence = expert_sentence(result.report["layers"])
    assert sentence.startswith("8 experts, tokens per expert: 0 at least, median ")
    assert "with fewer than 64, 2 of them with none, were calibrated on every token of their layer" in sentence
    assert sentence in (result.output / "README.md").read_text()
    report = {**result.report, "evaluation": result.evaluation, "peak_host_bytes": 0, "output": "out"}
    assert sentence in compression(report)


def output_error(base, directory):
    """Mean square error of the gate projection of the expert without tokens, on tokens that do not go to it."""
    from kompakt.compress.hf import load_base, load_written

    model, packed = load_base(base), load_written(directory)
    block = first_block(base, tokens=60)
    seen = []
    handle = block.module.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.run(block.inputs[0], 0)
    handle.remove()
    expert = f"model.layers.0.mlp.experts.{NEVER}.gate_proj"
    x = seen[0].flatten(0, 1).to(torch.bfloat16)
    fused = model.model.layers[0].mlp.experts
    exact = x.float() @ fused.gate_up_proj[NEVER, :, ::2].float() + fused.gate_up_proj_bias[NEVER, ::2].float()
    return float((packed.get_submodule(expert)(x).float() - exact).square().mean())


def test_learned_rounding_leaves_experts_with_few_tokens_where_they_start(base):
    block = first_block(base)
    block.reference = [block.run(hidden, index) for index, hidden in enumerate(block.inputs)]
    prepare_experts(block, ALONE)
    snap = storage_snap(torch.bfloat16)
    start = dict(start_linears(block, "rtn", snap))
    learned = learn_rounding(block, start, snap, steps=8, samples_per_step=2, learning_rate=0.02)
    assert block.notes["learning"]["loss_after"] < block.notes["learning"]["loss_before"]
    moved = {name for name, weight in learned.items() if not torch.equal(weight.codes, start[name].codes)}
    assert not moved & block.rarely_run
    assert f"mlp.experts.{OFTEN}.gate_proj" in moved


class Interrupted(Exception):
    """The run ends here."""


def test_a_resumed_run_gives_the_same(base, tmp_path, monkeypatch):
    chosen, original = options(tmp_path), GPTQ.quantize
    whole = compress(base, "w4a16-gptq", tmp_path / "whole", overrides=chosen)

    def quantize(self, block):
        if block.name.endswith(".1"):
            raise Interrupted
        return original(self, block)

    with monkeypatch.context() as context:
        context.setattr(GPTQ, "quantize", quantize)
        with pytest.raises(Interrupted):
            compress(base, "w4a16-gptq", tmp_path / "out", overrides=chosen, resume=True)
    resumed = compress(base, "w4a16-gptq", tmp_path / "out", overrides=chosen, resume=True)
    first, second = (read_sidecar(result.output) for result in (whole, resumed))
    assert first["checksums"] == second["checksums"]
    assert [layer["notes"] for layer in first["layers"]] == [layer["notes"] for layer in second["layers"]]


CHILDREN = """
import json, os, socket, sys
import torch
from kompakt.cli.main import main

torch.set_num_threads(1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = 99
        try:
            code = main(json.loads(sys.argv[1]))
        finally:
            os._exit(code)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_give_what_one_gives(base, tmp_path):
    chosen = options(tmp_path)
    one = compress(base, "w4a16-gptq", tmp_path / "one", overrides=chosen)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "kompakt").symlink_to(ROOT)
    arguments = ["compress", str(base), "--recipe", "w4a16-gptq", "-o", str(tmp_path / "two"), "--json"]
    arguments += [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    # The same four sequences, in batches that can be dealt out.
    command = [sys.executable, "-c", CHILDREN, json.dumps([*arguments, "--set", "calibration.batch_size=1"])]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "root")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    layers = read_sidecar(tmp_path / "two")["layers"]
    tokens = [layer["notes"]["experts"]["mlp.experts"]["tokens"] for layer in layers]
    assert tokens[0] == one.report["layers"][0]["notes"]["experts"]["mlp.experts"]["tokens"]
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in expected:
        if ".layers.0.mlp.experts." in name:  # sums in another order; codes that round the other way are few
            same = torch.isclose(got[name].float(), expected[name].float(), rtol=1e-4).float().mean()
            assert same > 0.9, name
