"""Training: the loss by loop, every trial once, the same twice, and better than the mean rate."""

import numpy as np
import pytest
import torch

from mtm import MtM, MtMConfig, SessionError, fit
from mtm.session import Session
from mtm.train import RECIPES, TrainConfig, _batches, _Data, masked_loss, recipe, validate

QUICK = {"depth": 1, "epochs": 2, "validations": 2, "progress": False, "device": "cpu"}


def test_loss_is_the_poisson_likelihood_of_the_targets_alone():
    rng = np.random.default_rng(0)
    log_rates, counts = rng.normal(size=(2, 3, 4)), rng.poisson(1.0, (2, 3, 4))
    target = rng.random((2, 3, 4)) < 0.4
    total = sum(np.exp(r) - c * r for r, c in zip(log_rates[target], counts[target], strict=True))
    tensors = [torch.from_numpy(x) for x in (log_rates, counts.astype(float), target)]
    assert masked_loss(*tensors, "sum").item() == pytest.approx(total)
    assert masked_loss(*tensors, "mean").item() == pytest.approx(total / target.sum())


def test_every_training_trial_once_an_epoch_in_new_company(sessions):
    data = [_Data(s, TrainConfig(), torch.device("cpu")) for s in sessions]
    order = np.random.default_rng(0)
    epochs = [list(_batches(data, 16, order)) for _ in range(2)]
    for epoch in epochs:
        for session in data:
            seen = np.concatenate([trials for s, trials in epoch if s is session])
            assert sorted(seen) == session.train.tolist()
    together = [{frozenset(trials) for s, trials in epoch if s is data[0]} for epoch in epochs]
    assert not together[0] & together[1]


def test_training_never_sees_validation_or_test_trials(sessions):
    clean = sessions[0]
    split = clean.split()
    counts = clean.counts.copy()
    counts[split.test] = 200
    spoilt = Session(counts, clean.regions, name=clean.name)
    clean = Session(clean.counts, clean.regions, name=clean.name)
    one, two = (fit(s, **QUICK).model.state_dict() for s in (clean, spoilt))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_same_seed_same_weights_and_the_callers_generator_is_left_alone(sessions):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = fit(sessions, **QUICK).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    two = fit(sessions, **QUICK).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = fit(sessions, **QUICK, seed=1).model.state_dict()
    assert not torch.equal(one["position"], other["position"])


def test_validation_masks_are_fixed(sessions):
    data = [_Data(s, TrainConfig(), torch.device("cpu")) for s in sessions]
    model = fit(sessions, **QUICK).model
    assert validate(model, data, TrainConfig()) == validate(model, data, TrainConfig())


def test_a_model_learns_more_than_the_mean_rate(trained):
    best = trained.best
    assert set(best["validation"]) == {"neuron", "causal", "inter-region", "intra-region"}
    assert all(value > 0.03 for value in best["validation"].values())
    data_free = trained.history[0]["mean"]
    assert best["mean"] > data_free


def test_our_initialisation_leaves_the_mean_rate_where_the_papers_does_not(sessions):
    """The same few epochs: ours is above the mean rate, the authors' start is far below it."""
    ours, theirs = (
        fit(sessions[0], depth=1, epochs=10, lr=1e-3, init=init, progress=False).best["mean"]
        for init in ("mtm", "paper")
    )
    assert ours > 0 and theirs < ours - 0.05


def test_the_model_kept_is_the_best_one(sessions):
    result = fit(sessions, **{**QUICK, "epochs": 6, "validations": 6}, lr=0.02, clip=None)
    data = [_Data(s, result.config, torch.device("cpu")) for s in sessions]
    now = np.mean(list(validate(result.model, data, result.config).values()))
    assert now == pytest.approx(max(e["mean"] for e in result.history), abs=1e-6)


def test_going_on_with_a_model_adds_sessions_it_does_not_know(sessions):
    first = fit(sessions[0], **QUICK).model
    kept = first.sessions["session:sim-0"].stitch.weight.clone()
    second = fit(sessions[1], first, **QUICK).model
    assert second.session_names == ["sim-0", "sim-1"]
    assert torch.equal(second.sessions["session:sim-0"].stitch.weight, kept)


def test_single_schemes_have_no_prompt(sessions):
    model = fit(sessions[0], schemes=("temporal",), **QUICK).model
    assert model.config.prompts == () and not model.config.causal
    assert fit(sessions[0], prompt=False, **QUICK).model.config.prompts == ()
    assert len(fit(sessions[0], **QUICK).model.config.prompts) == 4


def test_paper_recipe_holds_the_authors_numbers():
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (1000, 16, 1e-4, 0.01)
    assert (paper.warmup, paper.div_factor, paper.loss) == (0.15, 10, "sum")
    assert paper.clip is None and paper.decay_all and paper.init == "paper"


def test_errors(sessions):
    with pytest.raises(SessionError, match="two sessions are named 'sim-0'"):
        fit([sessions[0], sessions[0]], **QUICK)
    with pytest.raises(SessionError, match="equally many bins, got 'sim-0' 50, 'x' 5"):
        fit([sessions[0], Session(np.ones((9, 5, 3)), ["CA1"] * 3, "x")], **QUICK)
    with pytest.raises(
        SessionError, match=r"session 'x', regions: .* schemes=\('neuron', 'causal'\)"
    ):
        fit(Session(np.ones((9, 5, 3)), name="x"), **QUICK)
    with pytest.raises(SessionError, match="no session to train on"):
        fit([], **QUICK)
    with pytest.raises(ValueError, match="unknown setting 'epoch'; known: .*epochs"):
        fit(sessions, epoch=3)
    with pytest.raises(ValueError, match="unknown recipe 'papers'; known: mtm, paper"):
        recipe("papers")
    with pytest.raises(ValueError, match="epochs must be above 0"):
        TrainConfig(epochs=0)
    with pytest.raises(
        FloatingPointError, match=r"became (nan|inf) by epoch \d+, step \d+; lower lr"
    ):
        fit(sessions[0], **{**QUICK, "epochs": 20}, lr=1e6, clip=None)


def test_without_regions_two_schemes_are_left():
    counts = np.random.default_rng(0).poisson(0.5, (30, 8, 5))
    result = fit(Session(counts, name="x"), schemes=("neuron", "causal"), **QUICK)
    assert set(result.best["validation"]) == {"neuron", "causal"}


def test_a_model_config_sets_the_sizes(sessions):
    config = MtMConfig(n_bins=50, width=32, heads=2, depth=1, mlp_width=16, stitch_width=20)
    model = fit(sessions[0], config, epochs=1, validations=1, progress=False).model
    assert isinstance(model, MtM) and model.config.width == 32
