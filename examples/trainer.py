"""A student from a cache in transformers' ``Trainer``: its own loop, logging and checkpoints, our batches and loss.

    python -m examples.trainer runs/demo/cache runs/demo/student --out runs/trainer --steps 30

The data set yields whole batches, so the collator hands on what it gets; a resumed ``Trainer`` skips to where it was.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import distill


class CachedTrainer(Trainer):
    """``Trainer`` with the loss against the cached teacher."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """The mean over the batch's trained tokens."""
        batch: distill.Batch = inputs["batch"].to(self.args.device)
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return distill.kd_loss(hidden, model.lm_head.weight, batch, kl_weight=0.9, ce_weight=0.1)


def collate(rows: list[distill.Batch]) -> dict[str, Any]:
    """The one batch that is drawn at a time; ``Trainer`` itself wants a tensor to look at."""
    (batch,) = rows
    return {"input_ids": batch.input_ids, "batch": batch}


def trainer_of(model: Any, cache: str, *, temperature: float, batch_tokens: int = 2048, **settings: Any) -> Trainer:
    """A trainer on ``cache``; ``settings`` are those of ``TrainingArguments``."""
    fixed = {"per_device_train_batch_size": 1, "remove_unused_columns": False}
    return CachedTrainer(
        model=model,
        args=TrainingArguments(**fixed, **settings),
        train_dataset=distill.batches(cache, temperature=temperature, batch_tokens=batch_tokens),
        data_collator=collate,
    )


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    trainer = trainer_of(
        model,
        arguments.cache,
        temperature=arguments.temperature,
        output_dir=arguments.out,
        max_steps=arguments.steps,
        logging_steps=1,
        report_to="none",
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
