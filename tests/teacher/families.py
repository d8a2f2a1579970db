"""Tiny random models of many families: 500 tokens, twelve more head rows, weights drawn wide so that logits differ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from distill.records import Prompt

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"tie_word_embeddings": False},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
}


def save_tiny(family: str, folder: Path, *, bias: float = 0.3, **more: Any) -> Path:
    """Writes a random model of ``family`` and a tokenizer of 500 words to ``folder``.

    Biases have a standard deviation of ``bias``; ``more`` goes to the model's configuration.
    """
    vocabulary = {f"t{i}": i for i in range(500)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t2", pad_token="t0"
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=bias)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_prompt(length: int, *, first_trained: int = 0, seed: int = 0) -> Prompt:
    """A sequence of ``length`` targets whose tokens are drawn from the 500; it trains from ``first_trained`` on."""
    tokens = np.random.default_rng([seed, length]).integers(3, 500, length + 1)
    return Prompt(
        sequence_id=f"{seed}-{length}",
        prompt_id=f"{seed}-{length}",
        domain="random",
        split="train",
        source=f"random:{seed}",
        prompt="",
        response="",
        input_ids=tokens.astype(np.int32),
        loss_mask=np.arange(length) >= first_trained,
    )
