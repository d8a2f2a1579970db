"""Run as a program: captures tiny models of several families in vLLM, one after the other, and prints how far the
numbers are from a float64 softmax over transformers' own logits of the same weights.

    python -m tests.teacher.capture_models FOLDER… FOLDER@tight    # one JSON object: folder name -> largest errors

``@tight`` gives the engine so little memory for keys and values that it must preempt, ``@compiled`` lets vLLM compile
the model, ``@pp`` cuts its layers into two stages, each in a process of its own. With VLLM_USE_V2_MODEL_RUNNER=1 and
TRITON_INTERPRET=1 in the environment vLLM's second model runner is at work, the one that GPUs get.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from distill.config import CacheConfig, TargetsConfig
from distill.errors import RetryError
from distill.records import Prompt, Question, Targets
from distill.teacher import capture
from distill.teacher.engine import Writing
from distill.teacher.vllm_engine import VllmEngine
from tests.teacher.families import random_prompt

VOCAB, K, TEMPERATURES = 500, 16, (4.0, 2.0, 1.0)
STOPS = tuple(range(0, VOCAB, 25))  # ids that end an answer: one in 25
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


SECOND = bool(os.environ.get("VLLM_USE_V2_MODEL_RUNNER"))
MODES: dict[str, dict[str, Any]] = {
    "tight": TIGHT,
    "compiled": {**STEP, "enforce_eager": False},
    "pp": {**STEP, "pipeline_parallel_size": 2},
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


def questions() -> list[Question]:
    """Random prompts, some of them asked twice."""
    return [
        Question(
            prompt_id=str(n // 2),
            domain="random",
            split="train",
            source=f"random:{n}",
            prompt="",
            input_ids=random_prompt(length, seed=n // 2).input_ids[:-1],
            number=n % 2,
        )
        for n, length in enumerate((1, 1, 31, 31, 60, 60, 50, 50))
    ]


def _answers(engine: VllmEngine, temperature: float) -> Iterator[tuple[NDArray[np.int64], int, Targets]]:
    """(tokens of question and answer, tokens of the question, targets), prompts being captured in between."""
    top_p = 1.0 if SECOND else 0.9  # Triton's interpreter fails in vLLM's kernel for it
    writing = Writing(temperature=temperature, top_p=top_p, max_tokens=40, max_length=128, stop_ids=STOPS, seed=0)
    items = [item for pair in zip(questions(), prompts(), strict=False) for item in pair]
    for ordinal, answer, targets in engine.answer(items, writing):
        item = items[ordinal]
        if isinstance(item, Question):
            yield np.concatenate([item.input_ids, answer]).astype(np.int64), len(item.input_ids), targets
        else:
            assert len(answer) == 0
            assert len(targets.entropy) == item.num_targets


def _answer_errors(engine: VllmEngine, model: Any) -> dict[str, float]:
    """Errors of the targets of answers, and how much likelier than the greedy choice another token was."""
    worst: dict[str, float] = {}
    lengths, texts = [], []
    for temperature in (0.0, 1.0):
        for ids, num_asked, targets in _answers(engine, temperature):
            with torch.inference_mode():
                logits_NV = model(torch.from_numpy(ids[:-1])[None]).logits[0, :, :VOCAB].double().numpy()
            found = {f"answer {name}": value for name, value in errors(targets, logits_NV).items()}
            answer = ids[num_asked:]
            lengths.append(len(answer))
            assert len(targets.entropy) == len(ids) - 1
            assert not set(answer[:-1].tolist()) & set(STOPS), "an answer goes on after its end"
            if temperature == 0:
                written_GV = logits_NV[num_asked - 1 :]
                chosen_G = np.take_along_axis(written_GV, answer[:, None], 1)[:, 0]
                found["greedy"] = float((written_GV.max(1) - chosen_G).max())
            else:
                texts.append(tuple(answer.tolist()))
            for name, value in found.items():
                worst[name] = max(worst.get(name, 0.0), value)
    return worst | {"shortest": min(lengths), "longest": max(lengths), "different": len(set(texts))}


def _preemptions(engine: VllmEngine) -> int:
    return sum(int(m.value) for m in engine._llm.get_metrics() if m.name == "vllm:num_preemptions")


def _error_of_a_failing_source(engine: VllmEngine) -> str:
    """What comes out of ``capture`` when its prompts end in an error of the store."""

    def prompts_then_error() -> Iterator[Prompt]:
        yield random_prompt(5)
        raise RetryError("the store does not answer")

    try:
        for _ in engine.capture(prompts_then_error()):
            pass
    except RuntimeError as error:
        return type(error).__name__
    return "nothing"


def use_second_model_runner() -> None:
    """vLLM wants a Triton driver for the CPU, which no package has; the interpreter needs none: an empty one does."""
    import triton.backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})
    capture.can_compile = lambda _device: False  # torch.compile would ask that driver for its target


if SECOND:
    use_second_model_runner()  # also in the processes of pipeline stages, which load this module anew


def main() -> None:
    """Captures every model that the command line names."""
    report = {}
    runner = ""
    for argument in sys.argv[1:]:
        folder, _, mode = argument.partition("@")
        options = {**MODES.get(mode, STEP), "kv_cache_memory_bytes": 16 << 20}
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
        compiled = engine._llm.llm_engine.vllm_config.compilation_config.mode  # 0: not at all
        executor = engine._llm.llm_engine.engine_core.engine_core.model_executor
        if mode != "pp":  # else the runners are elsewhere
            runner = type(executor.driver_worker.worker.model_runner).__module__
        captured, lead = _capture(engine)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        worst = _answer_errors(engine, model) if Path(folder).name == "Qwen3" else {}
        preemptions = _preemptions(engine) if mode == "tight" else 0
        worst["own error"] = float(_error_of_a_failing_source(engine) == "RetryError")
        engine.close()
        for ordinal, prompt in enumerate(prompts()):
            with torch.inference_mode():
                logits = model(torch.tensor(prompt.input_ids[:-1], dtype=torch.long)[None]).logits[0, :, :VOCAB]
            for name, value in errors(captured[ordinal], logits.double().numpy()).items():
                worst[name] = max(worst.get(name, 0.0), value)
        worst["spread"] = float(logits.std())
        worst["compiled"] = float(bool(compiled))
        worst |= {"preemptions": preemptions, "lead": lead, "v2": float(runner == "vllm.v1.worker.cpu.model_runner")}
        report[Path(argument).name] = worst
    print(json.dumps(report))


if __name__ == "__main__":
    main()
