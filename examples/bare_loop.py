"""A student from a cache in a loop of your own: the reader and the loss, nothing else of the library.

    python -m examples.bare_loop runs/demo/cache runs/demo/student --temperature 2

The student is any causal language model of transformers that shares the teacher's tokenizer.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import distill


def train(
    model: Any, cache: str, *, temperature: float, learning_rate: float = 1e-4, batch_tokens: int = 2048
) -> Iterator[float]:
    """One epoch; yields the loss of each step, nats per trained token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for read in distill.batches(cache, temperature=temperature, batch_tokens=batch_tokens):
        batch = read.to(model.device)
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        loss = distill.kd_loss(hidden, model.lm_head.weight, batch, kl_weight=0.9, ce_weight=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def main() -> None:
    """Trains one epoch and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    for step, loss in enumerate(train(model, arguments.cache, temperature=arguments.temperature), 1):
        print(f"step {step}: {loss:.3f}", flush=True)
    if arguments.out:
        model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
