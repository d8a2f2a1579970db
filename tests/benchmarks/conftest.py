"""A tiny random teacher and a few rows of text, for benchmarks that are to run in seconds."""

import gzip
import json

import pytest

from benchmarks.students import DOMAINS

WORDS = ["<unk>", "<pad>", *(f"w{number}" for number in range(238))]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A random Llama of four layers with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A few rows of made-up text in each domain."""
    folder = tmp_path_factory.mktemp("data")
    for shift, domain in enumerate(DOMAINS):
        with gzip.open(folder / f"{domain}.jsonl.gz", "wt") as file:
            for row in range(12):
                words = [WORDS[2 + (row * 37 + shift + place * (row + 3)) % 238] for place in range(20)]
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return folder
