"""Baselines: exact against scikit-learn, blind to what is hidden, between null and oracle."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import PoissonRegressor
from sklearn.linear_model import Ridge as ScikitRidge

from mtm import Mask, Session, baselines, evaluate, mean_rates, oracle, simulate
from mtm.baselines import fit_baseline
from mtm.prediction import TASKS

SCHEMES = tuple(TASKS.values())


@pytest.fixture(scope="module")
def small():
    """Two animals, 100 trials, 25 bins, 24 neurons of 6 regions; three are in none."""
    grid = {"bin_size": 0.04, "window": (-0.2, 0.8)}
    first, second = simulate(2, 100, 24, seed=3, mean_rate=30.0, **grid)
    first.regions[[1, 11, 20]] = "root"
    return first, second


@pytest.fixture(scope="module")
def fitted(small):
    fitted = {name.lower(): fit_baseline(name, small[0]) for name in ("PSTH", "ridge")}
    return fitted | {"glm": fit_baseline("reduced-rank regression", small)}


def masked(session, trials, hidden):
    """Counts of some trials, and a mask that hides the same in every trial."""
    counts = torch.from_numpy(session.counts[trials].astype(np.float32))
    hidden = torch.from_numpy(np.broadcast_to(hidden, counts.shape).copy())
    return counts, Mask(hidden, hidden)


def test_leaving_out_is_ridge_on_what_is_visible(small):
    data = baselines.Data(small[0], 0, torch.float64)
    windows = baselines.window_matrices(data.n_bins, baselines.AROUND)[[0, 1, 4]].double()
    features = baselines.window_sums(data.inputs["train"], windows).flatten(0, 1)
    targets = (data.counts["train"] - data.rates).flatten(0, 1)
    gram, cross, everyone = features.T @ features, features.T @ targets, torch.arange(24)
    parts = {"neuron": [(everyone, everyone.split(1))], "inter-region": [(everyone, data.regions)]}
    parts["intra-region"] = [(m, torch.arange(len(m)).split(1)) for m in data.regions]
    for scheme, some in parts.items():
        weights = sum(baselines.ridge_weights(gram, cross, 40.0, *part) for part in some)
        for n in (0, 1, 11, 23):
            visible = data.visible[scheme][:, n].repeat_interleave(3)
            assert (weights[~visible, n] == 0).all()
            if visible.any():
                direct = ScikitRidge(40.0, fit_intercept=False)
                direct.fit(features[:, visible], targets[:, n])
                np.testing.assert_allclose(weights[visible, n], direct.coef_, atol=1e-8)
            else:
                assert scheme == "intra-region" and small[0].regions[n] == "root"


def test_autoregression_against_scikit_learn(small):
    data = baselines.Data(small[0], 0, torch.float64)
    components = baselines.shared_directions(data.inputs["train"], 4)
    past, n, penalty = baselines.Past.of(data, "train", components, 2), 7, 30.0
    inputs = np.concatenate([past.own[:, :, n].T, past.population], axis=1)
    rates, counts = past.rates[:, n].numpy(), past.counts[:, n].numpy()

    own, population, bias = baselines.poisson_regression(past, penalty, steps=300)
    direct = PoissonRegressor(alpha=penalty / rates.sum(), tol=1e-9, max_iter=1000)
    direct.fit(inputs, counts / rates, sample_weight=rates)  # the offset as an exposure
    np.testing.assert_allclose([*own[:, n], *population[:, n]], direct.coef_, atol=1e-3)
    assert float(bias[n]) == pytest.approx(direct.intercept_, abs=1e-3)

    own, population, _ = baselines.ridge_regression(past, penalty)
    direct = ScikitRidge(penalty, fit_intercept=False).fit(inputs, counts - rates)
    np.testing.assert_allclose([*own[:, n], *population[:, n]], direct.coef_, atol=1e-8)


def test_windows():
    windows = ((0, 0), (1, 2), (0, np.inf))
    around = baselines.window_matrices(6, windows)
    np.testing.assert_allclose(around[0], np.eye(6))
    np.testing.assert_allclose(around[1, 2], np.array([1, 1, 0, 1, 1, 0]) / 2)
    np.testing.assert_allclose(around[2], 1 / 6**0.5)
    past = baselines.window_matrices(6, windows, past=True)
    np.testing.assert_allclose(past[1, 3], np.array([0, 1, 1, 0, 0, 0]) / 2**0.5)
    assert (past.triu(1) == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["psth", "ridge", "glm"])
def test_hidden_counts_change_nothing_and_one_neuron_is_a_column(fitted, small, name, scheme):
    session, rng = small[0], np.random.default_rng(1)
    hidden = rng.random((5, 1, session.n_neurons)) < 0.3
    if scheme == "causal":
        hidden = np.arange(session.n_bins)[:, None] >= np.array([25, 22, 9, 0, 3])[:, None, None]
    counts, mask = masked(session, np.arange(5), hidden)
    predict = fitted[name].predict_log_rates
    before = predict(counts, scheme, mask, session.name)
    other = torch.where(mask.hidden, counts + 3, counts)
    assert torch.equal(predict(other, scheme, mask, session.name), before)
    neurons = torch.tensor([3, 1, 23, 17, 0])
    one = predict(counts, scheme, mask, session.name, neurons=neurons)
    torch.testing.assert_close(one, before[torch.arange(5), :, neurons], rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["ridge", "glm"])
def test_with_nothing_hidden_no_entry_sees_itself(fitted, small, name, scheme):
    session = small[0]
    counts, mask = masked(session, np.arange(3), False)
    predict = fitted[name].predict_log_rates
    before = predict(counts, scheme, mask, session.name)
    for n, t in ((0, 12), (1, 20), (23, 3)):
        other, code = counts.clone(), session.region_codes[n]
        if scheme == "causal":
            other[:, t:] += 2
            after = predict(other, scheme, mask, session.name)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after, before)
        else:
            members = np.array([n]) if code < 0 else np.flatnonzero(session.region_codes == code)
            blind = {"neuron": [n], "inter-region": members}
            other[..., blind.get(scheme, [n, *np.setdiff1d(np.arange(24), members)])] += 2
            after = predict(other, scheme, mask, session.name)
            torch.testing.assert_close(after[..., n], before[..., n], rtol=0, atol=2e-5)


def test_test_trials_are_never_touched(small):
    session = small[0].select(trials=np.arange(40), neurons=np.arange(12))
    changed = session.select()
    changed.counts[session.split().test] = 9
    counts, mask = masked(session, np.arange(3), False)
    for name in ("PSTH", "ridge", "low-rank GLM"):
        one, two = (fit_baseline(name, each) for each in (session, changed))
        assert repr(one) == repr(two)
        for _, scheme in one.maps:
            asked = counts, scheme, mask, session.name
            assert torch.equal(one.predict_log_rates(*asked), two.predict_log_rates(*asked))


def test_between_the_null_and_the_oracle(fitted, small):
    tasks, session = list(TASKS), small[0]
    predictors = {"null": mean_rates(session), "oracle": oracle(session)}
    reports = {n: evaluate(p, session, tasks=tasks) for n, p in (predictors | fitted).items()}
    for task in tasks:
        mean = {name: report.tasks[task].mean() for name, report in reports.items()}
        for name in ("ridge", "glm"):
            assert mean["null"] + 0.05 < mean[name] < mean["oracle"], (task, name)
    first, second = (fitted["glm"].maps[session.name, "neuron"].chosen for session in small)
    assert first == second and "rank 6; penalty" in first and first in repr(fitted["glm"])


def test_without_regions_the_region_schemes_are_missing(small):
    session = small[0]
    grid = {"bin_size": session.bin_size, "window": session.window}
    bare = Session(session.counts, name="bare", **grid)
    both = fit_baseline("ridge", [bare, small[1]])
    assert [scheme for name, scheme in both.maps if name == "bare"] == ["neuron", "causal"]
    with pytest.raises(ValueError, match="split of seed 0, not 1"):
        evaluate(both, bare, split_seed=1)
    assert list(evaluate(both, bare).tasks) == ["co-smoothing", "forward-prediction"]
    bare.window = (bare.window[0] + 5, bare.window[1] + 5)
    with pytest.raises(ValueError, match="the model was trained on .* from"):
        evaluate(both, bare)


@pytest.mark.parametrize("name", ["temporal NDT1", "random-token NDT2"])
def test_the_papers_baselines(small, name):
    result = fit_baseline(name, small[0], epochs=1, depth=1, progress=False)
    assert result.model.prompts == () and not result.model.causal
    assert result.model.config.tokenizer == name[-4:].lower()
