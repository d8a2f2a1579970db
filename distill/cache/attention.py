"""Kept queries and keys of a layer and its constants flow in, the teacher's attention maps flow out.

    q' = (R(q + q_bias), R(k + k_bias))        R: rotary embedding at the position
    map = softmax(cap(softmax_scale * q' k'))  over the positions up to the query's own

The columns ``layer<i>_q`` and ``layer<i>_k`` hold queries and keys as the projection gives them, without its bias and
before the rotary embedding (after the norm of queries and keys where the teacher has one). What is missing to rebuild
the maps lies in ``projection.safetensors``, as an ``AttentionSpec`` for each layer. This is the reference; a loss may
do the same on its own device.

``L`` positions, ``H`` kept query heads, ``G`` kept key heads, ``d`` head dimension, ``F`` rotary frequencies.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import CorruptionError

_PLAIN = ("heads", "kv_heads", "group", "head_dim", "rope_factor", "interleaved", "softmax_scale", "soft_cap", "window")
_ARRAYS = ("q_bias", "k_bias", "inv_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a layer does to its queries and keys before the softmax.

    ``group`` says for each of ``heads`` where in ``kv_heads`` the keys lie that it attends with. ``inv_freq`` is empty
    in a layer without rotary embedding; with ``interleaved`` the pairs that it turns are neighbours (2j, 2j + 1),
    otherwise (j, j + F). ``rope_factor`` multiplies the turned coordinates (YaRN), of queries and of keys.
    """

    heads: tuple[int, ...]  # query heads, rising
    kv_heads: tuple[int, ...]  # key heads, rising
    group: tuple[int, ...]
    head_dim: int
    q_bias: NDArray[np.float32] | None  # [H, d]
    k_bias: NDArray[np.float32] | None  # [G, d]
    inv_freq: NDArray[np.float32]  # [F], radians for each position
    rope_factor: float
    interleaved: bool
    softmax_scale: float
    soft_cap: float | None
    window: int | None  # positions that a query sees, itself among them; None: all before it


def dequantise(values: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """``layer<i>_q`` [L, H * d] and ``layer<i>_q_scale`` [L, H], or the keys' columns, as [L, H, d] float32."""
    by_head: NDArray[np.float32] = values.reshape(*scale.shape, -1).astype(np.float32)
    by_head *= scale[..., None]
    return by_head


def rebuild_map(q_LHd: NDArray[Any], k_LGd: NDArray[Any], spec: AttentionSpec) -> NDArray[np.float64]:
    """The teacher's attention probabilities [H, L, L] float64.

    Queries [L, H, d] and keys [L, G, d] are those of positions 0 to L-1, as ``dequantise`` gives them.
    ``map[h, i, j]`` is how much of head h's attention position i gives to position j; 0 for j above i.
    """
    q_LHd = rotate(_biased(q_LHd, spec.q_bias), spec)
    k_LHd = rotate(_biased(k_LGd, spec.k_bias), spec)[:, list(spec.group)]
    scores_HLL = np.einsum("ihd,jhd->hij", q_LHd, k_LHd) * spec.softmax_scale
    if spec.soft_cap is not None:
        scores_HLL = spec.soft_cap * np.tanh(scores_HLL / spec.soft_cap)
    distance_LL = np.subtract.outer(np.arange(len(q_LHd)), np.arange(len(q_LHd)))
    hidden_LL = distance_LL < 0
    if spec.window is not None:
        hidden_LL |= distance_LL >= spec.window
    scores_HLL = np.where(hidden_LL, -np.inf, scores_HLL)
    weights_HLL = np.exp(scores_HLL - scores_HLL.max(axis=2, keepdims=True))
    probabilities: NDArray[np.float64] = weights_HLL / weights_HLL.sum(axis=2, keepdims=True)
    return probabilities


def rotate(x_LHd: NDArray[np.float64], spec: AttentionSpec) -> NDArray[np.float64]:
    """The rotary embedding of positions 0 to L-1, [L, H, d]; coordinates past 2F stay as they are."""
    num = len(spec.inv_freq)
    angle_L1F = np.multiply.outer(np.arange(len(x_LHd)), spec.inv_freq.astype(np.float64))[:, None, :]
    cos, sin = np.cos(angle_L1F) * spec.rope_factor, np.sin(angle_L1F) * spec.rope_factor
    pairs = (slice(0, 2 * num, 2), slice(1, 2 * num, 2)) if spec.interleaved else (slice(num), slice(num, 2 * num))
    first, second = x_LHd[..., pairs[0]], x_LHd[..., pairs[1]]
    rotated = np.array(x_LHd, np.float64)
    rotated[..., pairs[0]] = first * cos - second * sin
    rotated[..., pairs[1]] = second * cos + first * sin
    return rotated


def _biased(x_LHd: NDArray[Any], bias_Hd: NDArray[np.float32] | None) -> NDArray[np.float64]:
    return np.asarray(x_LHd, np.float64) + (0.0 if bias_Hd is None else bias_Hd)


def to_arrays(specs: Mapping[int, AttentionSpec]) -> dict[str, NDArray[Any]]:
    """The arrays of ``projection.safetensors``: ``layer<i>_inv_freq``, ``layer<i>_q_bias``, ``layer<i>_k_bias``."""
    return {
        f"layer{layer}_{name}": getattr(spec, name).astype(np.float32)
        for layer, spec in specs.items()
        for name in _ARRAYS
        if getattr(spec, name) is not None
    }


def to_metadata(specs: Mapping[int, AttentionSpec]) -> dict[str, str]:
    """The entry of the file's metadata: layer -> everything that is no array; nothing where there are no specs."""
    plain = {str(layer): {name: getattr(spec, name) for name in _PLAIN} for layer, spec in specs.items()}
    return {"attention": json.dumps(plain, sort_keys=True)} if plain else {}


def from_file(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> dict[int, AttentionSpec]:
    """The specs in a projection file, by layer; none in a file that has no queries and keys.

    Raises CorruptionError when an array has the wrong shape, KeyError, ValueError or TypeError when the file garbles
    or lacks something.
    """
    specs: dict[int, AttentionSpec] = {}
    for name, plain in dict(json.loads(metadata.get("attention", "{}"))).items():
        layer = int(name)
        soft_cap, window = plain["soft_cap"], plain["window"]
        specs[layer] = AttentionSpec(
            heads=tuple(int(head) for head in plain["heads"]),
            kv_heads=tuple(int(head) for head in plain["kv_heads"]),
            group=tuple(int(place) for place in plain["group"]),
            head_dim=int(plain["head_dim"]),
            q_bias=arrays.get(f"layer{layer}_q_bias"),
            k_bias=arrays.get(f"layer{layer}_k_bias"),
            inv_freq=arrays[f"layer{layer}_inv_freq"],
            rope_factor=float(plain["rope_factor"]),
            interleaved=bool(plain["interleaved"]),
            softmax_scale=float(plain["softmax_scale"]),
            soft_cap=None if soft_cap is None else float(soft_cap),
            window=None if window is None else int(window),
        )
        _check(layer, specs[layer])
    return dict(sorted(specs.items()))


def _check(layer: int, spec: AttentionSpec) -> None:
    shapes = {
        "q_bias": (spec.q_bias, (len(spec.heads), spec.head_dim)),
        "k_bias": (spec.k_bias, (len(spec.kv_heads), spec.head_dim)),
        "inv_freq": (spec.inv_freq, (min(spec.inv_freq.size, spec.head_dim // 2),)),
    }
    wrong = [
        name
        for name, (array, shape) in shapes.items()
        if array is not None and (array.shape != shape or array.dtype != np.float32)
    ]
    if len(spec.group) != len(spec.heads) or not all(0 <= place < len(spec.kv_heads) for place in spec.group):
        wrong.append("group")
    if wrong:
        raise CorruptionError(
            f"projection.safetensors: {' and '.join(wrong)} of layer {layer}'s attention do not fit its heads. Restore "
            "it from a copy."
        )
