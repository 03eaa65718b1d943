"""Simulated sessions: reproducible, Poisson around their true rates, with a task worth decoding."""

import hashlib

import numpy as np
import pytest

from mtm.simulation import CIRCUIT, simulate


def test_same_seed_same_data_whatever_else_is_made():
    two, three = simulate(2, 12, 14, seed=3), simulate(3, 12, 14, seed=3)
    for a, b in zip(two, three, strict=False):
        np.testing.assert_array_equal(a.counts, b.counts)
        assert all(np.array_equal(a.behaviour[k], b.behaviour[k]) for k in a.behaviour)
    assert not np.array_equal(two[0].counts, simulate(1, 12, 14, seed=4)[0].counts)
    # Of version 0.1.0. The shipped weights and the book depend on it.
    animal = two[1]
    assert hashlib.sha256(animal.counts.tobytes()).hexdigest()[:16] == "caa8ebb9e8eb4219"
    assert animal.rates.mean(dtype=np.float64) == pytest.approx(0.36931345, rel=1e-6)
    assert animal.behaviour["choice"].tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert animal.behaviour["reaction-time"].mean() == pytest.approx(0.47166667, rel=1e-6)
    assert animal.behaviour["whisker-motion-energy"].mean() == pytest.approx(0.59421901, rel=1e-6)


def test_counts_are_poisson_around_the_rates():
    session = simulate(1, 200, 24, seed=0)[0]
    z = (session.counts - session.rates) / np.sqrt(session.rates)  # mean 0, variance 1
    assert abs(z.mean()) < 0.01 and z.var() == pytest.approx(1, abs=0.02)
    assert set(session.region_names) == {r.name for r in CIRCUIT}


def test_behaviour_is_a_task():
    b = (session := simulate(1, 600, 6, seed=1)[0]).behaviour
    assert set(np.unique(b["choice"])) == {-1, 1} and set(np.unique(b["block"])) == {0.2, 0.5, 0.8}
    strong = np.abs(b["contrast"]) == 1
    rewarded = strong & (b["reward"] == 1)
    np.testing.assert_array_equal(b["choice"][rewarded], -np.sign(b["contrast"][rewarded]))
    assert b["reward"][strong].mean() > 0.95
    assert 0.5 < b["reward"][np.abs(b["contrast"]) == 0.0625].mean() < 0.95
    assert b["reaction-time"].min() >= 0.08 and b["reaction-time"].max() <= 2
    moving = session.times[None] >= b["reaction-time"][:, None]
    assert b["wheel-speed"][~moving].max() < 0.2 and b["wheel-speed"].max() > 1
