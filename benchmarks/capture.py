"""What capture costs: plain prefill, capture, and vLLM's own prompt_logprobs, in turn in one process.

    python -m benchmarks.capture [--repeats 5] [--threads 2] [--json FILE]

``decode`` is the same for answers: 64 tokens written after 64 read, eight at a time.

``small`` is SmolLM2-135M in bfloat16 on text that is at hand (this repository's documents and example data). Its LM
head is about a fifth of its work and must run at every position, where plain prefill runs it at the last one only: the
floor is about 1.27. ``deep`` is a random model whose head is 2% of the work, as in a 72B model: its floor is 1.02.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache.projection import Projection
from distill.cache.schema import Layout
from distill.cache.shard import write_rows
from distill.config import CacheConfig
from distill.records import Prompt, Question, SequenceTargets
from distill.teacher import calibration
from distill.teacher.chunks import chunk_rows
from distill.teacher.engine import Writing
from examples.smollm2 import teacher_folder

LENGTH, NUM_PROMPTS = 512, 8
ASKED, ANSWER = 64, 64  # tokens of a prompt and of the answer to it, where answers are written
ROOT = Path(__file__).parent.parent


def prompts(tokenizer: Any) -> list[Prompt]:
    """Consecutive pieces of real text, each of LENGTH tokens and one more to predict."""
    files = sorted([*ROOT.glob("examples/data/*.csv"), *ROOT.glob("docs/*.md")])
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    made = []
    for start in range(0, NUM_PROMPTS * LENGTH, LENGTH):
        piece = ids[start : start + LENGTH + 1]
        made.append(
            Prompt(
                sequence_id=str(start),
                prompt_id=str(start),
                domain="text",
                split="train",
                source=f"text:{start}",
                prompt="",
                response="",
                input_ids=piece,
                loss_mask=np.ones(LENGTH, bool),
            )
        )
    return made


def question(prompt: Prompt) -> Question:
    """The first tokens of a text, for the teacher to go on with."""
    return Question(
        prompt_id=prompt.prompt_id,
        domain=prompt.domain,
        split=prompt.split,
        source=prompt.source,
        prompt="",
        input_ids=prompt.input_ids[:ASKED],
    )


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a slow minute of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm up
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def deep_folder(root: Path, tokenizer: Any) -> Path:
    """A random Llama whose LM head is 2% of its parameters' work."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=12
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def bench(folder: Path, sequences: list[Prompt], *, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Rates and ratios of one teacher."""
    from vllm import SamplingParams

    from distill.teacher.vllm_engine import VllmEngine

    config = CacheConfig(
        teacher=str(folder),
        data={"text": ("-",)},
        out="-",
        dtype="bfloat16",
        head_dtype="model",
        max_length=LENGTH + 8,
        engine_options={"max_num_batched_tokens": 2048},
    )
    engine = VllmEngine(config, vocab_size=vocab_size)
    num_targets = sum(prompt.num_targets for prompt in sequences)
    projection = calibration.fit(engine, sequences, hidden_bytes=config.targets.hidden_bytes)
    engine.install(projection)
    llm = engine._llm
    ids = [{"prompt_token_ids": prompt.input_ids[:-1].tolist()} for prompt in sequences]

    def generate(prompt_logprobs: int | None) -> None:
        llm.collective_rpc("capture_begin", args=("off",))
        parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=prompt_logprobs)
        llm.generate(ids, parameters, use_tqdm=False)

    captured: dict[int, Any] = {}
    asked = [question(prompt) for prompt in sequences]
    writing = Writing(
        temperature=0.0, top_p=1.0, max_tokens=ANSWER, max_length=LENGTH + 8, stop_ids=(), seed=0
    )  # no id ends an answer: all have the same length

    def decode() -> None:
        llm.collective_rpc("capture_begin", args=("off",))
        parameters = SamplingParams(max_tokens=ANSWER, temperature=0, detokenize=False, ignore_eos=True)
        llm.generate([{"prompt_token_ids": item.input_ids.tolist()} for item in asked], parameters, use_tqdm=False)

    runs = {
        "plain": lambda: generate(None),
        "capture": lambda: captured.update(engine.capture(sequences)),
        "prompt_logprobs": lambda: generate(20),
        "plain_decode": decode,
        "capture_decode": lambda: list(engine.answer(asked, writing)),
    }
    seconds = measure(runs, repeats)
    engine.close()
    rows = [SequenceTargets(prompt=prompt, targets=captured[i]) for i, prompt in enumerate(sequences)]
    num_tokens = {name: len(asked) * ANSWER if "decode" in name else num_targets for name in seconds}
    return {
        **{f"{name}_tokens_per_s": round(num_tokens[name] / value, 1) for name, value in seconds.items()},
        "capture_over_plain": round(seconds["capture"] / seconds["plain"], 3),
        "prompt_logprobs_over_plain": round(seconds["prompt_logprobs"] / seconds["plain"], 3),
        "decode_over_plain": round(seconds["capture_decode"] / seconds["plain_decode"], 3),
        "bytes_per_token": round(_bytes(rows, config, projection) / num_targets, 1),
        "head_chunk": chunk_rows(vocab_size, is_cuda=False),
    }


def main() -> None:
    """Prints a table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder())
    sequences = prompts(tokenizer)
    small = bench(teacher_folder(), sequences, vocab_size=len(tokenizer), repeats=arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = deep_folder(Path(scratch), tokenizer)
        short = [replace(prompt, input_ids=prompt.input_ids % 4096) for prompt in sequences]
        deep = bench(folder, short, vocab_size=4096, repeats=arguments.repeats)
    machine = f"{platform.machine()}, {arguments.threads} threads, bfloat16"
    results = {"machine": machine, **small, "small": small, "deep": deep}
    for name in ("small", "deep"):
        for key, value in results[name].items():
            print(f"{name}.{key:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _bytes(rows: list[SequenceTargets], config: CacheConfig, projection: Projection) -> int:
    """Size of the rows as a shard."""
    targets = config.targets
    layout = Layout(top_k=targets.top_k, temperatures=targets.temperatures, widths=projection.widths)
    file = io.BytesIO()
    write_rows(file, rows, layout)
    return len(file.getvalue())


if __name__ == "__main__":
    main()
