"""Baselines: exact against scikit-learn, blind to what is hidden, between null and oracle."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import PoissonRegressor
from sklearn.linear_model import Ridge as ScikitRidge

from mtm import (
    Fit,
    Mask,
    Session,
    SessionError,
    evaluate,
    mean_rates,
    metrics,
    oracle,
    regression,
    simulate,
)
from mtm.baselines import (
    BASELINES,
    PSTH,
    RATIOS,
    LowRankGLM,
    ReducedRankRegression,
    Ridge,
    fit_baseline,
    psth,
)
from mtm.prediction import TASKS

SCHEMES = tuple(TASKS.values())


@pytest.fixture(scope="module")
def small():
    """Two animals, 100 trials, 25 bins, 24 neurons of 6 regions; three have no region label."""
    grid = {"bin_size": 0.04, "window": (-0.2, 0.8)}
    first, second = simulate(2, 100, 24, seed=3, mean_rate=30.0, **grid)
    first.regions[[1, 11, 20]] = "root"
    return first, second


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer ranks and steps than a real recording deserves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "RANKS", (6,))
        patch.setattr(regression, "STEPS", 12)
        patch.setattr(regression, "COMPONENTS", (4,))
        yield


@pytest.fixture(scope="module")
def fitted(small):
    return {
        "psth": PSTH(small[0]),
        "ridge": Ridge(small[0]),
        "glm": ReducedRankRegression(list(small)),
    }


def shown(session, trials, hidden):
    counts = torch.from_numpy(session.counts[trials].astype(np.float32))
    hidden = torch.from_numpy(np.broadcast_to(hidden, counts.shape).copy())
    return counts, Mask(hidden, hidden)


# --------------------------------------------------------------- exactness


def test_leaving_out_is_ridge_on_what_is_visible(small):
    session, n_lags, penalty = small[0], 3, 40.0
    data = regression.Data(session, 0, torch.float64)
    ops = regression.windows(session.n_bins, regression.AROUND)[[0, 1, 4]]
    phi = regression.features(data.inputs["train"], ops)
    targets = (data.counts["train"] - data.rates).flatten(0, 1)
    maps = regression.linear_maps(phi.T @ phi, phi.T @ targets, penalty, n_lags, data)
    for scheme, weights in maps.items():
        for n in (0, 1, 11, 23):
            seen = data.seen(scheme, torch.tensor([n]))[0].repeat_interleave(n_lags)
            assert (weights[~seen, n] == 0).all()
            if not seen.any():
                assert scheme == "intra-region" and not data.labelled[n]
                continue
            direct = ScikitRidge(penalty, fit_intercept=False).fit(phi[:, seen], targets[:, n])
            np.testing.assert_allclose(weights[seen, n], direct.coef_, atol=1e-8)


def test_what_a_task_leaves_visible(small):
    data, codes = regression.Data(small[0], 0, torch.float64), small[0].region_codes
    each = torch.arange(small[0].n_neurons)
    same, labelled = codes[:, None] == codes, codes >= 0
    itself = np.eye(len(codes), dtype=bool)
    assert (data.seen("neuron", each).numpy() == ~itself).all()
    assert (data.seen("inter-region", each).numpy()[labelled] == ~same[labelled]).all()
    assert (data.seen("intra-region", each).numpy()[labelled] == (same & ~itself)[labelled]).all()


def test_autoregression_against_scikit_learn(small):
    data = regression.Data(small[0], 0, torch.float64)
    components = regression.principal(data.inputs["train"], 4)
    past, n, penalty = regression.past_of(data, "train", components, 2), 7, 30.0
    inputs = np.concatenate([past.own[:, :, n].T, past.population], axis=1)
    rates, counts = past.rates[:, n].numpy(), past.counts[:, n].numpy()

    own, population, bias = regression.poisson_regression(past, penalty, steps=300)
    direct = PoissonRegressor(alpha=penalty / rates.sum(), tol=1e-9, max_iter=1000)
    direct.fit(inputs, counts / rates, sample_weight=rates)  # the offset as an exposure
    np.testing.assert_allclose([*own[:, n], *population[:, n]], direct.coef_, atol=1e-3)
    assert float(bias[n]) == pytest.approx(direct.intercept_, abs=1e-3)

    own, population, _ = regression.ridge_regression(past, penalty)
    direct = ScikitRidge(penalty, fit_intercept=False).fit(inputs, counts - rates)
    np.testing.assert_allclose([*own[:, n], *population[:, n]], direct.coef_, atol=1e-8)


def test_windows():
    around = regression.windows(6, ((0, 0), (1, 2), (0, None)))
    np.testing.assert_allclose(around[0], np.eye(6))
    np.testing.assert_allclose(around[1, 2], np.array([1, 1, 0, 1, 1, 0]) / 2)
    np.testing.assert_allclose(around[2], 1 / 6**0.5)
    past = regression.windows(6, ((0, 0), (1, 2), (0, None)), past=True)
    np.testing.assert_allclose(past[1, 3], np.array([0, 1, 1, 0, 0, 0]) / 2**0.5)
    assert (past.triu(1) == 0).all()


@pytest.mark.parametrize("peak", [1e-9, 7.0, 3e6])
def test_penalties_are_found_wherever_they_are(peak):
    found = regression.climb(lambda penalty: -abs(np.log(penalty / peak)), 100.0)
    assert abs(np.log(found / peak)) <= np.log(3) / 2 or peak < 1e-6  # it does not go on for ever


def test_psth_is_smooth_where_that_predicts(small):
    rng = np.random.default_rng(0)
    rate = 0.2 + 0.8 * np.exp(-0.5 * ((np.arange(40) - 20) / 5) ** 2)
    counts = rng.poisson(np.stack([rate, np.full(40, 0.5), np.zeros(40)], -1), (60, 40, 3))
    session = Session(counts, name="s")
    found = np.exp(psth(session))
    raw = counts[session.split().train].mean(0)
    assert found.shape == (1, 40, 3) and np.isfinite(np.log(found)).all()
    assert np.square(found[0, :, 0] - rate).mean() < 0.5 * np.square(raw[:, 0] - rate).mean()


# ------------------------------------------------------------- nothing can cheat


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["psth", "ridge", "glm"])
def test_hidden_counts_change_nothing(fitted, small, name, scheme):
    session, rng = small[0], np.random.default_rng(1)
    hidden = rng.random((5, 1, session.n_neurons)) < 0.3
    if scheme == "causal":
        hidden = np.arange(session.n_bins)[:, None] >= rng.integers(0, session.n_bins, (5, 1, 1))
    counts, mask = shown(session, np.arange(5), hidden)
    predict = fitted[name].predict_log_rates
    before = predict(counts, scheme, mask, session.name)
    other = torch.where(mask.hidden, counts + 3, counts)
    assert torch.equal(predict(other, scheme, mask, session.name), before)


@pytest.mark.parametrize("name", ["ridge", "glm"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_nothing_hidden_no_entry_sees_itself(fitted, small, name, scheme):
    session = small[0]
    counts, mask = shown(session, np.arange(3), False)
    predict = fitted[name].predict_log_rates
    before = predict(counts, scheme, mask, session.name)
    for n, t in ((0, 12), (1, 20), (23, 3)):
        other = counts.clone()
        code = session.region_codes[n]
        mates = np.array([n]) if code < 0 else np.flatnonzero(session.region_codes == code)
        if scheme == "causal":
            other[:, t:] += 2
            after = predict(other, scheme, mask, session.name)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            assert not torch.equal(after, before)
        else:
            blind = {"neuron": [n], "inter-region": mates}
            blind = blind.get(scheme, [n, *np.setdiff1d(np.arange(24), mates)])
            other[..., blind] += 2
            after = predict(other, scheme, mask, session.name)
            torch.testing.assert_close(after[..., n], before[..., n], rtol=0, atol=2e-5)


def test_one_region_is_enough_to_look_ahead(fitted, small):
    counts, mask = shown(small[0], np.arange(3), small[0].region_codes != 2)
    for name in ("ridge", "glm"):
        predicted = fitted[name].predict_log_rates(counts, "causal", mask, small[0].name)
        assert (predicted.std(0) > 0)[1:, small[0].region_codes == 2].all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["psth", "ridge", "glm"])
def test_one_neuron_is_that_column(fitted, small, name, scheme):
    session = small[0]
    hidden = np.arange(session.n_bins)[:, None] >= np.array([25, 22, 9, 0])[:, None, None]
    counts, mask = shown(session, np.arange(4), hidden if scheme == "causal" else False)
    neurons = torch.tensor([3, 1, 23, 17])
    everything = fitted[name].predict_log_rates(counts, scheme, mask, session.name)
    one = fitted[name].predict_log_rates(counts, scheme, mask, session.name, neurons=neurons)
    torch.testing.assert_close(one, everything[torch.arange(4), :, neurons], rtol=0, atol=2e-5)


def test_test_trials_are_never_touched(small):
    session = small[0].select(trials=np.arange(40), neurons=np.arange(12))
    changed = session.select()
    changed.counts[session.split().test] = 9
    for fit in (PSTH, Ridge, LowRankGLM):
        one, two = fit(session), fit(changed)
        assert one.chosen == two.chosen
        shown_counts, mask = shown(session, np.arange(3), False)
        for scheme in one.schemes:
            before, after = (
                x.predict_log_rates(shown_counts, scheme, mask, session.name) for x in (one, two)
            )
            assert torch.equal(before, after)


# --------------------------------------------------------------------- they predict


def test_between_the_null_and_the_oracle(fitted, small):
    for session, names in ((small[0], ("ridge", "glm")), (small[1], ("glm",))):
        null, best = (evaluate(p(session), session) for p in (mean_rates, oracle))
        for name in names:
            report = evaluate(fitted[name], session)
            for task in TASKS:
                score = report.tasks[task].mean()
                assert null.tasks[task].mean() + 0.05 < score < best.tasks[task].mean(), task


def test_psth_predictor_is_the_psth(fitted, small):
    by_array = evaluate(psth(small[0]), small[0]).to_dict()
    by_class = evaluate(fitted["psth"], small[0]).to_dict()
    for task in TASKS:
        for key, value in by_array[task].items():
            if isinstance(value, float):
                assert by_class[task][key] == pytest.approx(value, abs=1e-4), (task, key)


def test_sessions_share_filters_and_say_what_was_chosen(fitted, small):
    glm = fitted["glm"]
    one, two = (glm.maps[session.name, "neuron"] for session in small)
    assert torch.equal(one.filters, two.filters)
    assert set(glm.schemes) == set(SCHEMES)
    for session in small:
        assert session.name in glm.summary()
    assert "rank 6" in repr(glm) and "penalty" in repr(fitted["ridge"])


def test_without_regions_the_region_schemes_are_missing(small):
    session = small[0]
    grid = {"bin_size": session.bin_size, "window": session.window}
    bare = Session(session.counts, name="bare", **grid)
    both = Ridge([bare, small[1]])
    counts, mask = shown(bare, np.arange(2), False)
    assert [scheme for name, scheme in both.maps if name == "bare"] == ["neuron", "causal"]
    with pytest.raises(ValueError, match="inter-region.*has: neuron, causal"):
        both.predict_log_rates(counts, "inter-region", mask, "bare")
    assert list(evaluate(both, bare).tasks) == ["co-smoothing", "forward-prediction"]
    assert list(evaluate(LowRankGLM(bare), bare).tasks) == ["co-smoothing", "forward-prediction"]


def test_silent_and_constant_neurons():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (30, 8, 6))
    counts[..., 2] = 0
    session = Session(counts, ["a", "a", "a", "b", "b", "b"], "s")
    for fit in (PSTH, Ridge, LowRankGLM):
        predictor = fit(session)
        assert all(np.isfinite(s.mean()) for s in evaluate(predictor, session).tasks.values())


def test_errors(fitted, small):
    first, second = small
    counts, mask = shown(first, np.arange(2), False)
    ridge = fitted["ridge"]
    with pytest.raises(SessionError, match=f"'{second.name}' is not among.*fit it on"):
        ridge.predict_log_rates(counts, "neuron", mask, second.name)
    fewer = Mask(mask.hidden[..., 1:], mask.target[..., 1:])
    with pytest.raises(SessionError, match="24 neurons, got"):
        ridge.predict_log_rates(counts[..., 1:], "neuron", fewer, first.name)
    with pytest.raises(ValueError, match="no 'temporal' predictions"):
        ridge.predict_log_rates(counts, "temporal", mask, first.name)
    with pytest.raises(ValueError, match="split of seed 0, not 1"):
        evaluate(ridge, first, split_seed=1)
    with pytest.raises(SessionError, match="two sessions"):
        Ridge([first, first])
    with pytest.raises(SessionError, match="no session"):
        Ridge([])
    short = Session(second.counts[:, :9], name="short", bin_size=second.bin_size)
    with pytest.raises(SessionError, match="the same n_bins"):
        ReducedRankRegression([first, short])
    with pytest.raises(ValueError, match="unknown baseline 'lasso'; known: PSTH, ridge"):
        fit_baseline("lasso", first)


@pytest.mark.parametrize("name", ["temporal NDT1", "random-token NDT2"])
def test_the_papers_baselines(small, name, tmp_path):
    how = {"epochs": 1, "depth": 1, "progress": False, "folder": tmp_path}
    result = fit_baseline(name, small[0], **how)
    again = fit_baseline(name, small[0], **how)  # each ratio's run goes on where it was
    assert again.history == result.history and again.config == result.config
    assert len(list(tmp_path.glob("*/config.json"))) == len(RATIOS) > 1
    assert isinstance(result, Fit) and result.model.prompts == ()
    assert result.model.config.tokenizer == name[-4:].lower()
    assert not result.model.causal
    assert len(BASELINES) == 6


def test_votes_are_those_of_neurons_that_fire():
    counts = torch.tensor([[4.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
    null = torch.tensor([3.0, 1 / 3]).log()
    log_rates = torch.tensor([[4.0, 5.0], [2.0, 5.0], [3.0, 5.0]]).log()
    expected = metrics.bits_per_spike(log_rates[None].numpy(), counts[None].numpy(), null.numpy())
    assert regression.bits(log_rates, counts, null) == pytest.approx(expected[0])
