"""Projections of inner layers: seeded, orthonormal, quantised for each coordinate.

What it protects: every worker draws the same projection, quantising is off by half a level at most where nothing is
clipped, and a file that garbles the arrays is refused.
"""

from dataclasses import replace

import numpy as np
import pytest

from distill.cache import inner, tensors
from distill.cache.inner import InnerProjection, fit_inner, orthonormal
from distill.errors import CorruptionError

DIM, NUM = 40, 12


def fitted(layer: int = 3) -> tuple[InnerProjection, np.ndarray]:
    """A projection, and the states that it was fitted to: each dimension with a mean and a spread of its own."""
    random = np.random.default_rng(0)
    states_ND = random.normal(size=(3000, DIM)) * np.geomspace(0.01, 30, DIM) + random.normal(size=DIM) * 10
    down_BD = orthonormal(layer, dim=DIM, num=NUM)
    return fit_inner(down_BD, states_ND.astype(np.float32) @ down_BD.T), states_ND


def test_rows_are_orthonormal_and_belong_to_a_layer() -> None:
    down_BD = orthonormal(5, dim=DIM, num=NUM)
    assert down_BD.shape == (NUM, DIM)
    assert np.abs(down_BD @ down_BD.T - np.eye(NUM)).max() <= 1e-6
    assert np.array_equal(down_BD, orthonormal(5, dim=DIM, num=NUM))
    assert np.abs(down_BD - orthonormal(6, dim=DIM, num=NUM)).max() > 0.1
    assert orthonormal(5, dim=DIM, num=DIM).shape == (DIM, DIM)


def test_quantising_is_off_by_half_a_level_and_clips_little() -> None:
    projection, states_ND = fitted()
    hidden_NB = projection.quantise(states_ND)
    assert hidden_NB.dtype == np.int8
    clipped_NB = (hidden_NB == -128) | (hidden_NB == 127)
    assert clipped_NB.mean() <= 0.002
    off_NB = np.abs(projection.dequantise(hidden_NB) - states_ND @ projection.down.T) / projection.step
    assert off_NB[~clipped_NB].max() <= 0.51
    coords_NB = states_ND @ projection.down.T
    noise_B = np.square(projection.dequantise(hidden_NB) - coords_NB).mean(0) / coords_NB.var(0)
    assert noise_B.max() <= 5e-4


def test_a_value_beyond_the_range_is_clipped_and_a_constant_one_is_kept() -> None:
    projection, _ = fitted()
    far = projection.quantise(np.full((1, DIM), 1e6))
    assert set(np.abs(far.astype(int)).ravel().tolist()) <= {127, 128}
    still = fit_inner(np.eye(2, DIM, dtype=np.float32), np.full((50, 2), 7.0, np.float32))
    assert np.abs(still.dequantise(still.quantise(np.full((1, DIM), 7.0))) - 7.0).max() <= 1e-4


def test_layers_survive_a_file() -> None:
    layers = {12: fitted(12)[0], 4: fitted(4)[0]}
    data = tensors.dump(inner.to_arrays(layers), inner.to_metadata(layers))
    read = inner.from_file(*tensors.load(data, name="projection.safetensors"))
    assert sorted(read) == [4, 12]
    for layer, projection in read.items():
        for name in ("down", "centre", "step"):
            assert np.array_equal(getattr(projection, name), getattr(layers[layer], name))
    assert inner.from_file({}, inner.to_metadata({})) == {}


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    projection, _ = fitted()
    for broken in (
        replace(projection, step=projection.step[1:]),
        replace(projection, down=projection.down[:, 0]),
    ):
        layers = {3: broken}
        with pytest.raises(CorruptionError, match="layer 3"):
            inner.from_file(inner.to_arrays(layers), inner.to_metadata(layers))
