"""The vLLM teacher: a stream of prompts flows in through a window, captured arrays flow out.

vLLM does what it is good at (batching, paged attention, tensor and pipeline parallelism); the statistics are taken
inside its workers (``distill.teacher.vllm_worker``). Prefix caching is off, since positions that a cache supplies are
never computed. Each sequence is sent without its last token: L-1 prompt tokens give exactly the L-1 targets.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import EngineError, RetryError, UsageError
from distill.records import Prompt, Question, Targets
from distill.teacher.engine import Answer, FloatArray, Writing, first_trained, question_id, seed_of, targets_of
from distill.teacher.guard import Guard
from distill.teacher.vllm_names import check_installed

Mode = Literal["targets", "moments", "hidden", "inner"]

_NOTHING = np.zeros(0, np.int32)
_ADVICE = "If it ran out of memory, lower engine_options.max_num_batched_tokens or gpu_memory_utilization."
_OLDEST = (0, 18)  # older releases load remote code without being asked to
# Options that capture depends on.
_OURS = (
    "model",
    "worker_cls",
    "additional_config",
    "enable_prefix_caching",
    "speculative_config",
    "trust_remote_code",
    "dtype",
)


class VllmEngine:
    """A teacher loaded in vLLM. ``engine_options`` of the configuration go to ``vllm.LLM`` as they are."""

    batch_option = "max_num_batched_tokens"

    def __init__(self, config: CacheConfig, *, vocab_size: int) -> None:
        for option in _OURS:
            if option in config.engine_options:
                raise UsageError(f"engine_options.{option} is set by distill itself; remove it from engine_options.")
        longest = config.engine_options.get("max_model_len", config.max_length)
        if isinstance(longest, int) and 0 < longest < config.max_length:
            raise UsageError(
                f"engine_options.max_model_len is {longest}, and sequences may have {config.max_length} tokens. Choose "
                f"--max-length {longest}, or leave max_model_len out."
            )
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
        from vllm.platforms import current_platform

        version = str(vllm.__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            raise UsageError(f"vllm {version} is too old; install vllm {'.'.join(map(str, _OLDEST))} or newer.")
        check_installed(version, inner=bool(config.targets.layers or config.targets.heads))
        defaults: dict[str, Any] = {"max_model_len": config.max_length, "disable_log_stats": True}
        self._is_cpu: bool = current_platform.is_cpu()
        if self._is_cpu:
            # One process: an engine process of its own would only fight for the same cores.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 16}
        settings = {
            "top_k": config.targets.top_k,
            "temperatures": list(config.targets.temperatures),
            "num_samples": config.targets.num_samples,
            "vocab_size": vocab_size,
            "float32_head": config.head_dtype == "float32",
            "targets": config.targets.model_dump(mode="json"),
        }
        try:
            self._llm = vllm.LLM(
                model=config.teacher,
                revision=config.revision,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                worker_cls="distill.teacher.vllm_worker.CaptureWorker",
                additional_config={"distill": settings},
                **{**defaults, **config.engine_options},
            )
        except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
            raise UsageError(f"vllm {version} refuses {config.teacher} or engine_options: {error}") from error
        except Exception as error:
            raise RetryError(
                f"vllm {version} could not start with {config.teacher}: {error}. Nothing written so far is lost; "
                "check the GPU memory, engine_options and the teacher's folder, then run the same command again."
            ) from error
        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        self.batch_tokens: int = scheduler.max_num_batched_tokens
        # An engine in a process of its own says nothing until a sequence, which may take several passes, is through.
        num_passes = max(1, math.ceil(config.max_length / self.batch_tokens))
        self._guard = Guard("vllm", failures=Exception, advice=_ADVICE, limit_s=config.stall_seconds * num_passes)
        self._vocab_size = vocab_size
        self._window = 2 * scheduler.max_num_seqs
        self._request_ids = count()
        facts = next(reply for reply in self._call("capture_facts") if reply is not None)
        if facts["inner_refusal"]:
            self.close()
            raise UsageError(f"vllm {version}: {facts['inner_refusal']}. Or keep no inner layers and no heads.")
        self.soft_cap: float | None = facts["soft_cap"]
        self.logit_scale: float = facts["scale"]

    def moments(self, prompts: Iterable[Prompt]) -> Moments:
        for _ in self._run(prompts, "moments"):
            pass
        sums = self._replies("capture_take_moments")[0]
        return Moments(count=int(sums["count"][0]), sum_D=sums["sum"], outer_DD=sums["outer"])

    def hidden_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for ordinal, arrays in self._run(prompts, "hidden"):
            yield ordinal, arrays["hidden"]

    def inner_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        for ordinal, arrays in self._run(prompts, "inner"):
            yield ordinal, {int(layer): states for layer, states in arrays.items()}

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        for ordinal, arrays in self._run(prompts, "targets"):
            yield ordinal, targets_of(arrays)

    def answer(self, items: Iterable[Prompt | Question], writing: Writing) -> Iterator[Answer]:
        for ordinal, arrays in self._run(items, "targets", writing):
            yield ordinal, arrays.pop("answer", _NOTHING), targets_of(arrays)

    def install(self, projection: Projection | None) -> None:
        self._call("capture_install", projection.to_bytes() if projection else b"")

    def head_gram(self) -> NDArray[np.float64]:
        slices = self._replies("capture_head_gram")
        total_D = np.sum([part["sum"] for part in slices], axis=0)
        gram_DD: NDArray[np.float64] = np.sum([part["gram"] for part in slices], axis=0)
        gram_DD -= np.outer(total_D, total_D) / self._vocab_size
        return gram_DD

    def head_times(self, matrix_DR: FloatArray) -> NDArray[np.float32]:
        return self._head_slices(matrix_DR, "product")

    def head_bias(self) -> NDArray[np.float32]:
        nothing_D1 = np.zeros((self._llm.llm_engine.model_config.get_hidden_size(), 1), np.float32)
        return self._head_slices(nothing_D1, "bias")

    def head_logprobs(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        slices = self._replies("capture_head_logits", save({"hidden": np.ascontiguousarray(hidden_ND)}))
        logits_NV = np.concatenate([part["logits"] for part in _in_order(slices)], axis=1).astype(np.float64)
        logits_NV -= logits_NV.max(axis=1, keepdims=True)
        logits_NV -= np.log(np.exp(logits_NV).sum(axis=1, keepdims=True))
        logprobs_NV: NDArray[np.float32] = logits_NV.astype(np.float32)
        return logprobs_NV

    def close(self) -> None:
        self._guard.close()
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _head_slices(self, matrix_DR: FloatArray, name: str) -> NDArray[np.float32]:
        matrix = np.ascontiguousarray(matrix_DR, dtype=np.float32)
        slices = self._replies("capture_head_times", save({"matrix": matrix}))
        joined: NDArray[np.float32] = np.concatenate([part[name] for part in _in_order(slices)])
        return joined

    def _replies(self, method: str, *args: object) -> list[dict[str, NDArray[Any]]]:
        return [load(reply) for reply in self._call(method, *args) if reply is not None]

    def _call(self, method: str, *args: object) -> list[Any]:
        """What each worker answers."""
        with self._guard:
            replies: list[Any] = self._llm.collective_rpc(method, args=args)
        return replies

    def _step(self) -> list[Any]:
        with self._guard:
            outputs: list[Any] = self._llm.llm_engine.step()
        return outputs

    def _run(
        self, items: Iterable[Prompt | Question], mode: Mode, writing: Writing | None = None
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Keeps a window of requests running; memory is bounded by the window, not by the number of items."""
        self._call("capture_begin", mode)
        source = enumerate(items)
        waiting: dict[int, _Waiting] = {}
        running: dict[str, int] = {}  # request -> ordinal
        unread, exhausted = 0, False
        while running or waiting or not exhausted:
            while len(running) < self._window and not exhausted:
                following = next(source, None)
                if following is None:
                    exhausted = True
                    break
                ordinal, item = following
                running[self._submit(ordinal, item, writing)] = ordinal
                waiting[ordinal] = _Waiting(item=item)
            for output in self._step() if running else ():
                if output.finished:
                    # With several steps in flight a prompt may have been captured and taken already.
                    if entry := waiting.get(running.pop(output.request_id)):
                        entry.finish(output)
                    unread += 1
            if not running or unread >= self._window // 4:
                yield from self._finished(waiting)
                unread = 0
            if not running and exhausted and waiting:
                raise EngineError(
                    f"The vllm engine finished {len(waiting)} sequences without all their positions captured. {_ADVICE}"
                )

    def _submit(self, ordinal: int, item: Prompt | Question, writing: Writing | None) -> str:
        """The new request's id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
        ids = item.input_ids
        key: dict[str, Any] = {"key": ordinal, "first_trained": 0, "is_open": False}
        if isinstance(item, Prompt):
            ids = ids[:-1]
            key |= {"seed": seed_of(item.sequence_id), "num_positions": item.num_targets}
            key["first_trained"] = first_trained(item)
        else:
            assert writing is not None
            most = writing.most(item)
            key |= {"seed": seed_of(question_id(item)), "num_positions": len(ids) + most - 1, "is_open": True}
            options = {
                "max_tokens": most,
                "temperature": writing.temperature,
                "top_p": writing.top_p,
                "stop_token_ids": list(writing.stop_ids),
                # On a CPU vLLM cannot take a draw of a prompt's unfinished part back from a seeded generator.
                "seed": None if self._is_cpu else writing.seed_for(item),
            }
        parameters = SamplingParams(
            **options,
            ignore_eos=True,  # stop_token_ids say where an answer ends
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"distill": key},
        )
        request_id = str(next(self._request_ids))
        with self._guard:
            self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": ids.tolist()}, parameters)
        return request_id

    def _finished(self, waiting: dict[int, "_Waiting"]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        ended = [[ordinal, entry.num_positions] for ordinal, entry in waiting.items() if entry.answer is not None]
        done: dict[int, dict[str, NDArray[Any]]] = {}
        for name, values in self._replies("capture_take", ended)[0].items():
            key, _, array = name.partition("/")
            done.setdefault(int(key), {})[array] = values
        for ordinal, arrays in done.items():
            entry = waiting.pop(ordinal)
            assert all(len(values) == entry.num_positions for values in arrays.values()), "one row for each position"
            yield ordinal, arrays if entry.answer is None else {**arrays, "answer": entry.answer}


@dataclass(slots=True, kw_only=True)
class _Waiting:
    """An item on its way; ``answer`` is known when a question's request has finished."""

    item: Prompt | Question
    answer: NDArray[np.int32] | None = None

    def finish(self, output: Any) -> None:
        if isinstance(self.item, Question):
            self.answer = np.array(output.outputs[0].token_ids, np.int32)

    @property
    def num_positions(self) -> int:
        if isinstance(self.item, Prompt):
            return self.item.num_targets
        assert self.answer is not None, "asked before the answer has ended"
        return len(self.item.input_ids) + len(self.answer) - 1


def _in_order(slices: list[dict[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
    return sorted(slices, key=lambda part: int(part["first"][0]))
