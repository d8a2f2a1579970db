"""A cache and a student flow in, seconds and memory of an optimizer step flow out: ours, and TRL's with the teacher.

    python -m benchmarks.peer_steps ours|trl CACHE STUDENT TEACHER

TRL's ``GKDTrainer`` runs with ``lmbda=0`` (the data's own answers) and ``beta=0`` (forward KL), on the same sequences,
student and precision, with the whole teacher in memory. Each runs in a process of its own, so that memory can be told
apart; seconds are the processor's, on one thread. ``benchmarks.peers --trl FOLDER`` calls both.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import distill
from examples.smollm2 import teacher_folder

STEPS, WARMUP, BATCH_TOKENS, LENGTH, LAYERS = 6, 2, 1024, 256, 6


def bench_steps(reader: distill.CacheReader, trl: Path, scratch: Path) -> dict[str, Any]:
    """Both sides, on the cache of ``reader``."""
    from distill.student.shrink import shrunken_student

    student = shrunken_student(str(teacher_folder()), LAYERS, folder=scratch / "student", trust_remote_code=False)
    found = {}
    for side in ("ours", "trl"):
        command = [sys.executable, "-m", "benchmarks.peer_steps", side, str(reader.root), str(student)]
        environment = {**os.environ, "PYTHONPATH": str(trl)} if side == "trl" else None
        done = subprocess.run(
            [*command, str(teacher_folder())], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(cache: str, student: str) -> list[float]:
    """Seconds of each step of a loop on the cache, reading included."""
    model = _model(student)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds = []
    started = time.process_time()
    for batch in _batches(cache):
        hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        distill.kd_loss(hidden, model.lm_head.weight, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
        started = time.process_time()
        if len(seconds) == STEPS:
            break
    return seconds


def trl(cache: str, student: str, teacher: str) -> list[float]:
    """Seconds of each step of TRL's trainer on the same sequences."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time() - self.started)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

    rows = [ids for batch in _batches(cache) for ids in batch.input_ids.tolist()]
    with tempfile.TemporaryDirectory() as out:
        settings = GKDConfig(
            output_dir=out,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_TOKENS // LENGTH,
            lmbda=0.0,
            beta=0.0,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=_model(student),
            teacher_model=_model(teacher).eval(),
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(teacher),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def _model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def _batches(cache: str) -> distill.Batches:
    return distill.batches(cache, temperature=1.0, max_length=LENGTH, batch_tokens=BATCH_TOKENS)


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "trl"])
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("teacher")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.side == "ours":
        seconds, version = ours(arguments.cache, arguments.student), distill.__version__
    else:
        seconds, version = trl(arguments.cache, arguments.student, arguments.teacher), sys.modules["trl"].__version__
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    step = statistics.median(seconds[WARMUP:])
    found = {"version": version, "step_s": round(step, 2), "tokens_per_s": round(BATCH_TOKENS / step)}
    print(json.dumps({**found, "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    main()
