"""Protects the feature loss: value and gradient against float64, and that it goes down to what quantising leaves."""

import numpy as np
import pytest
import torch

from distill.cache.inner import fit_inner, orthonormal
from distill.cache.projection import Projection
from distill.student.losses.feature import (
    FeatureAdapter,
    InnerStates,
    feature_floor,
    feature_loss,
    inner_floor,
    inner_loss,
)

RANK, SIZE, COORDS = 12, 16, 6


@pytest.fixture
def projection():
    variance_R = (0.7 ** np.arange(RANK)).astype(np.float32)
    return Projection(
        mean_D=np.zeros(SIZE, np.float32),
        down_RD=np.zeros((RANK, SIZE), np.float32),
        basis_VR=np.zeros((30, RANK), np.float16),
        bias_V=np.zeros(30, np.float32),
        variance_R=variance_R,
        widths=((4, 4), (2, 8)),
        logit_scale=1.0,
        soft_cap=None,
        explained=1.0,
    )


def test_value_and_gradient_equal_the_reference(projection):
    generator = torch.Generator().manual_seed(0)
    predicted_NR = torch.randn(7, RANK, generator=generator).requires_grad_()
    coords_NR = torch.randn(7, RANK, generator=generator)
    weights_R = torch.from_numpy(projection.variance_R / projection.variance_R.sum())
    exact_NR = predicted_NR.detach().double().requires_grad_()
    want_N = sum(
        projection.variance_R[j] * (exact_NR[:, j] - coords_NR[:, j].double()) ** 2 for j in range(RANK)
    ) / float(projection.variance_R.sum())
    got_N = feature_loss(predicted_NR, coords_NR, weights_R)
    torch.testing.assert_close(got_N.double(), want_N, rtol=1e-5, atol=1e-6)
    got_N.sum().backward()
    want_N.sum().backward()
    torch.testing.assert_close(predicted_NR.grad.double(), exact_NR.grad, rtol=1e-5, atol=1e-6)


def test_alone_it_goes_down_to_its_floor(projection):
    """States from which a linear map tells the teacher's coordinates before they were quantised."""
    generator = torch.Generator().manual_seed(1)
    coords_NR = torch.randn(3000, RANK, generator=generator)
    mixing_RD = torch.randn(RANK, SIZE, generator=generator)
    kept_NR = torch.from_numpy(projection.dequantise(projection.quantise(coords_NR.numpy())))
    torch.manual_seed(0)
    adapter = FeatureAdapter(SIZE, projection)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)
    values = []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        optimizer.zero_grad()
        loss = adapter(coords_NR @ mixing_RD, kept_NR).mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    floor = feature_floor(projection)
    assert values[0] > 0.5
    assert 0.9 * floor < values[-1] < 1.1 * floor


def inner_projection(states_ND, layer):
    """The projection of a layer whose states calibration saw."""
    down_BD = orthonormal(layer, dim=states_ND.shape[1], num=COORDS)
    return fit_inner(down_BD, states_ND @ down_BD.T)


def test_inner_value_and_gradient_equal_the_reference():
    """On (c - centre) / step of what the projection itself decodes, over a standard deviation of 35.4 levels."""
    random = np.random.default_rng(0)
    states_ND = random.normal(1.0, 3.0, (500, SIZE)).astype(np.float32)
    projection = inner_projection(states_ND, 3)
    levels_NB = projection.quantise(states_ND[:7])
    predicted_NB = torch.from_numpy(random.normal(size=(7, COORDS)).astype(np.float32)).requires_grad_()
    exact_NB = predicted_NB.detach().double().requires_grad_()
    decoded_NB = (projection.dequantise(levels_NB) - projection.centre).astype(np.float64) / projection.step
    want_N = (exact_NB - torch.from_numpy(decoded_NB) / (256 / (1.1 * 2 * 3.2905267))).square().sum(1) / COORDS
    got_N = inner_loss(predicted_NB, torch.from_numpy(levels_NB))
    torch.testing.assert_close(got_N.double(), want_N, rtol=1e-4, atol=1e-5)
    got_N.sum().backward()
    want_N.sum().backward()
    torch.testing.assert_close(predicted_NB.grad.double(), exact_NB.grad, rtol=1e-4, atol=1e-5)


def test_inner_alone_goes_down_to_its_floor(projection):
    """Gaussian states, from which the student's differ by a linear map; it begins at what the best constant reaches."""
    random = np.random.default_rng(1)
    states_ND = random.normal(0.5, 3.0, (40_000, SIZE)).astype(np.float32)
    mixing_DD = orthonormal(0, dim=SIZE, num=SIZE)
    projection.layers[5] = inner_projection(states_ND, 5)
    inner = InnerStates(
        student={2: torch.from_numpy(states_ND @ mixing_DD).double()},
        teacher=torch.from_numpy(projection.layers[5].quantise(states_ND))[:, None],
        at_start=torch.zeros(len(states_ND), dtype=torch.bool),
    )
    adapter = FeatureAdapter(SIZE, projection, {5: 2}).double()
    layer = adapter.inner["layer5"]
    begun = inner_loss(layer(inner.student[2]), inner.teacher[:, 0]).mean().item()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = inner_loss(layer(inner.student[2]), inner.teacher[:, 0]).mean() * 1e4
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = inner_loss(layer(inner.student[2]), inner.teacher[:, 0]).mean().item()
    assert 0.8 < begun < 1.2
    assert inner_floor() < 2 / 12 / (256 / (1.1 * 2 * 3.2905267)) ** 2
    assert 0.8 * inner_floor() < reached < 1.2 * inner_floor()


def test_a_token_has_the_mean_over_pairs_and_position_0_the_final_state_alone(projection):
    random = np.random.default_rng(2)
    states_ND = random.normal(size=(5, SIZE)).astype(np.float32)
    projection.layers.update({layer: inner_projection(states_ND, layer) for layer in (2, 9)})
    adapter = FeatureAdapter(SIZE, projection, {2: 0, 9: 1})
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    teacher = np.stack([projection.layers[layer].quantise(states_ND) for layer in (2, 9)], 1)
    student = {layer: torch.randn(5, SIZE, requires_grad=True) for layer in (0, 1)}
    inner = InnerStates(
        student=student, teacher=torch.from_numpy(teacher), at_start=torch.tensor([True, False, False, True, False])
    )
    hidden_ND, coords_NR = torch.randn(5, SIZE), torch.randn(5, RANK)
    got_N = adapter(hidden_ND, coords_NR, inner)
    final_N = adapter(hidden_ND, coords_NR)
    parts = [
        inner_loss(adapter.inner[f"layer{ours}"](student[theirs]), inner.teacher[:, place])
        for place, (ours, theirs) in enumerate({2: 0, 9: 1}.items())
    ]
    want_N = torch.where(inner.at_start, final_N, (final_N + parts[0] + parts[1]) / 3)
    torch.testing.assert_close(got_N, want_N)
    got_N.sum().backward()
    assert [bool(row.any()) for row in student[1].grad] == [False, True, True, False, True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_N = adapter(hidden_ND, coords_NR, inner)
    assert low_N.dtype == torch.float32
    torch.testing.assert_close(low_N, got_N, rtol=0.03, atol=0.03)


def test_errors_are_summed_in_float32_under_autocast(projection):
    predicted_NR, coords_NR = torch.randn(6, RANK), torch.randn(6, RANK)
    weights_R = torch.from_numpy(projection.variance_R / projection.variance_R.sum())
    exact_N = feature_loss(predicted_NR, coords_NR, weights_R)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(feature_loss(predicted_NR, coords_NR, weights_R), exact_N)
