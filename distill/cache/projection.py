"""Moments of final hidden states and the LM head's Gram matrix flow in; a fitted projection and its quantiser flow out.

    c = A (h - mean)        coordinates, unit variance each      (teacher)
    q = floor(c / step)     integers of 2, 4, 6 or 8 bits        (teacher, stored)
    z = B c + b             logits, to rebuild the tail from     (student)

``N`` positions, ``D`` hidden size, ``R`` rank, ``V`` vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.cache import attention, inner, tensors
from distill.cache.attention import AttentionSpec
from distill.cache.inner import InnerProjection
from distill.errors import CorruptionError

CLIPS = {2: 2.0, 4: 3.2, 6: 4.0, 8: 5.0}  # clip in standard deviations for each width
ZERO_POINT = -0.5  # value = (q - ZERO_POINT) * step: no level stands at 0
# Mean squared error of a unit Gaussian after the quantiser of a width, with the clips above.
_DISTORTION = {0: 1.0, 2: 0.1189, 4: 0.01371, 6: 0.00131, 8: 0.000127}
_SMALLEST = 1e-9  # eigenvalues below this share of the largest are rounding noise
FORMAT = "distill-projection"
# What reading numbers out of text that anybody may have written can raise.
_UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Sums over final hidden states."""

    count: int
    sum_D: NDArray[np.float64]
    outer_DD: NDArray[np.float64]  # sum of h hᵀ


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionFit:
    """What a teacher needs: the map to coordinates, the map back to hidden states, and the widths.

    Coordinates are in order of falling variance; ``widths`` says, bits downwards, how many of them take each width.
    ``explained`` is the share of the total logit variance that the coordinates carry before quantisation.
    """

    mean_D: NDArray[np.float64]
    down_RD: NDArray[np.float64]  # A
    up_DR: NDArray[np.float64]  # S U: the basis is W @ up_DR
    variance_R: NDArray[np.float64]  # logit variance that each coordinate carries
    widths: tuple[tuple[int, int], ...]  # (bits, number of coordinates)
    explained: float


def fit_projection(moments: Moments, *, gram_DD: NDArray[np.float64], hidden_bytes: int) -> ProjectionFit:
    """The projection to ``hidden_bytes`` bytes that loses the least logit variance.

    ``gram_DD`` is WᵀW of the LM head over the real vocabulary with the mean of its rows removed. With C the covariance
    of the hidden states, S = C^½ and λ, U the eigenpairs of S WᵀW S, falling:

        A = Λ⁻¹ Uᵀ S WᵀW        (equal to Uᵀ S⁻¹, and stable where C is nearly singular)

    Rank and widths follow by reverse water-filling: two bits at a time go where they lower the summed squared error of
    the logits most, until the bytes are spent or every coordinate has 8 bits.
    """
    assert hidden_bytes > 0, "a cache without hidden states needs no projection"
    mean_D = moments.sum_D / moments.count
    root_DD = _symmetric_root(moments.outer_DD / moments.count - np.outer(mean_D, mean_D))
    product_DD = root_DD @ gram_DD @ root_DD
    eigenvalues_D, vectors_DD = np.linalg.eigh((product_DD + product_DD.T) / 2)
    variance_D, vectors_DD = np.clip(eigenvalues_D[::-1], 0.0, None), vectors_DD[:, ::-1]
    usable = int((variance_D > _SMALLEST * variance_D[0]).sum())
    widths = choose_widths(variance_D[:usable], budget_bits=8 * hidden_bytes)
    rank = sum(count for _, count in widths)
    up_DR = root_DD @ vectors_DD[:, :rank]
    return ProjectionFit(
        mean_D=mean_D,
        down_RD=(up_DR.T @ gram_DD) / variance_D[:rank, None],
        up_DR=up_DR,
        variance_R=variance_D[:rank],
        widths=widths,
        explained=float(variance_D[:rank].sum() / variance_D.sum()) if rank else 0.0,
    )


def _symmetric_root(matrix_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    values_D, vectors_DD = np.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    values_D = np.where(values_D > 1e-12 * values_D[-1], values_D, 0.0)
    root: NDArray[np.float64] = (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T
    return root


def choose_widths(variance_R: NDArray[np.float64], *, budget_bits: int) -> tuple[tuple[int, int], ...]:
    """How many coordinates take each width, bits downwards, for the least error within ``budget_bits`` per position.

    ``variance_R`` falls. Every step costs two bits and its gain falls from step to step, so taking the best steps
    first is optimal.
    """
    steps = list(zip(list(_DISTORTION)[:-1], list(_DISTORTION)[1:], strict=True))
    gains_SR = np.stack([variance_R * (_DISTORTION[low] - _DISTORTION[high]) for low, high in steps])
    best_first = np.argsort(-gains_SR, axis=None, kind="stable")[: budget_bits // 2]
    reached = np.bincount(best_first // max(len(variance_R), 1), minlength=len(steps))
    beyond = [*reached[1:], 0]
    counts = [(bits, int(n - more)) for (_, bits), n, more in zip(steps, reached, beyond, strict=True) if n > more]
    return tuple(reversed(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What a cache keeps of the projection: all that quantising and rebuilding need.

    Tail logits are ``basis_VR @ c + bias_V``, then the soft cap where the teacher has one, times ``logit_scale``.
    ``layers`` and ``attention`` belong to the inner layers and the attention heads that the cache keeps, if any.
    """

    mean_D: NDArray[np.float32]
    down_RD: NDArray[np.float32]  # A
    basis_VR: NDArray[np.float16]  # B
    bias_V: NDArray[np.float32]  # b
    variance_R: NDArray[np.float32]  # logit variance that each coordinate carries
    widths: tuple[tuple[int, int], ...]  # (bits, number of coordinates), bits downwards
    logit_scale: float
    soft_cap: float | None
    explained: float  # share of the logit variance that the coordinates carry
    layers: dict[int, InnerProjection] = field(default_factory=dict)
    attention: dict[int, AttentionSpec] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """R, the number of coordinates."""
        return sum(count for _, count in self.widths)

    @property
    def level_size(self) -> NDArray[np.float32]:
        """How much of a coordinate, whose variance is 1, is one of its integer: [R]."""
        return np.concatenate([np.full(count, step_of(bits), np.float32) for bits, count in self.widths])

    @property
    def sha256(self) -> str:
        """Hash of ``to_bytes()``, which commits and manifest name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def quantise(self, coords_NR: NDArray[np.floating]) -> dict[int, NDArray[np.int8]]:
        """Coordinates as small integers: bits -> [N, r_bits] int8 in [-2^(bits-1), 2^(bits-1) - 1]."""
        hidden: dict[int, NDArray[np.int8]] = {}
        start = 0
        for bits, count in self.widths:
            half = 2 ** (bits - 1)
            levels = np.floor(coords_NR[:, start : start + count] / np.float32(step_of(bits)))
            hidden[bits] = np.clip(levels, -half, half - 1).astype(np.int8)
            start += count
        return hidden

    def dequantise(self, hidden: dict[int, NDArray[np.int8]]) -> NDArray[np.float32]:
        """The middle of each integer's interval: [N, R] float32."""
        levels_NR = np.concatenate([hidden[bits] for bits, _ in self.widths], axis=1)
        return (levels_NR + np.float32(0.5)) * self.level_size

    def tail_logits(self, coords_NR: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits over the vocabulary: [N, V] float32. Only their differences within a row mean anything."""
        logits_NV = coords_NR @ self.basis_VR.astype(np.float32).T + self.bias_V
        if self.soft_cap is not None:
            logits_NV = self.soft_cap * np.tanh(logits_NV / self.soft_cap)
        scaled: NDArray[np.float32] = (logits_NV * np.float32(self.logit_scale)).astype(np.float32)
        return scaled

    def to_bytes(self) -> bytes:
        """The projection as a safetensors file that describes itself in its metadata."""
        metadata = {
            "format": FORMAT,
            "schema_version": "1",
            "widths": json.dumps([list(pair) for pair in self.widths]),
            "clips": json.dumps({str(bits): CLIPS[bits] for bits, _ in self.widths}),
            "zero_point": str(ZERO_POINT),
            "explained": repr(self.explained),
            "logit_scale": repr(self.logit_scale),
            "soft_cap": json.dumps(self.soft_cap),
            **inner.to_metadata(self.layers),
            **attention.to_metadata(self.attention),
        }
        arrays: dict[str, NDArray[Any]] = {
            "mean": self.mean_D.astype(np.float32),
            "down": self.down_RD.astype(np.float32),
            "basis": self.basis_VR.astype(np.float16),
            "bias": self.bias_V.astype(np.float32),
            "variance": self.variance_R.astype(np.float32),
            **inner.to_arrays(self.layers),
            **attention.to_arrays(self.attention),
        }
        return tensors.dump(arrays, metadata)

    @staticmethod
    def from_bytes(data: bytes) -> "Projection":
        """The projection in ``data``. Raises CorruptionError when it is not one of this version."""
        arrays, metadata = tensors.load(data, name="projection.safetensors")
        try:
            widths = tuple((int(bits), int(count)) for bits, count in json.loads(metadata["widths"]))
            projection = Projection(
                mean_D=arrays["mean"],
                down_RD=arrays["down"],
                basis_VR=arrays["basis"],
                bias_V=arrays["bias"],
                variance_R=arrays["variance"],
                widths=widths,
                logit_scale=float(metadata["logit_scale"]),
                soft_cap=_number_or_none(metadata["soft_cap"]),
                explained=float(metadata["explained"]),
                layers=inner.from_file(arrays, metadata),
                attention=attention.from_file(arrays, metadata),
            )
            clips = {int(bits): clip for bits, clip in json.loads(metadata["clips"]).items()}
            version = (metadata["format"], metadata["schema_version"], float(metadata["zero_point"]))
        except _UNREADABLE as error:
            raise CorruptionError(
                f"projection.safetensors lacks or garbles {error}. Restore it from a copy."
            ) from error
        _check(projection, clips=clips, version=version)
        return projection


def widths_of(path: Path) -> tuple[tuple[int, int], ...]:
    """The widths in a projection file, without reading its arrays. Raises CorruptionError when it is damaged."""
    metadata = tensors.read_metadata(path)
    try:
        return tuple((int(bits), int(count)) for bits, count in json.loads(metadata["widths"]))
    except _UNREADABLE as error:
        raise CorruptionError(f"{path} does not state its widths. Restore it from a copy.") from error


def step_of(bits: int) -> float:
    """Width of one quantiser level, in standard deviations."""
    return 2.0 * CLIPS[bits] / (1 << bits)


def _check(projection: Projection, *, clips: dict[int, float], version: tuple[str, str, float]) -> None:
    if version != (FORMAT, "1", ZERO_POINT) or clips != {bits: CLIPS.get(bits) for bits, _ in projection.widths}:
        raise CorruptionError(
            f"projection.safetensors says format, version, zero point {version} and clips {clips}, which this version "
            "of distill does not write. Use the version that wrote the cache, or restore the file from a copy."
        )
    rank = projection.rank
    arrays: dict[str, tuple[NDArray[Any], Any, tuple[int, ...]]] = {
        "mean": (projection.mean_D, np.float32, projection.down_RD.shape[-1:]),
        "down": (projection.down_RD, np.float32, (rank, *projection.mean_D.shape)),
        "basis": (projection.basis_VR, np.float16, (*projection.bias_V.shape, rank)),
        "bias": (projection.bias_V, np.float32, projection.basis_VR.shape[:1]),
        "variance": (projection.variance_R, np.float32, (rank,)),
    }
    for name, (values, dtype, shape) in arrays.items():
        if (values.dtype, values.shape, values.ndim) != (dtype, shape, 2 if name in ("down", "basis") else 1):
            raise CorruptionError(
                f"projection.safetensors: '{name}' has shape {values.shape} and type {values.dtype} where {shape} and "
                f"{np.dtype(dtype)} are due. Restore it from a copy."
            )


def _number_or_none(text: str) -> float | None:
    value = json.loads(text)
    return None if value is None else float(value)
