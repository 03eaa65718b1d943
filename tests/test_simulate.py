"""Simulated sessions: reproducible, Poisson around their true rates, with a task worth decoding."""

import numpy as np
import pytest

from mtm import evaluate, mean_rates, oracle
from mtm.simulation import CIRCUIT, simulate
from mtm.prediction import TASKS


def test_same_seed_same_data_whatever_else_is_made():
    two, three = simulate(2, 20, 12, seed=5), simulate(3, 20, 12, seed=5)
    for a, b in zip(two, three, strict=False):
        np.testing.assert_array_equal(a.counts, b.counts)
        assert all(np.array_equal(a.behaviour[k], b.behaviour[k]) for k in a.behaviour)
    assert not np.array_equal(two[0].counts, simulate(1, 20, 12, seed=6)[0].counts)
    assert [s.name for s in three] == ["sim-5-0", "sim-5-1", "sim-5-2"]
    assert len({s.subject for s in three}) == 3


def test_counts_are_poisson_around_the_rates():
    session = simulate(1, 200, 24, seed=0)[0]
    z = (session.counts - session.rates) / np.sqrt(session.rates)  # mean 0, variance 1
    assert abs(z.mean()) < 0.01 and z.var() == pytest.approx(1, abs=0.02)
    assert 4 <= len(CIRCUIT) <= 8 and set(session.region_names) == {r.name for r in CIRCUIT}


def test_behaviour_is_a_task():
    session = simulate(1, 600, 6, seed=1)[0]
    b = session.behaviour
    assert set(np.unique(b["choice"])) == {-1, 1} and set(np.unique(b["block"])) == {0.2, 0.5, 0.8}
    strong = np.abs(b["contrast"]) == 1
    np.testing.assert_array_equal(
        b["choice"][strong & (b["reward"] == 1)],
        -np.sign(b["contrast"][strong & (b["reward"] == 1)]),
    )
    assert b["reward"][strong].mean() > 0.95
    assert 0.5 < b["reward"][np.abs(b["contrast"]) == 0.0625].mean() < 0.95
    assert b["reaction-time"].min() >= 0.08 and b["reaction-time"].max() <= 2
    moving = session.times[None] >= b["reaction-time"][:, None]
    assert b["wheel-speed"][~moving].max() < 0.2 and b["wheel-speed"].max() > 1


def test_regions_are_coupled_but_not_the_same():
    """The true rates of a region follow its neighbours' in the circuit, and its own most."""
    session = simulate(1, 300, 60, seed=2)[0]
    centred = np.log(session.rates) - np.log(session.rates).mean(axis=(0, 1))
    flat = centred.reshape(-1, session.n_neurons)

    def explained(target, source):
        y = flat[:, session.regions == target]
        x = flat[:, np.flatnonzero(session.regions == source)]
        fit = x @ np.linalg.lstsq(x, y, rcond=None)[0]
        return 1 - ((y - fit) ** 2).sum() / (y**2).sum()

    assert explained("MOs5", "MOs5") > 0.999
    assert 0.2 < explained("VISa5", "LP") < 0.95
    assert explained("VISa5", "LP") > explained("PO", "LP")


def test_the_oracle_is_above_the_mean_rates():
    session = simulate(1, 60, 18, seed=0)[0]
    predictors = (oracle(session), mean_rates(session))
    best, null = (evaluate(p, session, tasks=list(TASKS)) for p in predictors)
    for task in best.tasks:
        assert best.tasks[task].mean() > 0.1 > 0 > null.tasks[task].mean()


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="need at least 1 session"):
        simulate(0)
    with pytest.raises(ValueError, match="a neuron for each of the 6 regions"):
        simulate(1, 10, 5)
