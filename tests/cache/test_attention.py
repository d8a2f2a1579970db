"""Attention maps from kept queries and keys: the reference, and what a projection file says of each layer.

What it protects: bias, rotary embedding, groups, soft cap, window and causality each do what the documentation says,
and a file that garbles them is refused. Maps of real models are compared in tests/teacher.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.cache import attention, tensors
from distill.cache.attention import AttentionSpec, dequantise, rebuild_map, rotate
from distill.errors import CorruptionError

L, H, G, D = 9, 3, 2, 8


def spec(**changes: object) -> AttentionSpec:
    random = np.random.default_rng(0)
    plain = AttentionSpec(
        heads=(0, 2, 3),
        kv_heads=(0, 1),
        group=(0, 1, 1),
        head_dim=D,
        q_bias=random.normal(size=(H, D)).astype(np.float32),
        k_bias=random.normal(size=(G, D)).astype(np.float32),
        inv_freq=np.array([1.0, 0.3, 0.01], np.float32),
        rope_factor=1.2,
        interleaved=False,
        softmax_scale=0.4,
        soft_cap=None,
        window=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def queries_and_keys() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    random = np.random.default_rng(1)
    return random.normal(size=(L, H, D)), random.normal(size=(L, G, D))


def by_hand(s: AttentionSpec) -> NDArray[np.float64]:
    """One score at a time, rotations as complex numbers."""
    q, k = queries_and_keys()
    num = len(s.inv_freq)

    def turned(x: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        out = x.copy()
        for j in range(num):
            a, b = (2 * j, 2 * j + 1) if s.interleaved else (j, j + num)
            z = (x[a] + 1j * x[b]) * np.exp(1j * position * float(s.inv_freq[j])) * s.rope_factor
            out[a], out[b] = z.real, z.imag
        return out

    maps = np.zeros((H, L, L))
    for h in range(H):
        for i in range(L):
            q_bias = 0 if s.q_bias is None else s.q_bias[h]
            k_bias = 0 if s.k_bias is None else s.k_bias[s.group[h]]
            scores = {}
            for j in range(i + 1):
                if s.window is not None and i - j >= s.window:
                    continue
                score = turned(q[i, h] + q_bias, i) @ turned(k[j, s.group[h]] + k_bias, j) * s.softmax_scale
                scores[j] = score if s.soft_cap is None else s.soft_cap * np.tanh(score / s.soft_cap)
            total = sum(np.exp(score) for score in scores.values())
            for j, score in scores.items():
                maps[h, i, j] = np.exp(score) / total
    return maps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interleaved": True},
        {"inv_freq": np.zeros(0, np.float32)},
        {"q_bias": None, "k_bias": None},
        {"soft_cap": 1.5},
        {"window": 3},
    ],
    ids=["plain", "interleaved", "no rotary embedding", "no bias", "soft cap", "window"],
)
def test_a_map_is_what_its_parts_say(changes: dict[str, object]) -> None:
    rebuilt = rebuild_map(*queries_and_keys(), spec(**changes))
    assert rebuilt.dtype == np.float64
    assert np.abs(rebuilt - by_hand(spec(**changes))).max() <= 1e-12
    if changes:
        assert np.abs(rebuilt - rebuild_map(*queries_and_keys(), spec())).max() > 1e-3


def test_a_rotation_keeps_lengths_and_what_lies_past_the_rotary_dimensions() -> None:
    q, _ = queries_and_keys()
    turned = rotate(q, spec(rope_factor=1.0))
    assert len(spec().inv_freq) == 3
    assert np.array_equal(turned[..., 6:], q[..., 6:])
    assert np.array_equal(turned[0], q[0])
    assert np.abs(np.linalg.norm(turned, axis=2) - np.linalg.norm(q, axis=2)).max() <= 1e-12


def test_a_scale_belongs_to_a_position_and_a_head() -> None:
    values = np.arange(2 * 3 * 4, dtype=np.int8).reshape(2, 12)
    scale = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    whole = dequantise(values, scale)
    assert whole.shape == (2, 3, 4)
    assert whole[1, 2].tolist() == [6.0 * value for value in values[1, 8:].tolist()]


@pytest.mark.parametrize("changes", [{}, {"q_bias": None, "k_bias": None, "soft_cap": 50.0, "window": 128}])
def test_specs_survive_a_file(changes: dict[str, object]) -> None:
    specs = {7: spec(**changes), 12: spec(heads=(1, 4, 5))}
    data = tensors.dump(attention.to_arrays(specs), attention.to_metadata(specs))
    read = attention.from_file(*tensors.load(data, name="projection.safetensors"))
    assert list(read) == [7, 12]
    for layer, found in read.items():
        for field in fields(AttentionSpec):
            assert np.array_equal(getattr(found, field.name), getattr(specs[layer], field.name)), field.name


def test_a_file_without_heads_has_no_specs() -> None:
    assert attention.to_metadata({}) == {}
    assert attention.from_file({}, {}) == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q_bias": np.zeros((H, D + 1), np.float32)}, "q_bias"),
        ({"k_bias": np.zeros((G + 1, D), np.float32)}, "k_bias"),
        ({"inv_freq": np.zeros(D, np.float32)}, "inv_freq"),
        ({"group": (0, 1, 2)}, "group"),
        ({"group": (0, 1)}, "group"),
    ],
)
def test_arrays_that_do_not_fit_the_heads_are_refused(changes: dict[str, object], says: str) -> None:
    specs = {3: spec(**changes)}
    with pytest.raises(CorruptionError, match=f"{says}.* of layer 3"):
        attention.from_file(attention.to_arrays(specs), attention.to_metadata(specs))
