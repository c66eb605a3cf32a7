"""A tiny Llama directory with a tokenizer of its own, made offline and trained for a few seconds, for tests of the
pipeline.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kompakt.compress.calibration import builtin_text

VOCAB = 300
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def tiny_tokenizer(vocab: int = VOCAB, *, with_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template. with_bos: it puts <s> before and </s> behind a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([builtin_text("evaluation")[:30_000]], trainer)
    if with_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_directory(directory: Path, *, steps: int = 60, dtype: torch.dtype = torch.bfloat16, **config) -> Path:
    """Writes a Llama of 4 layers (hidden 64 unless given), trained for `steps` on the Python reference, as a
    directory.
    """
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    settings |= config
    # How far positions reach changes no weight.
    same = tuple((name, value) for name, value in settings.items() if name != "max_position_embeddings")
    weights, generator = trained(steps, same)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(weights)
    torch.set_rng_state(generator)
    model.to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@functools.cache
def trained(steps: int, settings: tuple[tuple[str, object], ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights after `steps`, and the state of the random generator; once in a process, for whoever asks."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**dict(settings)))
    ids = torch.tensor(tokenizer(builtin_text("calibration")[:60_000])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (16,))
        batch = torch.stack([ids[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), torch.get_rng_state()


def write_text(file: Path) -> Path:
    """A text of some thousand tokens that the model was not trained on."""
    file.write_text(builtin_text("evaluation")[:20_000], "utf-8")
    return file
