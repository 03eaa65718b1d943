"""Decoders: the same answers as scikit-learn on all features, and controls that tell."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix, r2_score
from sklearn.model_selection import GridSearchCV, KFold

from mtm import Session, SessionError, decode, decode_by_region, decoding, oracle
from mtm.decoding import principal_axes


@pytest.fixture(scope="module")
def session():
    """Choice and a trace that two of six neurons carry; the others are noise."""
    rng = np.random.default_rng(0)
    choice = rng.choice([-1, 1], 120)
    trace = np.cumsum(rng.normal(size=(120, 8)), axis=1) * 0.5
    log_rates = np.zeros((120, 8, 6))
    log_rates[:, :, 0] = 0.8 * choice[:, None]
    log_rates[:, :, 1] = 0.5 * trace
    return Session(
        rng.poisson(np.exp(log_rates)),
        ["CA1", "CA1", "DG", "DG", "DG", "DG"],
        "s",
        behaviour={
            "choice": choice,
            "contrast": rng.random(120),
            "block": np.array(["left", "right"])[np.arange(120) // 60],  # words
            "trace": trace,
        },
        rates=np.exp(log_rates),
    )


def test_rotation_changes_no_prediction():
    rng = np.random.default_rng(1)
    x, x_test = rng.normal(size=(30, 200)) + 3, rng.normal(size=(10, 200)) + 3
    y = rng.normal(size=(30, 4))
    r, r_test = principal_axes(x, x_test)
    assert r.shape[1] <= 30
    for alpha in (0.1, 10.0, 1000.0):
        a, b = Ridge(alpha=alpha).fit(x, y), Ridge(alpha=alpha).fit(r, y)
        np.testing.assert_allclose(a.predict(x_test), b.predict(r_test), atol=1e-8)
    labels = np.sign(y[:, 0])
    for c in (0.001, 0.1):
        a, b = (LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(f, labels) for f in (x, r))
        np.testing.assert_allclose(
            a.decision_function(x_test), b.decision_function(r_test), atol=1e-3
        )


def test_what_activity_carries_is_decoded_and_controls_are_not(session):
    results = decode(oracle(session), session)
    assert list(results) == ["choice", "trace"]
    choice, trace = results["choice"], results["trace"]
    assert choice.score == 1 and choice.metric == "accuracy"
    assert choice.others["raw_counts"] > 0.9 and choice.others["smoothed_counts"] > 0.9
    for control in ("shuffled", "stimulus_only", "majority"):
        assert choice.others[control] < 0.8
    assert trace.score > 0.95
    assert 0.3 < trace.others["raw_counts"] < trace.others["smoothed_counts"] < 0.9
    assert trace.others["time_course"] < 0.05 and trace.others["shuffled"] < 0.1
    assert (choice.n_train, choice.n_test) == (96, 24)


def test_one_region_at_a_time(session):
    found = decode_by_region(oracle(session), session, "trace")
    assert list(found) == ["CA1", "DG"]
    assert found["CA1"].score > 0.95 and found["DG"].score < 0.05
    alone = decode(oracle(session), session, "trace", region="DG")["trace"]
    assert alone.score == found["DG"].score
    with pytest.raises(SessionError, match="no region 'LP'; known: CA1, DG"):
        decode(oracle(session), session, "choice", region="LP")


def test_trials_without_choice_or_with_nan_are_left_out(session):
    choice, trace = (session.behaviour[key].astype(float) for key in ("choice", "trace"))
    choice[::4], trace[1::4, 3] = 0, np.nan
    holes = Session(session.counts, name="s", behaviour={"choice": choice, "trace": trace})
    for one in decode(holes.counts + 0.0, holes).values():
        assert (one.n_train + one.n_test, one.n_left_out) == (90, 30)


def test_predictor_functions_see_only_the_region(session):
    seen = []

    def watch(counts, scheme, mask, name):
        seen.append((scheme, mask.causal, counts.sum((0, 1))))
        return counts + 0.0

    decode(watch, session)
    decode(watch, session, "choice", region="CA1")
    decode(watch, session, "choice", prompt="causal")
    assert [(scheme, causal) for scheme, causal, _ in seen] == [
        ("neuron", False), ("causal", True), ("intra-region", False), ("causal", True)
    ]  # fmt: skip
    assert bool((seen[0][2] > 0).all())
    assert bool((seen[2][2][:2] > 0).all()) and not seen[2][2][2:].any()


def test_errors(session):
    with pytest.raises(SessionError, match="behaviour 'wheel': there is none; there are: choice"):
        decode(oracle(session), session, "wheel")
    split = session.split()
    rare, absent = np.array(["left cue", "right cue"])[np.arange(120) % 2], np.ones(120)
    rare[split.train[:2]], absent[split.train[:9]] = "none", -1
    behaviour = {"x": np.full((120, 8), np.nan), "flat": np.ones((120, 8))}
    behaviour |= {"rare": rare, "choice": absent}
    bad = Session(session.counts, name="s", behaviour=behaviour)
    for name, message in {
        "x": "0 usable training and 0 test trials",
        "flat": "does not vary in the test trials: all are 1.0",
        "choice": "does not vary in the test trials: all are 1.0",
        "rare": "class 'none' of .* has 2 training trials, 4 are needed; merge it",
    }.items():
        with pytest.raises(SessionError, match=message):
            decode(session.counts + 0.0, bad, name)


def test_latents_are_decoded_as_scikit_learn_does_and_decoders_averaged(trained, sessions, session):
    name = "wheel-speed"
    found = {
        features: decode(trained, sessions[0], name, features=features)[name]
        for features in decoding.FEATURES
    }
    names = [one.features for one in found.values()]
    assert names == ["rates", "latents", "latents and encoder"]
    assert str(decode(trained, sessions[0], name)[name]) == str(found["auto"])
    # By hand, on all features: a ridge for each width. The encoder's output stands beside latents.
    split, y = sessions[0].split(), sessions[0].behaviour[name]
    trials = np.concatenate(split[:2])
    counts = torch.from_numpy(sessions[0].counts).float()
    model, guesses, losses = trained.model, [], []
    widths = [(False, width) for width in decoding.WIDTHS] + [(True, decoding.ENCODER_WIDTH)]
    for encoder, width in widths:
        z = model.latents(counts, sessions[0].name, encoder=encoder).double().numpy()
        x = gaussian_filter1d(z, width, axis=1, mode="nearest") if width else z
        x = x.reshape(len(x), -1)
        how = {"cv": KFold(4, shuffle=True, random_state=0), "scoring": "neg_mean_squared_error"}
        ridge = GridSearchCV(Ridge(), {"alpha": decoding.RIDGE_PENALTIES}, **how)
        guesses.append(ridge.fit(x[trials], y[trials]).predict(x[split.test]))
        losses.append(-ridge.best_score_)
    n_widths = len(decoding.WIDTHS)
    weights = np.array([1] * n_widths + [n_widths]) / np.array(losses) ** 10
    for features, n in (("latents", n_widths), ("auto", n_widths + 1)):
        guess = np.average(guesses[:n], axis=0, weights=weights[:n])
        by_hand = r2_score(y[split.test].ravel(), guess.ravel())
        assert found[features].score == pytest.approx(by_hand, abs=1e-5)
    both = model.latents(counts, sessions[0].name, encoder=True).double().numpy()
    np.testing.assert_allclose(both[..., : model.config.latents], model.latents(counts, "sim-3-0"))
    # A decoder of one region does not see the others, and a function has no latents.
    region = sessions[0].region_names[0]
    alone = decode(trained, sessions[0], name, region=region, features="latents")[name]
    assert alone.score < found["latents"].score
    assert decode(trained, sessions[0], name, prompt="causal")[name].features == "rates"
    with pytest.raises(ValueError, match="'rates' with a prompt: 'latents'"):
        decode(trained, sessions[0], name, prompt="causal", features="latents")
    with pytest.raises(ValueError, match="no latents to decode from"):
        decode(lambda counts, *_: counts + 0.0, session, "choice", features="latents")


def test_probabilities_of_classes_are_averaged_and_the_better_decoder_weighs_more(
    trained, sessions, monkeypatch
):
    """Of two classes, a good decoder of the encoder outvotes those of the latents."""
    scores = {"latents": -1.1, "encoder": -1.0}

    def fit(decoder, source, target, y):
        probability = 0.2 if source[0] == "latents" else 0.75
        return scores.get(source[0], -1.0), np.tile(
            [1 - probability, probability], (len(target.truth), 1)
        )

    monkeypatch.setattr(decoding.Decoder, "fit", fit)
    right = (sessions[0].behaviour["choice"][sessions[0].split().test] > 0).mean()
    assert decode(trained, sessions[0], "choice")["choice"].score == pytest.approx(right)
    scores["encoder"] = -1.2  # now 0.75 weighs less than half
    assert decode(trained, sessions[0], "choice")["choice"].score == pytest.approx(1 - right)


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1.0, 0.0, 1.0], ["no go", "left", "right"]])
def test_classes_of_any_kind_are_decoded_as_scikit_learn_does(session, labels):
    rng = np.random.default_rng(3)
    code = rng.integers(3, size=120)
    rates = np.where(code[:, None, None] == np.arange(6) % 3, 2.0, 0.4)
    rates = np.broadcast_to(rates, session.counts.shape)
    given = np.array(labels)[code]
    given[session.split().train[0]] = "" if isinstance(labels[0], str) else labels[0]
    counts = rng.poisson(rates)
    s = Session(counts, ["VISp"] * 6, "s", behaviour={"side": given})
    found = decode(counts + 0.0, s, "side")["side"]
    y, split = s.behaviour["side"], s.split()
    fit = np.concatenate(split[:2])
    fit = fit[y[fit] != ""] if y.dtype.kind == "U" else fit
    assert (found.kind, found.n_train, found.n_left_out) == ("classes", len(fit), 96 - len(fit))
    guesses = [
        LogisticRegression(C=c, max_iter=10_000)
        .fit(counts[fit].reshape(len(fit), -1), y[fit])
        .predict(counts[split.test].reshape(24, -1))
        for c in decoding.CLASS_PENALTIES
    ]
    expected = [confusion_matrix(y[split.test], g) for g in guesses]
    assert any((found.confusion.to_numpy() == e).all() for e in expected)
    assert found.confusion.index.tolist() == np.unique(y[y != ""] if len(fit) < 96 else y).tolist()
    assert found.score == np.trace(found.confusion) / 24 > 0.8
    recall = np.diag(found.confusion) / found.confusion.sum(axis=1)
    assert found.others["balanced_accuracy"] == pytest.approx(recall.mean())
    assert found.others["majority"] < 0.6 > found.others["shuffled"]


def test_numbers_are_decoded_and_kinds_can_be_set(session):
    speed = session.rates[:, :, 1].mean(axis=1)  # (K,)
    behaviour = {"speed": speed, "level": np.digitize(speed, np.quantile(speed, [0.3, 0.7])) / 4}
    s = Session(session.counts, name="s", behaviour=behaviour)
    found = decode(session.rates, s, ["speed", "level"])
    assert found["speed"].kind == found["level"].kind == "number"
    x, split = session.rates.reshape(120, -1), s.split()
    fit = np.concatenate(split[:2])
    scores = [
        Ridge(alpha=a).fit(x[fit], speed[fit]).score(x[split.test], speed[split.test])
        for a in decoding.RIDGE_PENALTIES
    ]
    assert np.abs(np.array(scores) - found["speed"].score).min() < 1e-6
    assert found["speed"].score > 0.9
    assert found["speed"].others["mean"] <= 0 and found["speed"].others["shuffled"] < 0.1
    classes = decode(session.rates, s, "level", kinds={"level": "classes"})["level"]
    assert classes.kind == "classes" and classes.confusion.index.tolist() == [0, 0.25, 0.5]


def test_a_choice_of_zero_is_no_response_and_other_codes_are_classes(session):
    side = session.behaviour["choice"] > 0
    codes = {"1/2": 1 + side, "-1/0": np.where(side, 0, -1), "0/1": side, "with 2": 2 * side - 1}
    codes["with 2"][::3] = 2
    for name, choice in codes.items():
        s = Session(session.counts, name="s", behaviour={"choice": choice})
        found = decode(session.rates, s, "choice")["choice"]
        assert found.n_left_out == 0 and len(found.confusion) == len(np.unique(choice)), name
    odd = {"choice": 2 * side - 1, "contrast": np.array(["low"] * 120)}
    odd["licks"] = session.rates[..., 1] > np.median(session.rates[..., 1])
    found = decode(session.rates, Session(session.counts, name="s", behaviour=odd))
    assert found["licks"].kind == "trace" and "stimulus_only" not in found["choice"].others
    absent = np.array(["a", "b", "c"])[np.arange(120) % 3]
    absent[session.split().test[absent[session.split().test] == "c"]] = "a"
    s = Session(session.counts, name="s", behaviour={"choice": absent})
    with pytest.warns(UserWarning, match="no test trial is 'c'"):
        decode(session.rates, s, "choice")
