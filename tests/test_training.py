"""Training: loss by loop, every trial once, same seed same weights, better than the mean rates."""

import copy
import functools

import numpy as np
import pytest
import torch

from mtm import (
    MtM,
    MtMConfig,
    Session,
    SessionError,
    fit,
    load,
    plots,
    save,
    simulate,
    validation,
)
from mtm.batches import SessionData, steps_of, steps_per_epoch
from mtm.masks import MTM_SCHEMES, MaskSampler
from mtm.metrics import masked_nll
from mtm.model import Batch
from mtm.recipes import RECIPES, TrainConfig, recipe
from mtm.training import accumulate, make_optimizer, model_config
from mtm.validation import validate

CPU = torch.device("cpu")
ON = {"epochs": 2, "validations": 2, "progress": False, "device": "cpu"}  # with a given model
QUICK = {"depth": 1, **ON}
NO_DROPOUT = {"dropout": 0.0, "embed_dropout": 0.0, "latent_dropout": 0.0}
NDT2 = {"tokenizer": "ndt2", "patch_size": 5}


@pytest.fixture(scope="module")
def small():
    """Three animals: 40 trials, 20 bins, and 12, 11 and 10 neurons."""
    animals = simulate(3, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)
    return [s.select(neurons=range(12 - i)) for i, s in enumerate(animals)]


@pytest.fixture(scope="module")
def start(small):
    """A model of the first animal; `fit` goes on with a copy."""
    return fit(small[0], **QUICK)


def prepared(sessions, **settings):
    return [SessionData(session, TrainConfig(**settings), CPU) for session in sessions]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ------------------------------------------------------------------------------------ loss, batches


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("name", ["inter-region", "intra-region"])
def test_training_masks_regions_by_their_size_or_equally(name, by_size):
    """Of 1, 3 and 6 neurons, and two without a region, which no scheme chooses."""
    regions = ["a", *"bbb", *"cccccc", "root", "root"]
    session = Session(np.random.default_rng(0).poisson(1.0, (20, 4, 12)), regions)
    config = TrainConfig(regions_by_size=by_size, input_dropout={})
    [data], sampler = prepared([session]), MaskSampler([name], config.ratios)
    counts, trials, chosen = data.batch(range(2)), np.arange(2), []
    for _ in range(2000):
        mask = data.training_mask(sampler, name, counts, trials, config)
        found = {*session.regions[mask.target.any(dim=(0, 1)).numpy()]}
        assert len(found) == 1
        chosen += found
    shares = [chosen.count(region) / 2000 for region in "abc"]
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.6] if by_size else [1 / 3] * 3, atol=0.04)


def test_input_dropout_hides_more_neurons_and_scores_no_more_entries():
    session = Session(np.random.default_rng(0).poisson(1.0, (40, 5, 500)), ["a", "b"] * 250)
    [data], trials = prepared([session]), np.arange(40)
    counts, masks = data.batch(trials), []
    for share in (0.0, 0.4):
        sampler = MaskSampler(["inter-region"])
        config = TrainConfig(input_dropout={"inter-region": share})
        masks.append(data.training_mask(sampler, "inter-region", counts, trials, config))
    plain, more = masks
    assert torch.equal(plain.target, more.target) and bool((more.hidden | ~plain.hidden).all())
    extra = more.hidden & ~plain.hidden  # whole neurons, other ones in each trial
    assert torch.equal(extra, extra[:, :1].expand_as(extra))
    shares = extra[:, 0].float().sum(dim=1) / 250
    assert shares.mean() == pytest.approx(0.4, abs=0.02) and len(extra[:, 0].unique(dim=0)) == 40


def test_loss_is_the_poisson_likelihood_of_the_targets_alone():
    rng = np.random.default_rng(0)
    log_rates, counts = rng.normal(size=(2, 3, 4)), rng.poisson(1.0, (2, 3, 4))
    target = rng.random((2, 3, 4)) < 0.4
    total = sum(np.exp(r) - c * r for r, c in zip(log_rates[target], counts[target], strict=True))
    tensors = [torch.from_numpy(x) for x in (log_rates, counts.astype(float), target)]
    assert masked_nll(*tensors).item() == pytest.approx(total)


@pytest.mark.parametrize("per_step", [1, 2, 4])
def test_every_training_trial_once_an_epoch_in_new_batches_of_different_sessions(small, per_step):
    few = Session(small[0].counts[:20], small[0].regions, "few", bin_size=0.1)
    config = TrainConfig(batches_per_step=per_step)
    data, order = prepared([*small, few]), np.random.default_rng(0)
    epochs = [list(steps_of(data, config, order)) for _ in range(2)]
    compositions = []
    for steps in epochs:
        assert len(steps) == steps_per_epoch(data, config)
        left = {one.name: -(-len(one.train) // 4) for one in data}
        for step in steps:
            n_sessions = len({one.name for one, _ in step})
            assert n_sessions == min(len(step), sum(n > 0 for n in left.values()))
            for one, _ in step:
                left[one.name] -= 1
        for one in data:
            trials = np.concatenate([t for step in steps for other, t in step if other is one])
            assert sorted(trials) == one.session.split().train.tolist()
        compositions.append({frozenset(t) for step in steps for one, t in step if one is data[0]})
    assert not compositions[0] & compositions[1]


def test_batches_are_the_counts_whatever_their_size():
    for high in (3, 60_000):  # one byte, two bytes
        counts = np.random.default_rng(0).integers(0, high, (20, 5, 3))
        (one,) = prepared([Session(counts, name="a")])
        assert one.counts.dtype == (torch.uint8 if high == 3 else torch.int32)
        np.testing.assert_array_equal(one.batch(np.array([7, 2])), counts[[7, 2]])


def batches_of(sessions, schemes=("neuron", "causal", "intra-region", "temporal")):
    sampler, batches = MaskSampler(schemes, seed=1), []
    for i, name in enumerate(schemes):
        session = sessions[i % len(sessions)]
        counts = torch.from_numpy(session.counts[i : i + 5 + i]).double()
        mask = sampler.draw(name, counts, torch.from_numpy(session.region_codes))
        batches.append(Batch(counts, name, mask, session.name))
    return batches


@pytest.mark.parametrize("fields", [{}, NDT2], ids=str)
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_the_batches_of_a_step_equal_single_batches(small, fields, loss):
    """Gradients of four sessions and schemes together, and by definition."""
    config = MtMConfig.from_depth(1, heads=2, width=32, **NO_DROPOUT, **fields)
    model = MtM(config, 20, {s.name: s.n_neurons for s in small}).double()
    batches = batches_of(small)
    losses = accumulate(model, batches, TrainConfig(loss=loss))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [masked_nll(model(*b), b.counts, b.mask.target) for b in batches]
    if loss == "mean":
        numbers = [b.mask.target.sum() * len(batches) for b in batches]
        parts = [part / n for part, n in zip(parts, numbers, strict=True)]
    sum(parts).backward()
    torch.testing.assert_close(losses, torch.stack(parts).detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)


def test_weight_decay_is_for_matrices_unless_the_recipe_says_all(small):
    model = MtM(MtMConfig.from_depth(1), 20, {"a": 5})
    n_linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    decayed, rest = make_optimizer(model, RECIPES["mtm"]).param_groups
    assert sum(p.numel() for p in decayed["params"]) == n_linear
    assert (decayed["weight_decay"], rest["weight_decay"]) == (1.0, 0.0)
    (everything,) = make_optimizer(model, RECIPES["paper"]).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))


def test_a_model_made_with_its_sessions_learns_their_means(small):
    sizes = MtMConfig.from_depth(1)
    known = {small[0].name: small[0].n_neurons}
    made = MtM(sizes, small[0].n_bins, known, bin_size=small[0].bin_size)
    how = {**ON, "prompt": False}
    first, second = (fit(small[0], start, **how).model for start in (made, sizes))
    means = [model.session_layers(small[0].name).mean for model in (first, second)]
    assert torch.equal(*means) and bool(means[0].all())
    still = fit(small[0], made, **how | {"lr": 1e-9}).best["validation"]
    assert max(map(abs, still.values())) < 0.1  # it starts at the mean rates


# ----------------------------------------------------------------------------------------- the loop


def test_training_never_sees_validation_or_test_trials(small):
    split, spoilt = small[0].split(), small[0].counts.copy()
    spoilt[split.test], spoilt[split.val] = 200, 100
    name, regions = small[0].name, small[0].regions  # the split belongs to the name
    made = [Session(c, regions, name, bin_size=0.1) for c in (small[0].counts, spoilt)]
    once = QUICK | {"validations": 1}  # one validation leaves nothing to select
    assert same(*(fit(session, **once).model.state_dict() for session in made))


def test_same_seed_same_weights_and_the_callers_generator_is_left_alone(small):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = fit(small, **QUICK).model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert same(one, fit(small, **QUICK, seed=np.int64(0)).model.state_dict())
    other = fit(small, **QUICK, seed=1).model.state_dict()
    assert not torch.equal(one["prompt_tokens"], other["prompt_tokens"])


def test_each_step_has_the_prompt_the_attention_and_the_ratio_of_its_scheme(small, monkeypatch):
    calls, embed = [], MtM.embed

    def watched(self, counts, scheme, mask, session):
        calls.append((self.training, scheme, mask.causal, mask.hidden.float().mean().item()))
        return embed(self, counts, scheme, mask, session)

    monkeypatch.setattr(MtM, "embed", watched)
    unequal = Session(small[0].counts, ["a"] * 10 + ["b"] * 2, bin_size=0.1)
    # Share of a region that inter-region masking hides, drawn by size or not, and of the rest.
    for session, by_size, region in ((small[0], True, 1 / 6), (unequal, False, 1 / 2),
                                     (unequal, True, 104 / 144)):  # fmt: skip
        for dropout in (0.0, 0.4):
            calls.clear()
            how = {"regions_by_size": by_size, "input_dropout": {"inter-region": dropout}}
            fit(session, **{**QUICK, "epochs": 30, "calibrate": False}, **how)
            steps = [call[1:] for call in calls if call[0]]
            assert {scheme for scheme, *_ in steps} == set(MTM_SCHEMES)
            assert all(causal == (scheme == "causal") for scheme, causal, _ in steps)
            shares = [np.mean([share for q, _, share in steps if q == s]) for s in MTM_SCHEMES]
            hidden = [0.6, 0.6, region + (1 - region) * dropout, 1 - region + 0.6 * region]
            # Regions of one size: every mask hides as much.
            assert shares == pytest.approx(hidden, abs=0.05 if session is small[0] else 0.08)


def test_the_learning_rate_rises_and_falls_in_each_phase(small, monkeypatch):
    monkeypatch.setattr("mtm.training.validate", lambda *_: {"neuron": 0.0})  # for speed
    slow = {**QUICK, "epochs": 20, "validations": 20, "batches_per_step": 1}
    result = fit(small[0], **slow)
    rates = [entry["lr"] for entry in result.history]
    peak = int(np.argmax(rates))
    assert peak == 2 and rates[peak] == pytest.approx(1e-3, rel=0.05)  # 15 % of 20 epochs
    assert rates[:3] == sorted(rates[:3]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-5
    del slow["depth"]
    tuned = fit(small[1], result, **slow, tune="session-layers-then-all")
    rates = [entry["lr"] for entry in tuned.history]  # 4 epochs of session layers, 16 of all
    assert rates[3] < 1e-5 and rates[19] < 1e-5
    assert max(rates[:4]) > 9e-4 and max(rates[4:]) > 9e-4 and rates[4] < max(rates[4:])


def test_validation_scores_the_same_entries_each_time_and_every_region(small, start, monkeypatch):
    seen, draw = set(), MaskSampler.draw

    def watched(self, name, counts, regions):
        mask = draw(self, name, counts, regions)
        seen.add((name, tuple(mask.target.any(0).any(0).tolist())))
        return mask

    model, data = start.model, prepared(small[:1])
    monkeypatch.setattr(MaskSampler, "draw", watched)
    scores = [validate(model, data, TrainConfig(batch_size=b)) for b in (4, 16)]
    assert scores[0] == scores[1]
    regions = {key for name, key in seen if name == "inter-region"}
    assert regions == {tuple(small[0].regions == r) for r in small[0].region_names}


def test_validation_scores_predictions_that_are_scaled_as_suits_each_scheme(start, small):
    model, data = copy.deepcopy(start.model), prepared(small[:1])
    mean, parts, each = data[0].null, model.parts, []
    for scale in (*validation.SCALES, 1.0):
        model.parts = lambda batch, by=scale: (mean + by * (sum(parts(batch)) - mean), 0.0)
        each.append(validate(model, data, TrainConfig(calibrate=False)))
    found = validate(model, data, TrainConfig())
    for name, value in found.items():
        assert value == pytest.approx(max(scores[name] for scores in each[:-1]), abs=1e-6)
    assert found != each[-1]
    raw = MtM(MtMConfig.published(1), 20, {small[0].name: 12}, bin_size=0.1)  # is not calibrated
    assert validate(raw, data, TrainConfig()) == validate(raw, data, TrainConfig(calibrate=False))


def test_factors_of_calibration_minimise_the_loss_where_full_newton_steps_diverge():
    rng = np.random.default_rng(0)
    y, start = rng.poisson(1, 2000), np.full(2000, -2.0)
    x = np.stack([rng.normal(-2, 0.1, 2000), rng.normal(0, 1, 2000)])
    grid = [(a, b) for a in np.linspace(0, 2, 21) for b in np.linspace(0, 2, 21)]

    def loss(f):
        away = np.square(np.array(f) - 1).sum() / validation.PRIOR**2
        return (np.exp(start + f @ x) - y * (start + f @ x)).sum() + 0.5 * away

    found = validation.fit_factors(start, x, y)
    assert loss(found) <= min(map(loss, grid)) and bool((found >= 0).all() and (found <= 2).all())


def test_predictions_are_scaled_as_the_validation_trials_say(small, tmp_path):
    result, plain = (fit(small[:2], **QUICK, calibrate=c) for c in (True, False))
    assert plain.model.calibration == {}
    assert same(result.model.state_dict(), plain.model.state_dict())
    for one in prepared(small[:2]):
        mean = one.null.double()
        for scheme in MTM_SCHEMES:
            seen = list(validation._predict_validation(plain.model, one, scheme, plain.config))

            def loss(factors, seen=seen, mean=mean):
                total = 0.5 * sum((f - 1) ** 2 for f in factors) / validation.PRIOR**2
                for y, mask, encoded, direct in seen:
                    x = mean + factors[0] * (encoded.double() - mean) + factors[1] * direct.double()
                    total += (x.exp() - y.double() * x)[mask.target].sum().item()
                return total

            # The loss is convex: what is best among its neighbours from 0 to 2 is the best.
            factors = result.model.calibration[one.name][scheme]
            near = np.array(factors) + 0.001 * np.array(list(np.ndindex(3, 3))) - 0.001
            losses = [loss(f) for f in near.clip(0, 2)]
            assert loss(factors) <= min(losses) + 1e-7
            counts, mask, encoded, direct = seen[0]
            wanted = one.null + factors[0] * (encoded - one.null) + factors[1] * direct
            for model in (result.model, load(save(result, tmp_path / f"{one.name}{scheme}"))):
                found = model.predict_log_rates(counts, scheme, mask, one.name)
                torch.testing.assert_close(found, wanted)


def test_the_model_kept_is_the_best_one(small):
    result = fit(small[0], **{**QUICK, "epochs": 6, "validations": 6}, lr=0.02, clip=None)
    now = np.mean(list(validate(result.model, prepared(small[:1]), result.config).values()))
    assert now == pytest.approx(max(e["mean"] for e in result.history), abs=1e-6)
    assert not result.model.training


# ----------------------------------------------------------------------------- models to start from


def test_the_start_model_stays_as_it_is_and_new_sessions_are_added(small, start):
    before = copy.deepcopy(start.model.state_dict())
    further = fit(small[1], start, **ON).model
    assert further.session_names == [small[0].name, small[1].name] == list(further.seen)
    assert same(before, start.model.state_dict()) and list(start.model.seen) == [small[0].name]
    own = {key for key in before if small[0].name in key}
    assert own and all(torch.equal(further.state_dict()[key], before[key]) for key in own)


@pytest.mark.parametrize("tune", ["all", "session-layers", "session-layers-then-all"])
def test_what_is_trained_in_fine_tuning(small, start, tune):
    model = start.model
    before = copy.deepcopy(model.state_dict())
    how = {**ON, "validations": 1, "tune": tune}
    result = fit(small[1], model, **how)
    after = result.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    core = {key for key in before if not key.startswith("sessions.")}
    assert moved == (set() if tune == "session-layers" else core)
    assert all(p.requires_grad for p in result.model.parameters())
    new = fit(small[1], model, **how | {"lr": 1e-12}).model.state_dict()
    own = {key for key in new if small[1].name in key and not key.endswith("mean")}
    assert not any(torch.equal(new[key], after[key]) for key in own)


@pytest.mark.parametrize(
    ("trained_with", "settings", "problem"),
    [
        (("temporal",), {"schemes": ("neuron", "causal")}, "no prompt for causal, neuron"),
        (("temporal",), {"schemes": ("causal",)}, "never trained causally"),
        (MTM_SCHEMES, {"split_seed": 1}, "split_seed=0, not 1"),
    ],
    ids=str,
)
def test_what_a_given_model_cannot_do_is_refused(small, trained_with, settings, problem):
    sizes = MtMConfig(width=8, heads=1, depth=1, mlp_width=8, stitch_width=8)
    model = fit(small[0], sizes, **ON, schemes=trained_with).model
    with pytest.raises(ValueError, match=problem):
        fit(small[0], model, **{**ON, "schemes": trained_with, **settings})
    other = Session(small[0].counts, small[0].regions, "other", bin_size=0.05)
    with pytest.raises(ValueError, match="20 bins of 0.05 s .* on 20 bins of 0.1 s"):
        fit(other, model, **ON, schemes=trained_with)


# ----------------------------------------------------------------------------------------- settings


def test_a_recipe_decides_the_model_and_holds_the_papers_numbers(small):
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (1000, 16, 1e-4, 0.01)
    assert (paper.warmup, paper.loss, paper.clip, paper.decay_all) == (0.15, "sum", None, True)
    assert (paper.ratios, paper.regions_by_size, paper.input_dropout) == ({}, False, {})
    assert model_config(paper) == MtMConfig.published() and model_config(paper).depth == 5
    assert model_config(recipe("mtm")) == MtMConfig.from_depth(2)
    model = fit(small[0], config="paper", **QUICK).model
    assert (model.init, model.config) == ("paper", MtMConfig.published(1))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"schemes": "neuron"}, "schemes must be a list of different names, got 'neuron'"),
        ({"config": "papr"}, "unknown recipe 'papr'; known: mtm, paper"),
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"ratios": {"neuron": 30}, **ON}, "mask ratio must be above 0 and at most 1"),
        ({"ratios": {"neurons": 0.3}}, "unknown masking scheme 'neurons'"),
        ({"input_dropout": {"causal": 1}}, "input_dropout must be at least 0 and below 1, got 1.0"),
        ({"regions_by_size": "no"}, "regions_by_size must be bool, got 'no'"),
        ({"warmup": 1}, "warmup must be at least 0 and below 1, got 1"),
        ({"epochs": 2.5}, "epochs must be int, got 2.5"),
        ({"clip": "1"}, "clip must be float . None, got '1'"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"ratios": 0.3}, "ratios must be a dict of schemes, got 0.3"),
        ({"tune": "maps"}, "tune must be one of all, session-layers, session-layers-then-all"),
        ({"tune": "session-layers"}, "tune='session-layers' needs a trained model"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(small, settings, problem):
    with pytest.raises(ValueError, match=problem):
        fit(small[0], **settings)


def test_sessions_that_do_not_go_together_are_refused(small):
    grid = {"bin_size": 0.1, "window": small[0].window}
    regionless = Session(small[0].counts, name="x", **grid)
    short = Session(np.ones((9, 5, 3)), ["CA1"] * 3, "short", bin_size=0.1)
    silent = Session(np.zeros((40, 10, 6), int), ["CA1"] * 3 + ["DG"] * 3, "silent")
    for sessions, problem in (
        ([], "no session to train on"),
        ([small[0], small[0]], f"two sessions are named '{small[0].name}'"),
        ([small[0], short], "the same n_bins, got 20 in .* and 5 in 'short'"),
        ([small[0], regionless], r"session 'x', regions: .* schemes=\('neuron', 'causal'\)"),
        ([silent], "no hidden entry of the validation trials has a spike"),
    ):
        with pytest.raises(SessionError, match=problem):
            fit(sessions, **QUICK)
    counts = np.random.default_rng(0).poisson(0.5, (30, 8, 5))
    with pytest.warns(UserWarning, match="training without inter-region, intra-region"):
        result = fit(Session(counts, name="x"), **QUICK)
    assert set(result.best["validation"]) == {"neuron", "causal"}


def test_a_trial_that_is_in_two_parts_of_the_split_is_refused_before_training(small):
    split = small[0].split()
    twice = small[0].counts.copy()
    twice[split.test[0]] = twice[split.train[3]]
    twice[split.val[0]] = twice[split.train[5]]
    twice[split.train[1]] = twice[split.train[0]]  # within a part: no matter
    how = {"regions": small[0].regions, "name": small[0].name, "bin_size": 0.1}
    with pytest.raises(SessionError, match=f"{how['name']}', split: 2 trials .* drop duplicate"):
        fit(Session(twice, **how), **QUICK)
    kept = np.delete(np.arange(40), [split.test[0], split.val[0]])
    assert fit(Session(twice, **how).select(kept), **QUICK)


# --------------------------------------------------------------------------------- what a run shows


def test_bf16_is_used_and_weights_stay_exact(small):
    rough, exact = (fit(small[0], **QUICK, precision=p) for p in ("bf16", "float32"))
    assert rough.model.norm.weight.dtype == torch.float32
    losses = [result.history[-1]["loss"] for result in (rough, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_compiling_does_not_start_again_for_each_session(small, monkeypatch):
    """Sessions of 12, 11 and 10 neurons, batches of 8 and 4, both kinds of attention."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_ = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda encode, mode: compile_(encode))
    how = {**QUICK, "batch_size": 8, "batches_per_step": 1}
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        result = fit(small, **how, compile="default")
    assert 0 < len(graphs) <= 8
    plain = fit(small, **how)
    assert result.best["mean"] == pytest.approx(plain.best["mean"], abs=1e-4)
    assert "encode" not in vars(result.model)  # the model left behind is a plain one


def test_tensorboard_shows_each_validation_once_though_the_run_was_cut(small, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def cut(history):
        if len(history) == 3:
            raise KeyboardInterrupt

    how = {**QUICK, "epochs": 4, "validations": 4, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(small[0], **how, on_validation=cut)
    result = fit(small[0], **how)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "losses/causal"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("validation/neuron")]
    expected = [(e["step"], e["validation"]["neuron"]) for e in result.history]
    assert found == [pytest.approx(pair, rel=1e-6) for pair in expected]


def test_a_live_drawing_follows(small, monkeypatch):
    display = pytest.importorskip("IPython.display")
    updates = []

    class Shown:
        def update(self, figure):
            updates.append([len(line.get_xdata()) for line in figure.axes[0].get_lines()])

    monkeypatch.setattr(display, "display", lambda figure, display_id: Shown())
    fit(small[0], **QUICK | {"epochs": 3, "validations": 3}, on_validation=plots.live())
    assert [max(update) for update in updates] == [2, 2, 3]  # the line at 0 has two points
    assert all(len(update) == 6 for update in updates)  # four schemes, their mean, and 0
