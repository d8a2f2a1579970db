"""A teacher's distribution flows in, what other tools keep of it and the target they make of that flow out.

Each peer is measured alike: its own codec, its columns in zstd Parquet, decoded to arrays that a loss could use.
DistillKit's code is imported from the checkout that is named, nothing of it is here.

``N`` positions, ``K`` kept ids, ``S`` draws, ``V`` vocabulary.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]  # name -> [N, …]


class Peer(Protocol):
    """One way to keep a teacher's distribution."""

    name: str

    def prepare(self, logprobs_NV: torch.Tensor) -> Any:
        """What the teacher's side has at hand before anything is encoded: top-k or draws."""

    def encode(self, prepared: Any) -> Columns:
        """The columns that are stored."""

    def decode(self, columns: Columns) -> Any:
        """What a trainer starts from."""

    def target(self, decoded: Any, positions: slice, temperature: float, vocab: int) -> NDArray[np.float64] | None:
        """The distribution that the trainer is given at a temperature, [N, V]; None where it offers none."""


def stored(columns: Columns) -> bytes:
    """The columns as Parquet: flat lists, one row, zstd level 3."""
    arrays = {name: pa.array([values.reshape(-1)]) for name, values in columns.items()}
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file, compression="zstd", compression_level=3)
    return file.getvalue()


def loaded(data: bytes, shapes: dict[str, tuple[int, ...]]) -> Columns:
    """The columns back."""
    table = pq.read_table(io.BytesIO(data), use_threads=False)
    return {name: table[name].chunk(0).values.to_numpy().reshape(shape) for name, shape in shapes.items()}


def timed(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of the processor and the last result; once before to warm up.

    The processor's time, not the clock's: with one thread they are the same, unless the machine is busy.
    """
    result = action()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = action()
        seconds.append(time.process_time() - started)
    return float(np.median(seconds)), result


def spread(ids_NK: NDArray[Any], probs_NK: NDArray[Any], vocab: int) -> NDArray[np.float64]:
    """Kept probabilities over the vocabulary, and what is left to 1 evenly over the other ids."""
    probs_NK = np.asarray(probs_NK, np.float64)
    rest_N = np.clip(1 - probs_NK.sum(1), 0, 1) / max(1, vocab - ids_NK.shape[1])
    probs_NV = np.repeat(rest_N[:, None], vocab, axis=1)
    np.put_along_axis(probs_NV, ids_NK, probs_NK, axis=1)
    return probs_NV


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The usual: k ids and log-probabilities, divided by T and renormalised."""

    top_k: int = 64

    @property
    def name(self) -> str:
        return f"top-k, renormalised (k={self.top_k})"

    def prepare(self, logprobs_NV: torch.Tensor) -> Any:
        return logprobs_NV.topk(self.top_k)

    def encode(self, prepared: Any) -> Columns:
        return {"ids": prepared.indices.int().numpy(), "logprobs": prepared.values.half().numpy()}

    def decode(self, columns: Columns) -> Any:
        return columns["ids"], columns["logprobs"].astype(np.float32)

    def target(self, decoded: Any, positions: slice, temperature: float, vocab: int) -> NDArray[np.float64]:
        ids_NK, logprobs_NK = (values[positions] for values in decoded)
        weights_NK = np.exp(logprobs_NK.astype(np.float64) / temperature)
        return spread(ids_NK, weights_NK / weights_NK.sum(1, keepdims=True), vocab)


@dataclass(frozen=True, kw_only=True)
class RandomSampling:
    """Random Sampling KD (Anshumann et al. 2025): ids drawn from the teacher at T=1, kept as unique ids with counts.

    The target at T=1 is count / draws, whose expectation is the teacher. Nothing is kept that would serve another
    temperature, so the target there is the tempered histogram, which is all that can be made of it. An id and its
    count take three bytes: 17 bits and 7.
    """

    draws: int = 50
    seed: int = 0

    @property
    def name(self) -> str:
        return f"Random Sampling KD ({self.draws} draws)"

    def prepare(self, logprobs_NV: torch.Tensor) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(self.seed)
        probs_NV = logprobs_NV.exp()
        drawn_NS = torch.multinomial(probs_NV, self.draws, replacement=True, generator=generator)
        return drawn_NS.numpy()

    def encode(self, prepared: NDArray[np.int64]) -> Columns:
        ids_NS = np.sort(prepared, axis=1)
        first_NS = np.ones(ids_NS.shape, bool)
        first_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
        starts = np.flatnonzero(first_NS)
        counts = np.diff(np.append(starts, ids_NS.size))
        packed = (ids_NS.reshape(-1)[starts] << 7) | counts
        return {"packed": packed.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].copy()}

    def decode(self, columns: Columns) -> Any:
        """Position, id and count of each unique id."""
        packed = np.zeros((len(columns["packed"]), 4), np.uint8)
        packed[:, :3] = columns["packed"]
        numbers = packed.view("<u4")[:, 0].astype(np.int64)
        ids, counts = numbers >> 7, numbers & 127
        return (np.cumsum(counts) - counts) // self.draws, ids, counts

    def target(self, decoded: Any, positions: slice, temperature: float, vocab: int) -> NDArray[np.float64]:
        position, ids, counts = decoded
        inside = (position >= positions.start) & (position < positions.stop)
        probs_NV = np.zeros((positions.stop - positions.start, vocab))
        probs_NV[position[inside] - positions.start, ids[inside]] = (counts[inside] / self.draws) ** (1 / temperature)
        return np.asarray(probs_NV / probs_NV.sum(1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class DistillKit:
    """DistillKit's ``LogprobCompressor`` and the target that its losses make of it.

    ``settings`` are those of its configuration, but d; ``missing`` its ``missing_probability_handling``.
    """

    label: str
    settings: dict[str, Any]
    missing: str

    @property
    def name(self) -> str:
        return f"DistillKit, {self.label} (k={self.settings['k']}), {self.missing}"

    def _compressor(self, vocab: int) -> Any:
        from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

        return LogprobCompressor(config=DistributionQuantizationConfig(d=vocab, **self.settings))

    def prepare(self, logprobs_NV: torch.Tensor) -> Any:
        top = logprobs_NV.topk(self.settings["k"])
        return self._compressor(logprobs_NV.shape[1]), top.indices[None], top.values[None]

    def encode(self, prepared: Any) -> Columns:
        compressor, ids_1NK, logprobs_1NK = prepared
        made = compressor.compress_from_sparse(ids_1NK, logprobs_1NK)
        return {name: values[0].numpy() for name, values in made.items()}

    def decode(self, columns: Columns) -> Any:
        vocab = 2 ** (columns["bytepacked_indices"].shape[1] * 8 // self.settings["k"])  # it matters by its bits only
        compressor = self._compressor(vocab)
        row = {name: torch.from_numpy(values.copy())[None] for name, values in columns.items()}
        ids_1NK, logprobs_1NK = compressor.decompress_to_sparse(row)
        return ids_1NK[0].numpy(), logprobs_1NK[0]

    def target(self, decoded: Any, positions: slice, temperature: float, vocab: int) -> NDArray[np.float64]:
        from distillkit.lossfuncs.common import get_target_logprobs
        from distillkit.missing_probability import MissingProbabilityHandling

        log_p_NK = get_target_logprobs(
            decoded[1][positions].float(),
            log_target=True,
            distillation_temperature=temperature,
            target_generation_temperature=1.0,
            missing=MissingProbabilityHandling(self.missing),
        )
        return spread(decoded[0][positions], log_p_NK.double().exp().numpy(), vocab)


RECOMMENDED = {
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
BUDGET = {**RECOMMENDED, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}
