"""The vLLM teacher: a stream of prompts flows in through a window, captured arrays flow out.

vLLM does what it is good at (batching, paged attention, tensor and pipeline parallelism); the statistics are taken
inside its workers (``distill.teacher.vllm_worker``). Prefix caching is off, since positions that a cache supplies are
never computed. Each sequence is sent without its last token: L-1 prompt tokens give exactly the L-1 targets.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import RetryError, UsageError
from distill.records import Prompt, Targets
from distill.teacher.engine import FloatArray, first_trained
from distill.teacher.vllm_names import check_installed

Mode = Literal["targets", "moments", "hidden"]

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

    name = "vllm"

    def __init__(self, config: CacheConfig, *, vocab_size: int) -> None:
        for option in _OURS:
            if option in config.engine_options:
                raise UsageError(f"engine_options.{option} is set by distill itself; remove it from engine_options.")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
        from vllm.platforms import current_platform

        self.version = str(vllm.__version__)
        if tuple(int(part) for part in self.version.split(".")[:2]) < _OLDEST:
            raise UsageError(f"vllm {self.version} is too old; install vllm {'.'.join(map(str, _OLDEST))} or newer.")
        check_installed(self.version)
        defaults: dict[str, Any] = {"max_model_len": config.max_length, "disable_log_stats": True}
        if current_platform.is_cpu():
            # One process: an engine process of its own would only fight for the same cores.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 16}
        settings = {
            "top_k": config.targets.top_k,
            "temperatures": list(config.targets.temperatures),
            "vocab_size": vocab_size,
            "float32_head": config.head_dtype == "float32",
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
            raise UsageError(f"vllm {self.version} refuses {config.teacher} or engine_options: {error}") from error
        except Exception as error:
            raise RetryError(
                f"vllm {self.version} could not start with {config.teacher}: {error}. Nothing written so far is lost; "
                "check the GPU memory, engine_options and the teacher's folder, then run the same command again."
            ) from error
        self._vocab_size = vocab_size
        self._window = 2 * self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._request_ids = count()
        facts = next(reply for reply in self._llm.collective_rpc("capture_facts") if reply is not None)
        self.dtype: str = facts["dtype"]
        self.kv_cache_dtype: str = facts["kv_cache_dtype"]
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

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        for ordinal, arrays in self._run(prompts, "targets"):
            hidden = {
                int(name.removeprefix("hidden_")): values
                for name, values in arrays.items()
                if name.startswith("hidden_")
            }
            kept = {name: values for name, values in arrays.items() if not name.startswith("hidden_")}
            yield ordinal, Targets(**kept, hidden=hidden)

    def install(self, projection: Projection | None) -> None:
        self._llm.collective_rpc("capture_install", args=(projection.to_bytes() if projection else b"",))

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
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _head_slices(self, matrix_DR: FloatArray, name: str) -> NDArray[np.float32]:
        matrix = np.ascontiguousarray(matrix_DR, dtype=np.float32)
        slices = self._replies("capture_head_times", save({"matrix": matrix}))
        joined: NDArray[np.float32] = np.concatenate([part[name] for part in _in_order(slices)])
        return joined

    def _replies(self, method: str, *args: bytes) -> list[dict[str, NDArray[Any]]]:
        return [load(reply) for reply in self._llm.collective_rpc(method, args=args) if reply is not None]

    def _run(self, prompts: Iterable[Prompt], mode: Mode) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Keeps a window of requests running; memory is bounded by the window, not by the number of prompts."""
        try:
            yield from self._stream(prompts, mode)
        except _engine_failures() as error:
            raise RetryError(
                f"The vllm engine stopped: {error}. Committed units are kept; run the same command again to go on. If "
                "it ran out of memory, lower engine_options.max_num_batched_tokens or gpu_memory_utilization."
            ) from error

    def _stream(self, prompts: Iterable[Prompt], mode: Mode) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        engine = self._llm.llm_engine
        self._llm.collective_rpc("capture_begin", args=(mode,))
        source = enumerate(prompts)
        waiting: dict[int, int] = {}  # ordinal -> positions
        running, unread, exhausted = 0, 0, False
        while waiting or not exhausted:
            while running < self._window and not exhausted:
                entry = next(source, None)
                if entry is None:
                    exhausted = True
                    break
                self._submit(*entry)
                waiting[entry[0]] = entry[1].num_targets
                running += 1
            if running:
                finished = sum(output.finished for output in engine.step())
                running, unread = running - finished, unread + finished
            if not running or unread >= self._window // 4:
                yield from self._finished(waiting)
                unread = 0
            if not running and exhausted and waiting:
                raise RuntimeError(f"{len(waiting)} sequences finished without all their positions captured")

    def _submit(self, ordinal: int, prompt: Prompt) -> None:
        from vllm import SamplingParams

        key = {"key": ordinal, "num_positions": prompt.num_targets, "first_trained": first_trained(prompt)}
        parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False, extra_args={"distill": key})
        self._llm.llm_engine.add_request(
            str(next(self._request_ids)), {"prompt_token_ids": prompt.input_ids[:-1].tolist()}, parameters
        )

    def _finished(self, waiting: dict[int, int]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        done: dict[int, dict[str, NDArray[Any]]] = {}
        for name, values in self._replies("capture_take")[0].items():
            key, _, array = name.partition("/")
            done.setdefault(int(key), {})[array] = values
        for ordinal, arrays in done.items():
            expected = waiting.pop(ordinal)
            assert all(len(values) == expected for values in arrays.values()), "one row for each position"
            yield ordinal, arrays


def _in_order(slices: list[dict[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
    return sorted(slices, key=lambda part: int(part["first"][0]))


def _engine_failures() -> tuple[type[Exception], ...]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    return EngineDeadError, EngineGenerateError, RuntimeError
