"""The projection: its quantiser's exact values, its maths against the definition, and its file."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache import tensors
from distill.cache.projection import CLIPS, Moments, Projection, choose_widths, fit_projection, step_of, widths_of
from distill.errors import CorruptionError


def projection_of(widths: tuple[tuple[int, int], ...], **changes: object) -> Projection:
    rank = sum(count for _, count in widths)
    values = {
        "mean_D": np.arange(3, dtype=np.float32),
        "down_RD": np.ones((rank, 3), np.float32),
        "basis_VR": np.arange(4 * rank, dtype=np.float16).reshape(4, rank),
        "bias_V": np.array([0.5, 0, -0.5, 1], np.float32),
        "variance_R": np.arange(rank, 0, -1, dtype=np.float32),
        "widths": widths,
        "logit_scale": 1.0,
        "soft_cap": None,
        "explained": 0.75,
    }
    return Projection(**{**values, **changes})


def random_head(dim: int = 64, vocab: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states with a falling spectrum, and a head."""
    rng = np.random.default_rng(1)
    mixing = np.arange(1, dim + 1)[:, None] ** -0.8 * np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    hidden = rng.standard_normal((6000, dim)) @ mixing * 4 + rng.standard_normal(dim)
    return hidden, rng.standard_normal((vocab, dim)) + rng.standard_normal(dim)


def moments_of(hidden: np.ndarray) -> Moments:
    return Moments(count=len(hidden), sum_D=hidden.sum(0), outer_DD=hidden.T @ hidden)


def test_quantiser_is_midrise_with_the_clips_of_each_width() -> None:
    projection = projection_of(((8, 1), (6, 1), (4, 1), (2, 1)))
    coords = np.array(
        [[0.0, 0.0, 0.0, 0.0], [-0.001, -0.001, -0.001, -0.001], [9, 9, 9, 9], [-9, -9, -9, -9], [1.0, 1.0, 1.0, 1.0]],
        np.float32,
    )
    hidden = projection.quantise(coords)
    assert {bits: values[:, 0].tolist() for bits, values in hidden.items()} == {
        8: [0, -1, 127, -128, 25],  # step 10/256
        6: [0, -1, 31, -32, 8],  # step 8/64
        4: [0, -1, 7, -8, 2],  # step 6.4/16
        2: [0, -1, 1, -2, 1],  # step 4/4
    }
    assert all(values.dtype == np.int8 for values in hidden.values())
    restored = projection.dequantise(hidden)
    np.testing.assert_allclose(restored[0], [0.01953125, 0.0625, 0.2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(restored[2], [4.98046875, 3.9375, 3.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(restored[3], [-4.98046875, -3.9375, -3.0, -1.5], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CLIPS)), st.floats(-12, 12, width=32))
def test_quantising_is_off_by_half_a_step_at_most_inside_the_clip(bits: int, value: float) -> None:
    projection = projection_of(((bits, 1),))
    restored = float(projection.dequantise(projection.quantise(np.array([[value]], np.float32)))[0, 0])
    nearest = min(max(value, -CLIPS[bits]), CLIPS[bits])
    assert abs(restored - nearest) <= step_of(bits) / 2 + 1e-5


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1189), (4, 0.01371), (6, 0.00131), (8, 0.000127)])
def test_widths_are_chosen_with_the_error_that_the_quantiser_has(bits: int, distortion: float) -> None:
    coords = np.random.default_rng(0).standard_normal((400_000, 1)).astype(np.float32)
    projection = projection_of(((bits, 1),))
    error = np.mean((projection.dequantise(projection.quantise(coords)) - coords) ** 2)
    assert error == pytest.approx(distortion, rel=0.02)


def test_widths_follow_the_spectrum_and_keep_to_the_budget() -> None:
    variance = np.arange(1, 201, dtype=np.float64) ** -1.5
    widths = choose_widths(variance, budget_bits=256)
    assert sum(bits * count for bits, count in widths) == 256
    assert [bits for bits, _ in widths] == sorted((bits for bits, _ in widths), reverse=True)
    # No exchange of two bits between two coordinates lowers the error.
    per_coordinate = [bits for bits, count in widths for _ in range(count)]
    per_coordinate += [0] * (200 - len(per_coordinate))
    error = {0: 1.0, 2: 0.1189, 4: 0.01371, 6: 0.00131, 8: 0.000127}
    gain = min(v * (error[b - 2] - error[b]) for v, b in zip(variance, per_coordinate, strict=True) if b)
    missed = max(v * (error[b] - error[b + 2]) for v, b in zip(variance, per_coordinate, strict=True) if b < 8)
    assert gain >= missed


def test_a_large_budget_gives_every_coordinate_eight_bits() -> None:
    assert choose_widths(np.array([3.0, 2.0, 1.0]), budget_bits=1000) == ((8, 3),)


def test_coordinates_are_whitened_and_rebuild_the_logits() -> None:
    hidden, head = random_head()
    centred = head - head.mean(0)
    fit = fit_projection(moments_of(hidden), gram_DD=centred.T @ centred, hidden_bytes=64)
    assert fit.widths == ((8, 64),)
    assert fit.explained == pytest.approx(1.0)
    coords = (hidden - fit.mean_D) @ fit.down_RD.T
    np.testing.assert_allclose(coords.T @ coords / len(coords), np.eye(64), atol=1e-8)
    logits = coords @ (centred @ fit.up_DR).T + centred @ fit.mean_D
    np.testing.assert_allclose(logits, hidden @ centred.T, atol=1e-6)


def test_variance_is_the_logit_variance_of_each_coordinate_and_falls() -> None:
    hidden, head = random_head()
    centred = head - head.mean(0)
    fit = fit_projection(moments_of(hidden), gram_DD=centred.T @ centred, hidden_bytes=8)
    rank = len(fit.variance_R)
    assert rank < 64
    np.testing.assert_allclose(((centred @ fit.up_DR) ** 2).sum(0), fit.variance_R, rtol=1e-9)
    assert (np.diff(fit.variance_R) <= 0).all()
    logits = (hidden - hidden.mean(0)) @ centred.T
    assert fit.explained == pytest.approx(fit.variance_R.sum() / (logits**2).sum(1).mean())


def test_no_other_subspace_of_that_rank_explains_more() -> None:
    hidden, head = random_head(dim=16, vocab=100)
    centred = head - head.mean(0)
    fit = fit_projection(moments_of(hidden), gram_DD=centred.T @ centred, hidden_bytes=3)
    logits = (hidden - hidden.mean(0)) @ centred.T
    singular = np.linalg.svd(logits, compute_uv=False) ** 2 / len(hidden)
    np.testing.assert_allclose(fit.variance_R, singular[: len(fit.variance_R)], rtol=1e-6)


def test_directions_without_variance_get_no_coordinate() -> None:
    hidden, head = random_head(dim=16, vocab=100)
    hidden[:, 5:] = hidden[:, :1]  # rank 5
    fit = fit_projection(moments_of(hidden), gram_DD=head.T @ head, hidden_bytes=100)
    assert fit.widths == ((8, 5),)
    assert np.isfinite(fit.down_RD).all()


def test_tail_logits_apply_cap_then_scale() -> None:
    projection = projection_of(((8, 2),), soft_cap=2.0, logit_scale=0.5)
    coords = np.array([[1.0, -2.0]], np.float32)
    plain = coords @ projection.basis_VR.astype(np.float32).T + projection.bias_V
    np.testing.assert_allclose(projection.tail_logits(coords), 0.5 * 2 * np.tanh(plain / 2), rtol=1e-6)


def test_file_round_trip() -> None:
    projection = projection_of(((6, 1), (2, 3)), soft_cap=30.0, logit_scale=0.25)
    read = Projection.from_bytes(projection.to_bytes())
    for name in ("mean_D", "down_RD", "basis_VR", "bias_V", "variance_R"):
        np.testing.assert_array_equal(getattr(read, name), getattr(projection, name))
        assert getattr(read, name).dtype == getattr(projection, name).dtype
    assert (read.widths, read.soft_cap, read.logit_scale, read.explained) == (((6, 1), (2, 3)), 30.0, 0.25, 0.75)
    assert read.sha256 == projection.sha256 == hashlib.sha256(projection.to_bytes()).hexdigest()


def test_file_bytes_are_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from distill.cache import tensors; import sys;"
        "sys.stdout.buffer.write(tensors.dump({'x': np.arange(3.0)}, {name: name for name in 'qwertyuiop'}))"
    )
    ours = tensors.dump({"x": np.arange(3.0)}, {name: name for name in "qwertyuiop"})
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == ours
    assert ours[8:40] == b'{"__metadata__":{"e":"e","i":"i"'


def test_file_states_its_quantiser(tmp_path) -> None:
    path = tmp_path / "projection.safetensors"
    path.write_bytes(projection_of(((6, 1), (2, 3))).to_bytes())
    metadata = tensors.read_metadata(path)
    assert json.loads(metadata["clips"]) == {"6": 4.0, "2": 2.0}
    assert metadata["zero_point"] == "-0.5"
    assert widths_of(path) == ((6, 1), (2, 3))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"schema_version":"1"', b'"schema_version":"2"'),
        (b"[[6, 1], [2, 3]]", b"[[6, 1], [2, 4]]"),
        (b'"zero_point":"-0.5"', b'"zero_point":"-0.0"'),
        (b'"basis"', b'"basil"'),
        (b'\\"6\\": 4.0', b'\\"6\\": 3.0'),
    ],
)
def test_file_of_another_version_or_with_other_shapes_is_refused(old: bytes, new: bytes) -> None:
    data = projection_of(((6, 1), (2, 3))).to_bytes()
    assert old in data
    with pytest.raises(CorruptionError, match=r"projection\.safetensors"):
        Projection.from_bytes(data.replace(old, new))


def test_truncated_file_is_refused() -> None:
    with pytest.raises(CorruptionError, match="not a valid safetensors"):
        Projection.from_bytes(projection_of(((6, 1),)).to_bytes()[:-4])
