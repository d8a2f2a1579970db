"""States of an inner layer flow in, small integers flow out, and back.

    c = P h                           coordinates: P has orthonormal rows, seeded by the layer's number
    q = floor((c - centre) / step)    int8, centre and step for each coordinate

No LM head says which directions of an inner layer matter, so the projection is random: it keeps distances and angles.
Centre and step come from the calibration pass. Position 0 is left out there: one of its dimensions may hold nearly all
of the variance of the layer. Its values are clipped, so that a feature loss should leave it out too.

``N`` positions, ``D`` hidden size, ``B`` coordinates, one byte each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import CorruptionError

_SEED = 20_480_001  # of every projection, together with the layer's number
_KEPT = 0.9995  # share of a coordinate's calibration values that is not clipped at either end
_MARGIN = 1.1  # the range is this much wider than what calibration saw
_NAMES = ("down", "centre", "step")
# Levels of the quantiser in one standard deviation of a coordinate, for Gaussian ones.
LEVELS_PER_DEVIATION = 256 / (_MARGIN * 2 * NormalDist().inv_cdf(_KEPT))


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerProjection:
    """One inner layer's map to coordinates and their quantiser."""

    down: NDArray[np.float32]  # [B, D], P
    centre: NDArray[np.float32]  # [B]
    step: NDArray[np.float32]  # [B], width of one quantiser level

    def quantise(self, states_ND: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
        """``layer<i>_hidden`` [N, B] of the layer's inputs."""
        levels_NB = np.floor((states_ND.astype(np.float32) @ self.down.T - self.centre) / self.step)
        hidden_NB: NDArray[np.int8] = np.clip(levels_NB, -128, 127).astype(np.int8)
        return hidden_NB

    def dequantise(self, hidden_NB: NDArray[np.int8]) -> NDArray[np.float32]:
        """The coordinates P h at the middle of each integer's interval: [N, B] float32."""
        coords_NB: NDArray[np.float32] = (hidden_NB.astype(np.float32) + np.float32(0.5)) * self.step + self.centre
        return coords_NB


def orthonormal(layer: int, *, dim: int, num: int) -> NDArray[np.float32]:
    """``num`` orthonormal rows of length ``dim``: [num, dim] float32, the same for a layer whoever asks."""
    assert num <= dim, "there are no more orthonormal rows than dimensions"
    gaussian = np.random.default_rng([_SEED, layer]).standard_normal((dim, num))
    q_DB, r_BB = np.linalg.qr(gaussian)
    rows: NDArray[np.float32] = np.ascontiguousarray((q_DB * np.sign(np.diag(r_BB))).T.astype(np.float32))
    return rows


def fit_inner(down_BD: NDArray[np.float32], coords_NB: NDArray[np.float32]) -> InnerProjection:
    """The quantiser of the coordinates that calibration saw, position 0 left out."""
    low_B, high_B = np.quantile(coords_NB.astype(np.float64), [1 - _KEPT, _KEPT], axis=0)
    centre_B = (low_B + high_B) / 2
    least_B = 1e-6 * np.abs(centre_B) + 1e-9  # a coordinate that never moves
    step_B = np.maximum(_MARGIN * (high_B - low_B) / 256, least_B)
    return InnerProjection(down=down_BD, centre=centre_B.astype(np.float32), step=step_B.astype(np.float32))


def to_arrays(layers: Mapping[int, InnerProjection]) -> dict[str, NDArray[Any]]:
    """The arrays of ``projection.safetensors``: ``layer<i>_down``, ``layer<i>_centre``, ``layer<i>_step``."""
    return {
        f"layer{layer}_{name}": getattr(projection, name).astype(np.float32)
        for layer, projection in layers.items()
        for name in _NAMES
    }


def to_metadata(layers: Mapping[int, InnerProjection]) -> dict[str, str]:
    """The entry of the file's metadata: the layers' numbers; nothing where there are none."""
    return {"layers": json.dumps(sorted(layers))} if layers else {}


def from_file(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> dict[int, InnerProjection]:
    """The inner layers in a projection file; none in a file without them.

    Raises CorruptionError when an array has the wrong shape, KeyError, ValueError or TypeError when the file garbles
    or lacks something.
    """
    layers: dict[int, InnerProjection] = {}
    for number in list(json.loads(metadata.get("layers", "[]"))):
        layer = int(number)
        projection = InnerProjection(**{name: arrays[f"layer{layer}_{name}"] for name in _NAMES})
        num = len(projection.centre)
        shapes = (projection.down.shape[:1], projection.centre.shape, projection.step.shape)
        types = {getattr(projection, name).dtype for name in _NAMES}
        if projection.down.ndim != 2 or shapes != ((num,),) * 3 or types != {np.dtype(np.float32)}:
            raise CorruptionError(
                f"projection.safetensors: the arrays of layer {layer} do not fit together. Restore it from a copy."
            )
        layers[layer] = projection
    return layers
