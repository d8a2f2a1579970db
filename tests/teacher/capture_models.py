"""Run as a program: captures tiny models of several families in vLLM, one after the other, and prints how far the
numbers are from a float64 softmax over transformers' own logits of the same weights.

    python -m tests.teacher.capture_models FOLDER… FOLDER@tight    # one JSON object: folder name -> largest errors

``@tight`` gives the engine so little memory for keys and values that it must preempt. With VLLM_USE_V2_MODEL_RUNNER=1
and TRITON_INTERPRET=1 in the environment vLLM's second model runner is at work, the one that GPUs get.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from distill.config import CacheConfig, TargetsConfig
from distill.records import Prompt, Targets
from distill.teacher import capture
from distill.teacher.vllm_engine import VllmEngine
from tests.teacher.families import random_prompt

VOCAB, K, TEMPERATURES = 500, 16, (4.0, 2.0, 1.0)
LENGTHS = (1, 30, 32, 33, 70, 120, 110, 100, *range(2, 30))  # around the 32 tokens of a step
STEP = {"max_num_batched_tokens": 32, "max_num_seqs": 4}
# Six blocks of 32 tokens and 32 tokens of each prompt in a step: prompts grow side by side until they do not fit
# together, so one is preempted and computed again.
TIGHT = {
    "block_size": 32,
    "num_gpu_blocks_override": 6,
    "max_num_batched_tokens": 64,
    "long_prefill_token_threshold": 32,
    "max_num_seqs": 4,
    "disable_log_stats": False,
}


def prompts() -> list[Prompt]:
    """Random tokens."""
    return [random_prompt(length, seed=n) for n, length in enumerate(LENGTHS)]


def errors(targets: Targets, logits_NV: NDArray[np.float64]) -> dict[str, float]:
    """Largest absolute errors."""
    logprobs_NV = logits_NV - logits_NV.max(1, keepdims=True)
    logprobs_NV -= np.log(np.exp(logprobs_NV).sum(1, keepdims=True))
    ids_NK = targets.topk_ids.astype(np.int64)
    found = {
        "topk_logprobs": np.abs(targets.topk_logprobs - np.take_along_axis(logprobs_NV, ids_NK, 1)).max(),
        "best": np.abs(targets.topk_logprobs + np.sort(-logprobs_NV, 1)[:, :K]).max(),
    }
    for j, temperature in enumerate(TEMPERATURES):
        weights_NV = np.exp(logprobs_NV / temperature)
        total_N = weights_NV.sum(1)
        np.put_along_axis(weights_NV, ids_NK, 0.0, 1)
        tail_N = weights_NV.sum(1) / total_N
        found[f"log_z {temperature:g}"] = np.abs(targets.log_z[:, j] - np.log(total_N)).max()
        seen = tail_N > 1e-6
        found[f"log_tail {temperature:g}"] = np.abs(targets.log_tail[:, j] - np.log(tail_N))[seen].max(initial=0.0)
    return {name: float(value) for name, value in found.items()}


def _capture(engine: VllmEngine) -> tuple[dict[int, Targets], int]:
    """Targets of every prompt, and how many prompts at most were read ahead of the answers."""
    num_read, lead, captured = 0, 0, {}

    def stream() -> Iterator[Prompt]:
        nonlocal num_read
        for prompt in prompts():
            num_read += 1
            yield prompt

    for ordinal, targets in engine.capture(stream()):
        lead = max(lead, num_read - len(captured))
        captured[ordinal] = targets
    return captured, lead


def _preemptions(engine: VllmEngine) -> int:
    return sum(int(m.value) for m in engine._llm.get_metrics() if m.name == "vllm:num_preemptions")


def use_second_model_runner() -> None:
    """vLLM wants a Triton driver for the CPU, which no package has; the interpreter needs none: an empty one does."""
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})
    capture.can_compile = lambda _device: False  # torch.compile would ask that driver for its target


def main() -> None:
    """Captures every model that the command line names."""
    report = {}
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER"):
        use_second_model_runner()
    for argument in sys.argv[1:]:
        folder, _, mode = argument.partition("@")
        options = {**(TIGHT if mode == "tight" else STEP), "kv_cache_memory_bytes": 16 << 20}
        config = CacheConfig(
            teacher=folder,
            data={"random": ("-",)},
            out="-",
            dtype="float32",
            max_length=128,
            targets=TargetsConfig(top_k=K, temperatures=TEMPERATURES),
            engine_options=options,
        )
        engine = VllmEngine(config, vocab_size=VOCAB)
        worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner = type(worker.model_runner).__module__
        captured, lead = _capture(engine)
        preemptions = _preemptions(engine) if mode == "tight" else 0
        engine.close()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        worst: dict[str, float] = {}
        for ordinal, prompt in enumerate(prompts()):
            with torch.inference_mode():
                logits = model(torch.tensor(prompt.input_ids[:-1], dtype=torch.long)[None]).logits[0, :, :VOCAB]
            for name, value in errors(captured[ordinal], logits.double().numpy()).items():
                worst[name] = max(worst.get(name, 0.0), value)
        worst["spread"] = float(logits.std())
        worst |= {"preemptions": preemptions, "lead": lead, "v2": float(runner == "vllm.v1.worker.cpu.model_runner")}
        report[Path(argument).name] = worst
    print(json.dumps(report))


if __name__ == "__main__":
    main()
