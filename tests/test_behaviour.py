"""Fine-tuning on behaviour: it starts at scikit-learn's decoder, and uses no test trial."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, r2_score

from mtm import Session, SessionError, decoding, fit_behaviour


@pytest.fixture(scope="module")
def known(sessions):
    """A session of the trained model, with a word of three, and a number, for each trial."""
    s = sessions[0]
    level = s.behaviour["wheel-speed"].mean(axis=1)
    words = np.array(["slow", "medium", "fast"])[np.digitize(level, np.quantile(level, [0.3, 0.7]))]
    words[s.split().train[0]] = ""
    behaviour = s.behaviour | {"pace": words, "level": level}
    fields = {"name": s.name, "bin_size": s.bin_size, "window": s.window, "behaviour": behaviour}
    return Session(s.counts, s.regions, **fields)


def test_it_starts_at_the_linear_decoder_and_returns_the_best_epoch(trained, known):
    before = copy.deepcopy(trained.model.state_dict())
    name = "wheel-speed"
    random = torch.get_rng_state()
    found = fit_behaviour(known, trained, name, epochs=4)[name]
    assert torch.equal(torch.get_rng_state(), random)
    assert all((trained.model.state_dict()[key] == value).all() for key, value in before.items())
    split, y = known.split(), known.behaviour[name]
    z = trained.model.latents(known.counts.astype(np.float32), known.name, encoder=True)
    x = gaussian_filter1d(z.double().numpy(), decoding.ENCODER_WIDTH, axis=1, mode="nearest")
    x, scale = x.reshape(len(x), -1), y[np.concatenate(split[:2])].std()
    fits = (Ridge(alpha=a).fit(x[split.train], y[split.train]) for a in decoding.RIDGE_PENALTIES)
    losses = [np.mean((fit.predict(x[split.val]) - y[split.val]) ** 2) for fit in fits]
    assert np.abs(np.array(losses) / scale**2 - found.val_loss[0]).min() < 1e-4
    values = torch.from_numpy(y[split.val] / scale).float()
    counts = torch.from_numpy(known.counts[split.val]).float()
    assert not found.readout.model.calibration  # it was of the weights before
    output = found.readout(counts, torch.zeros(counts.shape, dtype=torch.bool))
    assert found.readout.loss(output, values).item() == pytest.approx(min(found.val_loss))
    guess = found.readout.predict(known.counts[split.test])
    assert found.decoded.score == pytest.approx(r2_score(y[split.test].ravel(), guess.ravel()))
    assert found.decoded.features == "fine-tuned" and "raw_counts" in found.decoded.others


def test_classes_and_numbers_are_learned_without_the_test_trials(trained, known):
    split = known.split()
    found = fit_behaviour(known, trained, ["pace", "level"], epochs=3)
    other = copy.deepcopy(known)
    for name in ("pace", "level"):
        other.behaviour[name][split.test] = np.roll(other.behaviour[name][split.test], 1)
    again = fit_behaviour(other, trained, ["pace", "level"], epochs=3)
    for name, one in found.items():
        assert one.val_loss == again[name].val_loss and min(one.val_loss) <= one.val_loss[0]
        guess = one.readout.predict(known.counts)
        assert (guess == again[name].readout.predict(known.counts)).all()
        truth = known.behaviour[name][split.test]
        right = (accuracy_score if name == "pace" else r2_score)(truth, guess[split.test])
        assert one.decoded.score == pytest.approx(right)
    assert set(found["pace"].readout.predict(known.counts)) <= {"slow", "medium", "fast"}
    assert found["pace"].decoded.n_left_out == 1
    assert (found["pace"].decoded.kind, found["level"].decoded.kind) == ("classes", "number")
    with pytest.raises(SessionError, match="there is none"):
        fit_behaviour(known, trained, "whisking")
    words, fields = known.behaviour["pace"].copy(), {"name": known.name, "bin_size": known.bin_size}
    words[split.train[words[split.train] == "fast"]] = "slow"
    words[split.val[:4]] = "fast"
    for window, message in ((known.window, "two training trials of each"), ((9, 11), "from 9 s")):
        s = Session(known.counts, behaviour={"pace": words}, window=window, **fields)
        with pytest.raises(SessionError, match=message):
            fit_behaviour(s, trained, "pace")
