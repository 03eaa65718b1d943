"""Predictors: what each task hides, that hidden entries cannot leak, batches and splits."""

import warnings

import numpy as np
import pytest
import torch

from mtm import Mask, MtM, MtMConfig, Session, SessionError, mean_rates
from mtm.prediction import TASKS, as_predictor, predict_held_out

REGIONS = ["CA1", "DG", "CA1", "CA1", "DG", "root", "LP"]


class Watcher:
    """Predicts each neuron's own count plus one, so that a leak shows. Keeps what it was given."""

    def __init__(self, fits=10**6, error=None):
        self.calls, self.fits, self.error = [], fits, error

    def predict_log_rates(self, counts, scheme, mask, session):
        self.calls.append((counts.clone(), scheme, mask, session))
        if len(counts) > self.fits:
            raise self.error
        return torch.log(counts + 1.0) - 1.0 * mask.hidden


@pytest.fixture(scope="module")
def session():
    """Seven neurons, one of them silent and one without a region."""
    counts = np.random.default_rng(0).poisson(0.6, (20, 20, 7))
    counts[:, :, 4] = 0
    return Session(counts, REGIONS, "s")


def hidden_with(task, n, session):
    """Hidden neurons when neuron n is scored, in the words of the paper."""
    regions = session.regions
    return {
        "co-smoothing": np.arange(7) == n,
        "forward-prediction": np.ones(7, bool),
        "inter-region": regions == regions[n],
        "intra-region": (regions != regions[n]) | (np.arange(7) == n),
    }[task]


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_hides_and_scores_what_it_says(task, batch_size, session):
    watcher = Watcher()
    found = predict_held_out(watcher, session, task, batch_size=batch_size)
    test = session.split().test
    bins = range(18, 20) if task == "forward-prediction" else range(20)
    times_scored = np.zeros((4, 20, 7), int)
    for counts, scheme, mask, name in watcher.calls:
        assert scheme == TASKS[task] and name == "s"
        assert mask.causal == (task == "forward-prediction")
        assert not (mask.target & ~mask.hidden).any()
        for shown, hidden, target in zip(counts, mask.hidden, mask.target, strict=True):
            n = target.any(0).nonzero().ravel()[0].item()
            expected = np.zeros((20, 7), bool)
            expected[np.ix_(list(bins), np.flatnonzero(hidden_with(task, n, session)))] = True
            np.testing.assert_array_equal(hidden, expected)
            shown_of = [np.where(hidden, 0, session.counts[k]) for k in test]
            # Several trials may be it where nothing is visible: then one not yet scored.
            same = [k for k in range(4) if np.array_equal(shown_of[k], shown)]
            trial = min(same, key=lambda k: times_scored[k][target].max())
            times_scored[trial] += target.numpy()
    labelled = np.ones(7, bool) if "region" not in task else session.region_codes >= 0
    once = np.zeros((4, 20, 7), int)
    once[np.ix_(range(4), list(bins), np.flatnonzero(labelled))] = 1
    np.testing.assert_array_equal(times_scored, once)
    # Every scored entry was predicted while hidden: log(0 + 1) - 1 = -1.
    np.testing.assert_array_equal(found, np.where(once, -1.0, np.nan))


def test_hidden_neurons_equal_the_authors(parity):
    """Which neurons each task zeroes, against inputs that the authors' code made."""
    theirs = torch.load(parity / "metrics.pt", weights_only=True)
    counts = theirs["heldout_input"].int().numpy()  # (3, 6, 8)
    session = Session(counts, theirs["heldout_regions"], "theirs", given_split=([0], [1], [2]))
    for task, name, scored in [
        ("co-smoothing", "per_neuron", [2]),
        ("inter-region", "inter_region", [0, 2, 5, 7]),
        ("intra-region", "intra_region", [2]),
    ]:
        watcher = Watcher()
        predict_held_out(watcher, session, task, np.arange(3), np.isin(np.arange(8), scored))
        ((shown, *_),) = watcher.calls
        np.testing.assert_array_equal(shown, theirs["heldout"][name]["spikes"])


def small_model(session, **fields):
    """A model whose output depends on every input far more than rounding does."""
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "stitch_width": 12}
    config = MtMConfig(**(sizes | {"patch_size": 4, "positions": "learned"} | fields))
    model = MtM(config, session.n_bins, init="paper")
    model.add_session(session.name, session.n_neurons, session.counts)
    return model.eval()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "fields",
    [
        {"input_counts": "raw", "own_history": False, "latents": 0},
        {"tokenizer": "ndt2"},
        {"positions": "rotary"},
    ],
    ids=str,
)
def test_equals_one_forward_pass_for_each_neuron_and_trial(fields, task, session):
    model = small_model(session, **fields)
    bins = slice(session.n_bins - 2 if task == "forward-prediction" else 0, None)
    expected = np.full((3, 20, 7), np.nan)
    for trial in range(3):
        for n in range(7):
            if "region" in task and session.regions[n] == "root":
                continue
            hidden = torch.zeros(1, 20, 7, dtype=torch.bool)
            hidden[:, bins] = torch.from_numpy(hidden_with(task, n, session))
            mask = Mask(hidden, hidden, causal=task == "forward-prediction")
            counts = torch.from_numpy(session.counts[[trial]]).float()
            log_rates = model.predict_log_rates(counts, TASKS[task], mask, "s")
            expected[trial, bins, n] = log_rates[0, bins, n].numpy()
    for wanted in (np.ones(7, bool), np.isin(np.arange(7), [1, 4, 6])):
        for batch_size in (None, 5):
            given = model, session, task, np.arange(3), wanted
            found = predict_held_out(*given, batch_size=batch_size)
            np.testing.assert_allclose(found, np.where(wanted, expected, np.nan), atol=1e-5)
    counts = torch.from_numpy(session.counts[:3]).float()
    shown = model.predict_log_rates(counts, TASKS[task], None, "s")
    assert np.nanmax(np.abs(shown.numpy() - expected)) > 1e-3  # it matters what is hidden


def test_a_predictor_that_can_is_asked_for_one_neuron(session):
    asked = []

    class One(Watcher):
        def predict_log_rates(self, counts, scheme, mask, session, neurons=None):
            whole = super().predict_log_rates(counts, scheme, mask, session)
            asked.append(neurons is not None)
            return whole if neurons is None else whole[torch.arange(len(counts)), :, neurons]

    for task in TASKS:
        found, plain = (predict_held_out(p, session, task) for p in (One(), Watcher()))
        np.testing.assert_array_equal(found, plain)
    assert asked == [True, False, False, True]


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_a_batch_is_halved_when_memory_runs_out(error, session):
    narrow = Watcher(3, error)
    found = predict_held_out(narrow, session, "co-smoothing", batch_size=12)
    np.testing.assert_array_equal(found, predict_held_out(Watcher(), session, "co-smoothing"))
    assert [len(call[0]) for call in narrow.calls] == [12, 6, *[3] * 9, 1]  # 28 passes
    for other in (error, RuntimeError("an illegal memory access")):
        with pytest.raises(type(other)):
            predict_held_out(Watcher(0, other), session, "co-smoothing", batch_size=4)


def test_a_session_of_the_same_name_with_other_neurons_is_doubted(session):
    model = small_model(session)
    model.seen = {"s": session.fingerprints(session.split().train)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_predictor(model, session)
        as_predictor(model, session.select(trials=np.arange(19)))
        as_predictor(model, Session(session.counts[::-1, :, ::-1], name="another"))
    for order in (np.arange(7)[::-1], [0, 1, 2, 3, 4, 6, 6]):  # in another order, one replaced
        with pytest.warns(UserWarning, match="session 's': .* are these the same neurons"):
            as_predictor(model, session.select(neurons=order))


def test_arrays_and_tensors_are_used_as_they_are(session):
    log_rates = np.random.default_rng(1).normal(size=(20, 20, 7))
    log_rates = torch.from_numpy(log_rates).bfloat16().double().numpy()  # no digits to lose
    tensor = torch.from_numpy(log_rates)
    for given in (log_rates, tensor.requires_grad_(), tensor.bfloat16(), {"s": tensor}):
        found = predict_held_out(given, session, "co-smoothing")
        np.testing.assert_array_equal(found, log_rates[session.split().test])
    means = mean_rates(session)
    train = session.counts[session.split().train]
    np.testing.assert_allclose(np.exp(means[0, 0, :4]), train.mean((0, 1))[:4])
    np.testing.assert_allclose(np.exp(means[0, 0, 4]), 0.5 / train[:, :, 4].size)


def test_errors(session):
    with pytest.raises(ValueError, match="returned shape.*must return a log-rate for every entry"):
        predict_held_out(lambda counts, *_: counts[:, :1], session, "co-smoothing")
    for bad in (lambda c, *_: torch.log(c * 0.0), np.full(session.counts.shape, np.nan)):
        with pytest.raises(ValueError, match="session 's': NaN or infinite log-rates"):
            predict_held_out(bad, session, "co-smoothing")
    with pytest.raises(ValueError, match=r"\(3,20,7\)"):
        as_predictor(np.zeros((3, 20, 7)), session)
    for name, value in (("bin_size", 0.05), ("n_bins", 19), ("window", (0.1, 0.5))):
        setattr(other := small_model(session), name, value)
        with pytest.raises(SessionError, match="20 bins of 0.02 s from 0 s, the model was trained"):
            as_predictor(other, session)
