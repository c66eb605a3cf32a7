"""Linears of a layer quantize a shared input once, and never use what was made from another tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from kompakt.compress import patch, shared_input
from kompakt.compress.linear import CompressedLinear
from kompakt.compress.shared_input import share_inputs, unshare_inputs

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.arange(10).unsqueeze(0)


def recipe(activations: str) -> dict:
    return {"name": "rtn", "weights": {"method": "rtn", "group_size": 32, "activations": activations}}


@pytest.fixture
def model() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).eval()


@pytest.fixture
def quantizations() -> Iterator[mock.Mock]:
    counted = mock.Mock(wraps=shared_input.quantize_w4a8_input)
    with mock.patch.object(shared_input, "quantize_w4a8_input", counted):
        yield counted


def test_each_input_is_quantized_once_and_results_are_those_of_separate_layers(model, quantizations):
    with patch(model, recipe("fp8")):
        shared = model(TOKENS).logits
        # A layer has four different inputs: of q, k, v; of o; of gate, up; of down.
        assert quantizations.call_count == 4 * CONFIG["num_hidden_layers"]
        unshare_inputs(model)
        assert all(module.shared is None for module in model.modules() if isinstance(module, CompressedLinear))
        assert torch.equal(model(TOKENS).logits, shared)


def test_nothing_is_held_after_a_forward_pass(model):
    with patch(model, recipe("fp8")):
        model(TOKENS)
        for layer in model.model.layers:
            assert layer.shared_input.held is None and not layer.shared_input.running


def test_nothing_is_held_after_a_forward_pass_that_fails(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    with patch(model, recipe("fp8")):
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(TOKENS)
        shared = model.model.layers[0].shared_input
        assert shared.held is None and not shared.running


def test_layers_without_quantized_inputs_are_left_alone(model):
    with patch(model, recipe("none")):
        assert all("shared_input" not in vars(layer) for layer in model.model.layers)


def test_unpatching_removes_the_hooks(model):
    before = model(TOKENS).logits
    hooks = [(len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in model.model.layers]
    with patch(model, recipe("fp8")):
        assert all(len(layer._forward_pre_hooks) > pre for layer, (pre, _) in zip(model.model.layers, hooks))
    assert hooks == [(len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in model.model.layers]
    assert all("shared_input" not in vars(layer) for layer in model.model.layers)
    assert torch.equal(model(TOKENS).logits, before)


def test_a_linear_called_by_itself_does_not_share(model, quantizations):
    with patch(model, recipe("fp8")):
        attention, x = model.model.layers[0].self_attn, torch.randn(3, 64, dtype=torch.bfloat16)
        attention.q_proj(x)
        attention.k_proj(x)
        assert quantizations.call_count == 2


def test_a_tensor_changed_in_place_is_quantized_again(model, quantizations):
    with patch(model, recipe("fp8")):
        layer, x = model.model.layers[0], torch.randn(3, 64, dtype=torch.bfloat16)
        layer.shared_input.begin()
        attention = layer.self_attn
        attention.q_proj(x)
        x.mul_(2)
        changed = attention.q_proj(x)
        assert quantizations.call_count == 2
        layer.shared_input.end()
        assert torch.equal(attention.q_proj(x), changed)


def test_equal_values_in_another_tensor_are_not_taken_for_the_same(model, quantizations):
    with patch(model, recipe("fp8")):
        layer, x = model.model.layers[0], torch.randn(3, 64, dtype=torch.bfloat16)
        layer.shared_input.begin()
        layer.self_attn.q_proj(x)
        layer.self_attn.k_proj(x.clone())
        assert quantizations.call_count == 2


def test_tensors_of_inference_mode_are_quantized_every_time(model, quantizations):
    with patch(model, recipe("fp8")):
        with torch.inference_mode():
            inferred = model(TOKENS).logits
        assert quantizations.call_count == 7 * CONFIG["num_hidden_layers"]
        assert torch.equal(inferred, model(TOKENS).logits)


def test_a_copied_model_shares_within_itself(model, quantizations):
    with patch(model, recipe("fp8")):
        twin = copy.deepcopy(model)
        assert twin.model.layers[0].shared_input is not model.model.layers[0].shared_input
        assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
        assert quantizations.call_count == 8 * CONFIG["num_hidden_layers"]


def test_compiled_layers_neither_break_nor_hold_anything(model):
    with patch(model, recipe("fp8")):
        expected = model(TOKENS).logits
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.allclose(compiled(TOKENS).logits, expected, atol=1e-2)
        assert all(layer.shared_input.held is None for layer in model.model.layers)


def test_sharing_twice_attaches_once(model):
    with patch(model, recipe("fp8")):
        hooks = len(model.model.layers[0]._forward_pre_hooks)
        share_inputs(model)
        assert len(model.model.layers[0]._forward_pre_hooks) == hooks


@pytest.fixture
def together(monkeypatch) -> mock.Mock:
    """Products of several Linears as on a CUDA device; counts all products."""
    monkeypatch.setattr(shared_input, "may_join", lambda weight: True)
    counted = mock.Mock(wraps=shared_input.w4a8_matmul)
    monkeypatch.setattr(shared_input, "w4a8_matmul", counted)
    return counted


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_those_that_read_one_tensor(together, bias, tmp_path):
    torch.manual_seed(0)
    with torch.no_grad():
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, attention_bias=bias)).to(torch.bfloat16).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
        with patch(model, recipe("fp8")):
            alone = model(TOKENS).logits
            assert together.call_count == 7 * CONFIG["num_hidden_layers"]
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for _ in range(3):
                together.reset_mock()
                assert torch.allclose(model(TOKENS).logits, alone, atol=1e-2)
                # q, k, v; o; gate, up; down
                assert together.call_count == 4 * CONFIG["num_hidden_layers"]
            assert [len(call.args[1]) for call in together.call_args_list[:4]] == [64 + 2 * 32, 64, 2 * 128, 64]
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
            twin = copy.deepcopy(model)
            assert torch.allclose(twin(TOKENS).logits, alone, atol=1e-2)
            model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert set(saved) == {name for name in state if name != "lm_head.weight"} | (set(saved) & {"lm_head.weight"})
        assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())


def test_many_tokens_are_multiplied_one_by_one(model, together):
    with patch(model, recipe("fp8")):
        many = torch.arange(shared_input.TOGETHER_TOKENS + 1).unsqueeze(0) % 64
        model(many)
        together.reset_mock()
        model(many)
        assert together.call_count == 7 * CONFIG["num_hidden_layers"]


def test_what_nobody_fetches_is_not_made_again(model, together):
    with patch(model, recipe("fp8")):
        layer, x = model.model.layers[0], torch.randn(3, 64, dtype=torch.bfloat16)
        shared, attention = layer.shared_input, layer.self_attn

        def run(*linears):
            shared.begin()
            found = [linear(x) for linear in linears]
            shared.end()
            return found

        first, second, _ = run(attention.q_proj, attention.k_proj, attention.v_proj)
        together.reset_mock()
        got = run(attention.q_proj, attention.k_proj)
        assert together.call_count == 1 and torch.allclose(got[1], second, atol=1e-2)
        got = run(attention.q_proj, attention.k_proj)
        assert together.call_count == 3 and torch.equal(got[0], first)


def test_linears_of_other_schemes_are_not_joined(model, together):
    with patch(model, recipe("fp8")):
        mlp = model.model.layers[0].mlp
        mlp.up_proj.exact = True
        assert shared_input.joined([mlp.gate_proj, mlp.up_proj]) is None
        mlp.up_proj.exact = False
        assert shared_input.joined([mlp.gate_proj, mlp.up_proj]) is not None
        # Adjacent rows are found again without a copy.
        place = mlp.up_proj.weight_packed.data_ptr()
        whole = shared_input.joined([mlp.gate_proj, mlp.up_proj])
        assert whole is not None and whole[0].shape[0] == 256
        assert mlp.up_proj.weight_packed.data_ptr() == place
