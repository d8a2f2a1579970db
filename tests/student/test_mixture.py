"""Protects the mixture: schedules, and a realised share that follows them at every moment."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import ShareConfig
from distill.errors import UsageError
from distill.student.mixture import assign_domains, scheduled_shares, share_at

SCHEDULES = {
    "constant": {"start": 0.3},
    "linear": {"schedule": "linear", "start": 0.3, "end": 0.7},
    "cosine": {"schedule": "cosine", "start": 0.1, "end": 0.9},
    "step": {"schedule": "step", "start": 0.2, "end": 0.8, "at": 0.25},
}


def test_schedules_follow_their_formulas():
    progress = np.array([0.0, 0.25, 0.5, 0.75])
    expected = {
        "constant": [0.3, 0.3, 0.3, 0.3],
        "linear": [0.3, 0.4, 0.5, 0.6],
        "cosine": [0.1 + 0.8 * (1 - math.cos(math.pi * p)) / 2 for p in progress],
        "step": [0.2, 0.8, 0.8, 0.8],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(share_at(ShareConfig(**SCHEDULES[name]), progress), values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_realised_share_is_within_one_percent_of_the_schedule(name):
    shares = {"medical": ShareConfig(**SCHEDULES[name]), "general": ShareConfig(start=0.5)}
    assigned = assign_domains(shares, 1000)
    scheduled = scheduled_shares(shares, np.arange(1000) / 1000)
    for stop in (250, 500, 1000):
        difference = np.bincount(assigned[:stop], minlength=2) / stop - scheduled[:stop].mean(axis=0)
        assert np.abs(difference).max() < 0.01


@pytest.mark.parametrize("num_domains", [3, 12, 300])
def test_any_number_of_domains_is_within_one_percent(num_domains):
    schedules = list(SCHEDULES.values())
    shares = {str(number): ShareConfig(**schedules[number % 4]) for number in range(num_domains)}
    assigned = assign_domains(shares, 6_000)
    scheduled = scheduled_shares(shares, np.arange(6_000) / 6_000)
    for stop in (1_500, 6_000):
        realised = np.bincount(assigned[:stop], minlength=num_domains) / stop
        assert np.abs(realised - scheduled[:stop].mean(axis=0)).max() < 0.01
    assert len(np.unique(assigned)) == num_domains


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(
        st.builds(
            ShareConfig,
            schedule=st.sampled_from(["constant", "linear", "cosine", "step"]),
            start=st.floats(0.01, 1),
            end=st.floats(0, 1),
        ),
        min_size=1,
        max_size=3,
    ),
    num=st.integers(1, 300),
)
def test_no_domain_is_ever_far_from_its_schedule(shares, num):
    # All shares may be 0 at the same time, which is refused; one that never is keeps the others free.
    named = {"always": ShareConfig(start=0.1), **{str(number): share for number, share in enumerate(shares)}}
    shares_ND = scheduled_shares(named, np.arange(num) / num)
    assigned = assign_domains(named, num)
    counts = np.stack([(assigned == domain).cumsum() for domain in range(len(named))], axis=1)
    assert np.abs(counts - shares_ND.cumsum(axis=0)).max() <= len(named) - 1 + 1e-6


def test_one_domain_takes_all():
    assert assign_domains({"general": ShareConfig(start=0.1)}, 5).tolist() == [0] * 5


def test_a_time_without_any_share_is_refused():
    shares = {"a": ShareConfig(schedule="step", start=1, end=0), "b": ShareConfig(schedule="step", start=1, end=0)}
    with pytest.raises(UsageError, match="a, b are all 0 at 50%"):
        assign_domains(shares, 10)
