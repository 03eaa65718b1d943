"""The activity tasks: what is hidden, what is scored, and that nothing can cheat."""

import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtm import (
    Mask,
    MtM,
    MtMConfig,
    Session,
    SessionError,
    evaluate,
    fit,
    mean_rates,
    metrics,
    oracle,
    score_table,
)
from mtm.prediction import predict_held_out
from mtm.prediction import TASKS, forward_bins


class Watcher:
    """Predicts from what it is shown: each neuron's own count plus one. Keeps what it saw."""

    def __init__(self):
        self.calls = []

    def predict_log_rates(self, counts, scheme, mask, session):
        self.calls.append((counts.clone(), scheme, mask, session))
        return torch.log(counts + 1.0) + mask.hidden * -1.0


@pytest.fixture(scope="module")
def session():
    rng = np.random.default_rng(0)
    return Session(
        rng.poisson(0.6, (20, 20, 7)),
        ["CA1", "CA1", "CA1", "DG", "DG", "root", "LP"],
        "s",
        behaviour={"choice": np.arange(20) % 2},
    )


def expected_hidden(task, n, session):
    """Hidden neurons when neuron n is scored, by the words of the table."""
    regions = session.regions
    return {
        "co-smoothing": np.arange(7) == n,
        "forward-prediction": np.ones(7, bool),
        "inter-region": regions == regions[n],
        "intra-region": (regions != regions[n]) | (np.arange(7) == n),
    }[task]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("task", TASKS)
def test_each_task_hides_and_scores_what_it_says(task, batch_size, session):
    watcher = Watcher()
    report = evaluate(watcher, session, tasks=[task], batch_size=batch_size)
    test = session.split().test
    bins = range(18, 20) if task == "forward-prediction" else range(20)
    scored = np.zeros((4, 20, 7), int)
    for counts, scheme, mask, name in watcher.calls:
        assert scheme == TASKS[task] and name == "s"
        assert mask.causal == (task == "forward-prediction")
        assert not counts[mask.hidden].any()  # zeroed before the predictor sees it
        for b in range(len(counts)):
            (n, *_) = mask.target[b].any(0).nonzero().ravel().tolist()
            hidden = np.zeros((20, 7), bool)
            hidden[np.ix_(list(bins), np.flatnonzero(expected_hidden(task, n, session)))] = True
            np.testing.assert_array_equal(mask.hidden[b], hidden)
            shown = [
                k
                for k in range(4)
                if np.array_equal(np.where(hidden, 0, session.counts[test[k]]), counts[b])
            ]
            assert shown
            scored[shown[0]] += mask.target[b].numpy()
    labelled = np.ones(7, bool) if "region" not in task else session.region_codes >= 0
    expected = np.zeros((20, 7), int)
    expected[np.ix_(list(bins), np.flatnonzero(labelled))] = 1
    if len({session.counts[k].tobytes() for k in test}) == 4:
        np.testing.assert_array_equal(scored.sum(0), 4 * expected)  # each entry exactly once
    scores = report.tasks[task]
    assert scores.neurons.tolist() == np.flatnonzero(labelled).tolist()
    assert scores.table["spikes"].sum() == session.counts[test][:, bins[0] :][:, :, labelled].sum()
    # every scored entry was predicted while hidden: log(0 + 1) - 1 = -1
    counts = session.counts[test][:, bins[0] :][:, :, labelled]
    flat = np.full(counts.shape, -1.0)
    np.testing.assert_allclose(
        scores.table["bits_per_spike"], metrics.bits_per_spike(flat, counts), atol=1e-6
    )
    null = metrics.log_mean(session.counts[session.split().train])[labelled]
    np.testing.assert_allclose(
        scores.table["bits_per_spike_train_null"],
        metrics.bits_per_spike(flat, counts, null),
        atol=1e-6,
    )


def test_an_array_is_scored_as_the_same_predictions_from_a_function(session):
    log_rates = np.random.default_rng(1).normal(-0.5, 0.3, session.counts.shape)
    constant = log_rates.mean((0, 1))
    a = evaluate(constant, session)
    b = evaluate(lambda c, scheme, mask, name: torch.from_numpy(constant).expand(c.shape), session)
    for task in TASKS:
        for column in ("bits_per_spike", "trial_r2", "poisson_d2"):
            x, y = (r.tasks[task].table[column] for r in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_subset_of_neurons_and_trials(session):
    report = evaluate(Watcher(), session, trials=np.array([0, 5]), neurons=[1, 3, 5])
    assert report.n_trials == 2
    assert report.tasks["co-smoothing"].neurons.tolist() == [1, 3, 5]
    assert report.tasks["intra-region"].neurons.tolist() == [1, 3]
    whole = evaluate(Watcher(), session, trials=np.array([0, 5]))
    for task in TASKS:
        part, all_of = report.tasks[task], whole.tasks[task]
        keep = np.isin(all_of.neurons, part.neurons)
        np.testing.assert_allclose(part.table["trial_r2"], all_of.table["trial_r2"][keep])


def test_silent_neurons_are_counted_and_not_averaged():
    counts = np.random.default_rng(0).poisson(0.6, (20, 20, 3))
    counts[:, :, 1] = 0
    report = evaluate(mean_rates(s := Session(counts, name="s")), s)
    scores = report.tasks["co-smoothing"]
    assert scores.n_silent == 1 and np.isnan(scores.table["bits_per_spike"][1])
    assert scores.mean() == pytest.approx(np.nanmean(scores.table["bits_per_spike"]))
    assert set(report.left_out) == {"inter-region", "intra-region"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_oracle_above_model_above_null(sessions, trained):
    for session in sessions:
        predictors = {
            "MtM": trained.model, "null": mean_rates(session), "oracle": oracle(session)
        }  # fmt: skip
        reports = {k: evaluate(p, session, tasks=list(TASKS)) for k, p in predictors.items()}
        for task in TASKS:
            score = {k: r.tasks[task].mean("bits_per_spike_train_null") for k, r in reports.items()}
            assert score["oracle"] > score["MtM"] > score["null"], (task, score)
            assert score["null"] == pytest.approx(0, abs=1e-9)
    table = score_table(reports)
    assert "co-smoothing" in table and "oracle" in table


def test_forward_prediction_hides_a_tenth():
    assert [forward_bins(t) for t in (100, 50, 20, 7, 1)] == [
        (90, 100), (45, 50), (18, 20), (6, 7), (0, 1)
    ]  # fmt: skip


def test_the_report_says_what_it_holds(session):
    text = str(evaluate(mean_rates(session), session))
    for part in (
        "'s', 4 trials",
        "over their test mean",
        "over their training mean",
        "of them silent",
    ):
        assert part in text
    text = str(evaluate(np.zeros(7), Session(session.counts)))
    assert "inter-region: left out, no scored neuron has a region label" in text


def test_neurons_predicted_from_nothing_are_counted(session):
    report = evaluate(Watcher(), session)
    visible = {task: scores.table["visible"].tolist() for task, scores in report.tasks.items()}
    assert visible["co-smoothing"] == [6] * 7 and visible["forward-prediction"] == [7] * 7
    assert visible["inter-region"] == [4, 4, 4, 5, 5, 6]
    assert visible["intra-region"] == [2, 2, 2, 1, 1, 0]  # LP has one neuron
    assert report.to_dict()["intra-region"]["neurons_with_nothing_visible"] == 1


def test_a_model_is_scored_on_the_split_it_was_trained_on(sessions):
    session = sessions[0]
    model = fit(session, depth=1, epochs=1, split_seed=5, progress=False).model
    null = evaluate(mean_rates(session, 5), session, split_seed=5, tasks=["forward-prediction"])
    ours = evaluate(model, session, tasks=["forward-prediction"])
    spikes = [r.tasks["forward-prediction"].table["spikes"].tolist() for r in (null, ours)]
    assert spikes[0] == spikes[1]
    with pytest.raises(ValueError, match="trained on the split of seed 5, not 0"):
        evaluate(model, session, split_seed=0)


def test_trials_and_neurons_as_flags(session):
    flags = np.arange(20) < 5
    a = evaluate(Watcher(), session, trials=flags, neurons=np.arange(7) < 2)
    b = evaluate(Watcher(), session, trials=np.arange(5), neurons=[0, 1])
    assert str(a) == str(b) and a.n_trials == 5


def test_rates_that_are_next_to_nothing_can_be_shuffled(session):
    report = evaluate(np.full((1, 1, 7), -800.0), session, tasks=["co-smoothing"])
    assert (report.tasks["co-smoothing"].table["shuffled_neurons"] < 0).all()


def test_log_rates_may_be_a_tensor(session):
    log_rates = torch.randn(20, 20, 7, dtype=torch.float64)
    ours, same = (
        evaluate(x, session, tasks=["co-smoothing"]) for x in (log_rates, log_rates.numpy())
    )
    assert str(ours) == str(same)


def test_errors(session):
    with pytest.raises(ValueError, match="no trials to score"):
        evaluate(mean_rates(session), session, trials=[])
    with pytest.raises(ValueError, match=r"tasks must be a list.*pass \['co-smoothing'\]"):
        evaluate(mean_rates(session), session, tasks="co-smoothing")
    with pytest.raises(ValueError, match="log-rates hold NaN"):
        evaluate(np.full(session.counts.shape, np.nan), session)
    with pytest.raises(
        ValueError, match="unknown task 'cosmoothing'; pass a list of some of: co-smoothing"
    ):
        evaluate(mean_rates(session), session, tasks=["cosmoothing"])
    with pytest.raises(ValueError, match="unknown task 'cosmoothing'; known: co-smoothing"):
        predict_held_out(mean_rates(session), session, "cosmoothing")
    with pytest.raises(SessionError, match="session 's', co-smoothing: no neuron to score"):
        nobody = np.zeros(session.n_neurons, dtype=bool)
        predict_held_out(mean_rates(session), session, "co-smoothing", wanted=nobody)
    with pytest.raises(SessionError, match="inter-region: no scored neuron has a region label"):
        evaluate(Watcher(), Session(session.counts), tasks=["inter-region"])
    with pytest.raises(ValueError, match="the predictor returned shape"):
        evaluate(lambda c, *_: c[:, :1], session)
    with pytest.raises(ValueError, match="NaN or infinite log-rates in session 's'"):
        evaluate(lambda c, *_: torch.log(c * 0.0), session)
    with pytest.raises(ValueError, match="a predictor is a function of"):
        evaluate([1.0], session)  # a list can be neither called nor hashed
    with pytest.raises(ValueError, match="no neurons to score; its regions are: "):
        evaluate(mean_rates(session), session, neurons=np.flatnonzero(session.regions == "CA7"))
    with pytest.raises(ValueError, match="neurons are indices, got 'CA1'; of a region they are"):
        evaluate(mean_rates(session), session, neurons="CA1")
    with pytest.raises(ValueError, match="a predictor is a function of .counts, scheme, mask, ses"):
        evaluate(lambda counts: counts, session)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(Watcher(), session, batch_size=0)
    with pytest.raises(SessionError, match="only simulated sessions"):
        oracle(session)


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
        evaluate(watcher, session, tasks=[task], trials=[0, 1, 2], neurons=scored)
        ((shown, *_),) = watcher.calls
        np.testing.assert_array_equal(shown, theirs["heldout"][name]["spikes"])


# ------------------------------------------------------------------- batches, and what is left out

MODELS = {
    "ndt1": {},
    "ndt2": {"tokenizer": "ndt2"},
    "rotary, scaled": {"positions": "rotary", "input_counts": "scaled"},
}


@pytest.fixture(scope="module")
def sparse():
    """9 neurons that are often silent, one of them always; a region of two, and one of one."""
    rng = np.random.default_rng(2)
    counts = rng.poisson(rng.lognormal(-3, 1, 9), (10, 12, 9))
    counts[:, :, 4] = 0
    regions = ["CA1", "DG", "CA1", "CA1", "DG", "root", "LP", "CA1", "CA1"]
    return Session(counts, regions, "sparse")


def small_model(session, **fields):
    """Its output depends on every input far more than rounding does."""
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "stitch_width": 12}
    config = MtMConfig.published(**(sizes | {"patch_size": 4} | fields))
    sizes = {session.name: session.n_neurons}
    model = MtM(config, session.n_bins, sizes, bin_size=session.bin_size, init="paper")
    model.split_seed = 0
    if config.input_counts == "scaled":
        model.session_layers(session.name).mean += 0.1
    return model


def one_by_one(model, session, task):
    """Log-rates of every neuron in every trial from a forward pass of its own."""
    bins = slice(session.n_bins - 1 if task == "forward-prediction" else 0, None)
    found = np.full(session.counts.shape, np.nan)
    model.eval()
    for trial in range(session.n_trials):
        for n in range(session.n_neurons):
            if "region" in task and session.regions[n] == "root":
                continue
            mine = session.regions == session.regions[n]
            neurons = {
                "co-smoothing": np.arange(session.n_neurons) == n,
                "forward-prediction": np.ones(session.n_neurons, bool),
                "inter-region": mine,
                "intra-region": ~mine | (np.arange(session.n_neurons) == n),
            }[task]
            hidden = torch.zeros(1, session.n_bins, session.n_neurons, dtype=torch.bool)
            hidden[:, bins] = torch.from_numpy(neurons)
            mask = Mask(hidden, hidden, causal=task == "forward-prediction")
            counts = torch.from_numpy(session.counts[[trial]]).float()
            with torch.no_grad():
                log_rates = model(counts, TASKS[task], mask, session.name)
            found[trial, bins, n] = log_rates[0, bins, n].numpy()
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_equals_one_forward_pass_for_each_neuron_and_trial(fields, task, sparse):
    model = small_model(sparse, **fields)
    expected = one_by_one(model, sparse, task)
    for trials, wanted in [
        (np.arange(10), np.ones(9, dtype=bool)),
        (np.array([7, 2, 3]), np.ones(9, dtype=bool)),
        (np.arange(4), np.isin(np.arange(9), [1, 4, 5, 8])),
        (np.arange(4), np.arange(9) == 3),
    ]:
        of_these = np.where(wanted, expected, np.nan)[trials]
        for batch_size in (None, 1, 5):
            found = predict_held_out(model, sparse, task, trials, wanted, batch_size=batch_size)
            np.testing.assert_allclose(found, of_these, atol=1e-6, rtol=0)
    with torch.no_grad():
        shown = model(torch.from_numpy(sparse.counts).float(), TASKS[task], None, "sparse")
    assert np.nanmax(np.abs(shown.numpy() - expected)) > 1e-2  # it matters what is hidden


@pytest.mark.parametrize(
    "fields",
    [{}, {"input_counts": "scaled"}],
    ids=str,
)
@pytest.mark.parametrize("task", ["co-smoothing", "intra-region", "inter-region"])
def test_passes_are_shared_where_nothing_shown_differs(task, fields, sparse):
    model, passes = small_model(sparse, **fields), []
    model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    predict_held_out(model, sparse, task, np.arange(10), np.ones(9, dtype=bool))
    shown = set()  # (trial, what is visible of it), and a query for each scored neuron or region
    queries = 0
    for n in np.flatnonzero(sparse.region_codes >= 0) if "region" in task else range(9):
        mine = sparse.regions == sparse.regions[n]
        own = np.arange(9) == n
        hidden = {"co-smoothing": own, "intra-region": ~mine | own, "inter-region": mine}[task]
        queries += 10 * (task != "inter-region" or n == np.flatnonzero(mine)[0])
        shown |= {(k, np.where(hidden, 0, sparse.counts[k]).tobytes()) for k in range(10)}
    assert sum(passes) == (queries if fields else len(shown))
    assert len(shown) < queries


def test_a_fit_is_evaluated_as_its_model(sessions, trained):
    trials = sessions[0].split().test[:5]
    options = {"tasks": ["co-smoothing"], "trials": trials, "neurons": [0, 3]}
    passes = []
    hook = trained.model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    of_model, of_fit = (evaluate(p, sessions[0], **options) for p in (trained.model, trained))
    hook.remove()
    assert str(of_model) == str(of_fit)
    half = len(passes) // 2
    assert passes[:half] == passes[half:]


@pytest.mark.parametrize("takes_neurons", [True, False])
def test_a_predictor_is_asked_for_one_neuron_if_it_can_tell(takes_neurons, session):
    asked = []

    class One(Watcher):
        def predict_log_rates(self, counts, scheme, mask, session, neurons=None):
            whole = super().predict_log_rates(counts, scheme, mask, session)
            asked.append(neurons)
            if neurons is None:
                return whole
            rows = torch.arange(len(counts))
            assert mask.target[rows, 0, neurons].all() and mask.target[:, 0].sum() == len(counts)
            return whole[rows, :, neurons]

    report = evaluate(One() if takes_neurons else Watcher(), session, tasks=["co-smoothing"])
    assert str(report) == str(evaluate(Watcher(), session, tasks=["co-smoothing"]))
    assert [n is not None for n in asked] == [True] * takes_neurons
    evaluate(One(), session, tasks=["inter-region"])
    assert asked[-1] is None  # more than one neuron of a trial is scored


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    MemoryError(),
]


class Narrow(Watcher):
    """Runs out of memory above a number of trials."""

    def __init__(self, fits, error):
        super().__init__()
        self.fits, self.error, self.tried = fits, error, []

    def predict_log_rates(self, counts, scheme, mask, session):
        self.tried.append(len(counts))
        if len(counts) > self.fits:
            raise self.error
        return super().predict_log_rates(counts, scheme, mask, session)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu", "cpu too", "numpy"])
@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_halved_when_memory_runs_out(task, error, session):
    narrow, watcher = Narrow(3, error), Watcher()
    report = evaluate(narrow, session, tasks=[task], batch_size=12)
    assert str(report) == str(evaluate(watcher, session, tasks=[task]))
    for column, values in evaluate(watcher, session, tasks=[task]).tasks[task].table.items():
        np.testing.assert_array_equal(values, report.tasks[task].table[column])
    tried, total = narrow.tried, sum(len(call[0]) for call in watcher.calls) // 2
    too_many = [n for n in tried if n > 3]
    assert too_many == [{"forward-prediction": 4}.get(task, 12), 6][: len(too_many)]
    assert sum(tried) - sum(too_many) == total  # what was done is not done again


def test_memory_for_not_even_one_trial(session):
    narrow = Narrow(0, NO_MEMORY[0])
    with pytest.raises(
        MemoryError, match="session 's', co-smoothing: memory runs out with a single"
    ):
        evaluate(narrow, session, batch_size=4)
    assert narrow.tried == [4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(session):
    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied$"):
        evaluate(Narrow(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")), session)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_waits_for_no_result(task, sparse):
    """On a GPU, each of these would stop the queue."""
    waits = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.overloadpacket.__name__
            flags = [x for x in args[1] if x is not None] if name.startswith("index") else []
            if name in ("nonzero", "_local_scalar_dense", "masked_select", "equal") or any(
                x.dtype == torch.bool for x in flags if isinstance(x, torch.Tensor)
            ):
                waits.append(name)
            return operation(*args, **kwargs or {})

    with Listener():
        predict_held_out(
            small_model(sparse), sparse, task, np.arange(10), np.ones(9, bool), batch_size=4
        )
        assert not waits
        counts = torch.ones(2)
        bool(counts[counts > 0].any())
    assert waits == ["index", "_local_scalar_dense"]
