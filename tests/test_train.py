"""Training: the loss by loop, every trial once, the same twice, and better than the mean rate."""

import numpy as np
import pytest
import torch

from mtm import MtM, MtMConfig, SessionError, checkpoint as hub, decode, evaluate, fit, save
from mtm.training import Batch, SessionData, steps_of
from mtm.masks import MTM_SCHEMES, Mask, MaskSampler
from mtm.recipes import RECIPES, TrainConfig, recipe
from mtm.session import Session
from mtm.training import (
    _parameter_groups,
    _passes,
    accumulate,
    masked_loss,
    validate,
)

QUICK = {"depth": 1, "epochs": 2, "validations": 2, "progress": False, "device": "cpu"}
ON = {key: value for key, value in QUICK.items() if key != "depth"}  # going on with a model


def test_loss_is_the_poisson_likelihood_of_the_targets_alone():
    rng = np.random.default_rng(0)
    log_rates, counts = rng.normal(size=(2, 3, 4)), rng.poisson(1.0, (2, 3, 4))
    target = rng.random((2, 3, 4)) < 0.4
    total = sum(np.exp(r) - c * r for r, c in zip(log_rates[target], counts[target], strict=True))
    tensors = [torch.from_numpy(x) for x in (log_rates, counts.astype(float), target)]
    assert masked_loss(*tensors, "sum").item() == pytest.approx(total)
    assert masked_loss(*tensors, "mean").item() == pytest.approx(total / target.sum())


def test_every_training_trial_once_an_epoch_in_new_company(sessions):
    data = [SessionData(s, TrainConfig(), torch.device("cpu")) for s in sessions]
    order = np.random.default_rng(0)
    epochs = []
    for per_step in (1, 4):
        steps = list(steps_of(data, TrainConfig(batches_per_step=per_step), order))
        assert {len(step) for step in steps[:-1]} == {per_step}
        epochs.append([batch for step in steps for batch in step])
    for epoch in epochs:
        for session in data:
            seen = np.concatenate([trials for s, trials in epoch if s is session])
            by_name = next(s for s in sessions if s.name == session.name)
            assert sorted(seen) == by_name.split().train.tolist()
    together = [{frozenset(trials) for s, trials in epoch if s is data[0]} for epoch in epochs]
    assert not together[0] & together[1]


def test_a_step_mixes_sessions_as_long_as_there_are_several(sessions):
    data = [SessionData(s, TrainConfig(), torch.device("cpu")) for s in sessions]
    few = sessions[0].select(trials=np.arange(40))
    data.append(SessionData(few, TrainConfig(), torch.device("cpu")))
    data[-1].name = "small"
    order, config = np.random.default_rng(0), TrainConfig(batch_size=4, batches_per_step=2)
    steps = [[session.name for session, _ in step] for step in steps_of(data, config, order)]
    left = {s.name: -(-len(s.train) // 4) for s in data}
    for step in steps:
        several = sum(n > 0 for n in left.values()) > 1
        assert len(set(step)) == 2 or not several
        for name in step:
            left[name] -= 1
    assert set(left.values()) == {0} and all(len(step) == 2 for step in steps[:-1])


@pytest.mark.parametrize(("device", "n_pieces"), [("meta", [1, 1, 1, 1]), ("cpu", [1, 1, 1, 1])])
def test_whole_batches_pass_at_once_where_they_fit(sessions, device, n_pieces):
    """All in one pass; on a CPU as many as have 5,000 tokens."""
    batches = batches_of(sessions)
    model = MtM(MtMConfig.from_depth(1), 50, {s.name: s.n_neurons for s in sessions})
    passes = list(_passes(model.to(device), batches, TrainConfig(), 4))
    assert [len(piece.counts) for _, piece, _ in passes[0]] == [5, 6, 7, 8]
    assert len(passes) == 1
    long = [batch._replace(counts=batch.counts.repeat(40, 1, 1)) for batch in batches]
    long = [b._replace(mask=Mask(*(x.repeat(40, 1, 1) for x in (b.mask.hidden, b.mask.target))))
            for b in long]  # fmt: skip
    passes = _passes(model, long, TrainConfig(), 4)
    sizes = [sum(len(piece.counts) for _, piece, _ in together) for together in passes]
    assert sum(sizes) == 40 * 26
    assert (max(sizes) <= 100) if device == "cpu" else sizes == [40 * 26]


def test_training_never_sees_validation_or_test_trials(sessions):
    clean = sessions[0]
    split = clean.split()
    counts = clean.counts.copy()
    counts[split.test] = 200
    counts[split.val] = 100
    fields = {"name": clean.name, "bin_size": clean.bin_size, "window": clean.window}
    spoilt = Session(counts, clean.regions, **fields)
    clean = Session(clean.counts, clean.regions, **fields)
    once = QUICK | {"validations": 1}  # one validation leaves nothing to select
    one, two = (fit(s, **once).model.state_dict() for s in (clean, spoilt))
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
    assert not torch.equal(one["prompt_tokens"], other["prompt_tokens"])


def test_each_step_shows_the_prompt_of_its_scheme_and_trains(sessions, monkeypatch):
    calls, embed = [], MtM.embed

    def watched(self, counts, prompt, mask, session):
        calls.append((self.training, prompt, mask.causal, mask.hidden.float().mean().item()))
        return embed(self, counts, prompt, mask, session)

    monkeypatch.setattr(MtM, "embed", watched)
    fit(sessions, **{**QUICK, "epochs": 6})
    steps = [call[1:] for call in calls if call[0]]
    assert {prompt for prompt, *_ in steps} == set(MTM_SCHEMES)
    assert all(causal == (prompt == "causal") for prompt, causal, _ in steps)
    shares = {p: np.mean([s for q, _, s in steps if q == p]) for p in MTM_SCHEMES}
    assert shares["neuron"] == pytest.approx(0.6, abs=0.05)
    assert shares["causal"] == pytest.approx(0.6, abs=0.05)
    assert shares["inter-region"] == pytest.approx(1 / 6, abs=0.01)
    assert shares["intra-region"] == pytest.approx(5 / 6 + 0.6 / 6, abs=0.03)
    assert len(calls) > len(steps) > 0  # and validation runs without dropout


def test_the_learning_rate_rises_and_falls(sessions):
    history = fit(sessions[0], **{**QUICK, "epochs": 20, "validations": 20}).history
    rates = [entry["lr"] for entry in history]
    peak = int(np.argmax(rates))
    assert peak == 2 and rates[peak] == pytest.approx(1e-3, rel=0.05)  # 15 % of 20 epochs
    assert rates[:3] == sorted(rates[:3]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-6


def test_weight_decay_is_for_matrices_unless_the_recipe_says_all(sessions):
    model = fit(sessions[0], **QUICK).model
    n_linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    decayed, rest = _parameter_groups(model, RECIPES["mtm"])
    assert sum(p.numel() for p in decayed["params"]) == n_linear
    assert (decayed["weight_decay"], rest["weight_decay"]) == (1.0, 0.0)
    (everything,) = _parameter_groups(model, RECIPES["paper"])
    assert len(everything["params"]) == len(list(model.parameters()))


def test_validation_scores_every_region_whatever_the_batch_size(sessions, monkeypatch):
    seen, draw = set(), MaskSampler.draw

    def watched(self, name, counts, regions):
        mask = draw(self, name, counts, regions)
        seen.add((name, tuple(mask.target.any(0).any(0).tolist())))
        return mask

    model = fit(sessions[0], **QUICK).model
    data = [SessionData(sessions[0], TrainConfig(), torch.device("cpu"))]
    monkeypatch.setattr(MaskSampler, "draw", watched)
    scores = [validate(model, data, TrainConfig(batch_size=b)) for b in (4, 16)]
    assert scores[0] == scores[1]
    regions = {key for name, key in seen if name == "inter-region"}
    assert regions == {tuple(sessions[0].regions == r) for r in sessions[0].region_names}


def test_silent_validation_trials_are_no_score():
    counts = np.zeros((40, 10, 6), int)
    session = Session(counts, ["CA1"] * 3 + ["DG"] * 3, "silent")
    with pytest.raises(SessionError, match="no hidden entry of the validation trials has a spike"):
        fit(session, **QUICK)


def test_going_on_with_other_settings_is_refused_where_the_model_cannot(sessions):
    temporal = fit(sessions[0], schemes=("temporal",), **QUICK).model
    with pytest.raises(ValueError, match="no prompt for causal, neuron"):
        fit(sessions[0], temporal, schemes=("neuron", "causal"), **ON)
    with pytest.raises(ValueError, match="never trained causally"):
        fit(sessions[0], temporal, schemes=("causal",), **ON)
    with pytest.raises(ValueError, match="split of seed 0, not 1"):
        fit(sessions[0], temporal, schemes=("temporal",), split_seed=1, **ON)


def test_settings_that_contradict_the_model_are_refused(sessions):
    model = fit(sessions[0], **QUICK).model
    with pytest.raises(ValueError, match="depth is of a new model"):
        fit(sessions[0], model, **QUICK)
    with pytest.raises(TypeError, match="a folder is read by mtm.load"):
        fit(sessions[0], "folder", **ON)


def test_maps_of_ndt2_are_next_to_nothing(sessions):
    sizes = MtMConfig.from_depth(1, tokenizer="ndt2", patch_size=16)
    model = fit(sessions[0], sizes, **ON).model
    with pytest.warns(UserWarning, match="tune='maps' with ndt2 trains next to nothing"):
        fit(sessions[1], model, **ON, tune="maps")


def test_a_fit_stands_for_its_model(sessions, tmp_path):
    result = fit(sessions[0], **QUICK)
    assert "2 epochs" in repr(result) and len(repr(result)) < 200
    task = ["forward-prediction"]
    assert str(evaluate(result, sessions[0], tasks=task)) == str(
        evaluate(result.model, sessions[0], tasks=task)
    )
    folder = save(result, tmp_path / "model")
    assert hub.read_config(folder)["info"]["train"]["epochs"] == 2


def test_the_model_that_is_gone_on_with_stays_as_it_is(sessions):
    start = fit(sessions[0], **QUICK)
    before = {key: value.clone() for key, value in start.model.state_dict().items()}
    seen = dict(start.model.seen)
    further = fit(sessions[1], start, **ON).model
    assert len(further.session_names) == 2 and set(further.seen) > set(seen)
    after = start.model.state_dict()
    assert before.keys() == after.keys() and start.model.seen.keys() == seen.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bins_of_another_width_are_refused(sessions):
    result = fit(sessions[0], **QUICK)
    counts, choice = sessions[0].counts, sessions[0].behaviour["choice"]
    uses = [("sim-3-0", evaluate), ("sim-3-0", decode), ("new", lambda m, s: fit(s, m, **ON))]
    for name, use in uses:
        behaviour = {"choice": choice}
        other = Session(counts, sessions[0].regions, name, bin_size=0.02, behaviour=behaviour)
        for model in (result, result.model):
            with pytest.raises(SessionError, match="bins of 0.02 s, the model was trained on"):
                use(model, other)


def test_wrong_kinds_of_arguments(sessions):
    with pytest.raises(TypeError, match="fit needs Sessions, got ndarray"):
        fit([sessions[0].counts])
    with pytest.raises(TypeError, match="needs a Session, got ndarray"):
        evaluate(fit(sessions[0], **QUICK).model, sessions[0].counts)


def test_a_schedule_of_any_length(sessions):
    for warmup in (0.5, 0.25, 0.15):
        fit(sessions[0], **{**QUICK, "epochs": 1, "validations": 1}, warmup=warmup, batch_size=21)


def test_validation_masks_are_fixed(sessions):
    data = [SessionData(s, TrainConfig(), torch.device("cpu")) for s in sessions]
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
    data = [SessionData(s, result.config, torch.device("cpu")) for s in sessions]
    now = np.mean(list(validate(result.model, data, result.config).values()))
    assert now == pytest.approx(max(e["mean"] for e in result.history), abs=1e-6)


def test_going_on_with_a_model_adds_sessions_it_does_not_know(sessions):
    first = fit(sessions[0], **QUICK).model
    kept = first.sessions["session:sim-3-0"].stitcher.weight.clone()
    second = fit(sessions[1], first, **ON).model
    assert second.session_names == ["sim-3-0", "sim-3-1"]
    assert torch.equal(second.sessions["session:sim-3-0"].stitcher.weight, kept)


def test_single_schemes_have_no_prompt(sessions):
    model = fit(sessions[0], schemes=("temporal",), **QUICK).model
    assert model.prompts == () and not model.causal
    assert fit(sessions[0], prompt=False, **QUICK).model.prompts == ()
    assert len(fit(sessions[0], **QUICK).model.prompts) == 4


def test_paper_recipe_holds_the_authors_numbers():
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (1000, 16, 1e-4, 0.01)
    assert (paper.warmup, paper.div_factor, paper.loss) == (0.15, 10, "sum")
    assert paper.clip is None and paper.decay_all and paper.init == "paper"


def test_errors(sessions):
    with pytest.raises(SessionError, match="two sessions are named 'sim-3-0'"):
        fit([sessions[0], sessions[0]], **QUICK)
    with pytest.raises(SessionError, match="the same n_bins, got 'sim-3-0' 50, 'x' 5"):
        fit([sessions[0], Session(np.ones((9, 5, 3)), ["CA1"] * 3, "x")], **QUICK)
    with pytest.raises(
        SessionError, match=r"session 'x', regions: .* schemes=\('neuron', 'causal'\)"
    ):
        fit(Session(np.ones((9, 5, 3)), name="x"), **QUICK)
    with pytest.raises(SessionError, match="same bin_size .s., got 'sim-3-0' 0.04, 'x' 0.02"):
        fit([sessions[0], Session(np.ones((9, 50, 3)), ["CA1"] * 3, "x")], **QUICK)
    with pytest.raises(ValueError, match="schemes must be a list of names, got 'neuron'"):
        TrainConfig(schemes="neuron")
    with pytest.raises(ValueError, match="save_every must be 0 or more seconds, got nan"):
        fit(sessions, **QUICK, save_every=float("nan"))
    with pytest.raises(SessionError, match="no session to train on"):
        fit([], **QUICK)
    assert fit(sessions[0], config="paper", **{**QUICK, "epochs": 1}).config.init == "paper"
    with pytest.raises(ValueError, match="unknown recipe 'papr'; known: mtm, paper"):
        fit(sessions, config="papr")
    with pytest.raises(ValueError, match="pass the recipe as config='paper'"):
        fit(sessions, recipe="paper")
    with pytest.raises(ValueError, match="unknown setting 'name'; "):
        fit(sessions, name="x")
    with pytest.raises(ValueError, match="unknown setting 'epoch'; did you mean 'epochs'"):
        fit(sessions, epoch=3)
    with pytest.raises(ValueError, match="unknown recipe 'papers'; known: mtm, paper"):
        recipe("papers")
    with pytest.raises(ValueError, match="epochs must be above 0"):
        TrainConfig(epochs=0)


def test_without_regions_two_schemes_are_left():
    counts = np.random.default_rng(0).poisson(0.5, (30, 8, 5))
    result = fit(Session(counts, name="x"), schemes=("neuron", "causal"), **QUICK)
    assert set(result.best["validation"]) == {"neuron", "causal"}


def batches_of(sessions, schemes=("neuron", "causal", "intra-region", "temporal")):
    sampler, batches = MaskSampler(schemes, seed=1), []
    for i, name in enumerate(schemes):
        session = sessions[i % len(sessions)]
        counts = torch.from_numpy(session.counts[i : i + 5 + i]).double()
        mask = sampler.draw(name, counts, torch.from_numpy(session.region_codes))
        batches.append(Batch(counts, name, mask, session.name))
    return batches


NDT2 = {"tokenizer": "ndt2", "patch_size": 16}


@pytest.mark.parametrize("fields", [{}, NDT2], ids=str)
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_sessions_in_one_step_equal_steps_of_one_accumulated(sessions, fields, loss):
    """Each with a mask of its own; and pieces of a batch add up to the batch."""
    config = MtMConfig.from_depth(1, heads=2, width=32, **fields)  # without dropout
    torch.manual_seed(0)
    model = MtM(config, 50, {s.name: s.n_neurons for s in sessions}).double()
    batches = batches_of(sessions)

    def gradients(*steps, **settings):
        model.zero_grad()
        settings = TrainConfig(loss=loss, **settings)
        losses = [accumulate(model, step, settings).sum() for step in steps]
        share = len(batches) / len(steps[0]) if loss == "mean" else 1
        return sum(losses) / share, [p.grad / share for p in model.parameters()]

    value, expected = gradients(*[[batch] for batch in batches])
    for settings in ({}, {"micro_batch": 3}, {"micro_batch": 100}):
        together, found = gradients(batches, **settings)
        torch.testing.assert_close(together.double(), value.double(), rtol=1e-5, atol=1e-5)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_step_of_one_session_is_the_masked_loss(sessions):
    model = MtM(MtMConfig.from_depth(1), 50, {s.name: s.n_neurons for s in sessions})
    for batch in batches_of(sessions):
        batch = batch._replace(counts=batch.counts.float())
        expected = masked_loss(model(*batch), batch.counts, batch.mask.target, "mean")
        found = accumulate(model, [batch], TrainConfig())
        torch.testing.assert_close(found, expected.detach()[None])


def test_many_sessions_a_step_and_small_pieces_train(sessions):
    for settings in ({"batches_per_step": 2}, {"micro_batch": 3}):
        result = fit(sessions, **{**QUICK, "epochs": 5}, **settings)
        assert result.best["mean"] > 0
    n_batches = sum(-(-len(s.split().train) // 4) for s in sessions)
    assert fit(sessions, **QUICK, batches_per_step=4).history[-1]["step"] == 2 * -(-n_batches // 4)


def test_what_learns_when_fine_tuning(sessions):
    """The maps of the new session alone, then everything; the paper tunes everything at once."""
    moved = {}
    for tune in ("all", "maps", "maps-then-all"):
        model = fit(sessions[0], **QUICK).model
        before = {key: value.clone() for key, value in model.state_dict().items()}
        result = fit(sessions[1], model, **{**ON, "epochs": 4}, tune=tune, maps_share=0.5)
        after = result.model.state_dict()
        moved[tune] = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(p.requires_grad for p in model.parameters())
        assert not any("sim-3-0" in key for key in moved[tune])
        assert result.history[-1]["mean"] != result.history[0]["mean"]  # the new maps learned
    assert moved["maps"] == set()
    core = {key for key in before if not key.startswith("sessions.")}
    assert moved["all"] == moved["maps-then-all"] == core
    for share in (0, 1, -1, 5):
        with pytest.raises(ValueError, match="maps_share must be between 0 and 1"):
            TrainConfig(maps_share=share)
    with pytest.raises(ValueError, match="tune='maps' needs a trained model to start from"):
        fit(sessions[0], **QUICK, tune="maps")
    with pytest.raises(ValueError, match="tune must be one of all, maps, maps-then-all"):
        TrainConfig(tune="core")
    with pytest.raises(ValueError, match="micro_batch must be at least 1 or None, got 0"):
        TrainConfig(micro_batch=0)


def test_each_phase_of_fine_tuning_warms_up(sessions):
    model = fit(sessions[0], **QUICK).model
    slow = {**ON, "epochs": 20, "validations": 20}
    history = fit(sessions[1], model, **slow, tune="maps-then-all", maps_share=0.5).history
    rates = [entry["lr"] for entry in history]
    assert rates[9] < 1e-6 and rates[19] < 1e-6
    assert max(rates[:10]) > 9e-4 and max(rates[10:]) > 9e-4
    assert rates[10] < max(rates[10:])


def test_what_the_caller_froze_stays_frozen(sessions):
    model = fit(sessions[0], **QUICK).model
    model.layers.requires_grad_(False)
    before = {key: value.clone() for key, value in model.layers.state_dict().items()}
    for settings in ({}, {"tune": "maps-then-all"}, {"lr": 1e6, "clip": None, "epochs": 6}):
        try:
            fit(sessions[1], model, **(ON | settings))
        except FloatingPointError:
            assert "lr" in settings
        after = model.layers.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        learns = {key for key, p in model.named_parameters() if p.requires_grad}
        assert {key for key, _ in model.named_parameters() if "layers." not in key} == learns
        assert not model.training


def test_a_new_session_can_start_with_the_mean_token(sessions):
    model = fit(sessions[0], **QUICK).model
    known = model.session_layers("sim-3-0").token.detach().clone()
    result = fit(sessions[1], model, **ON, token="mean", lr=1e-12)
    torch.testing.assert_close(result.model.session_layers("sim-3-1").token.detach(), known)


@pytest.mark.parametrize(
    "fields",
    [NDT2, {"positions": "learned"}, {"input_counts": "raw"}],
    ids=str,
)
def test_every_variant_learns_more_than_the_mean_rate(sessions, fields):
    config = MtMConfig.from_depth(1, **fields)
    result = fit(sessions[0], config, epochs=15, validations=3, progress=False)
    assert result.best["mean"] > 0.01
    scores = evaluate(result, sessions[0], tasks=["inter-region"]).tasks["inter-region"]
    assert scores.mean("bits_per_spike_train_null") > 0


def test_the_random_token_scheme_hides_the_models_patches(sessions, monkeypatch):
    seen, draw = [], MaskSampler.draw

    def watched(self, *arguments):
        seen.append(draw(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(MaskSampler, "draw", watched)
    config = MtMConfig.from_depth(1, tokenizer="ndt2", patch_size=12)
    fit(sessions[0], config, epochs=1, validations=1, schemes=("random-token",), progress=False)
    for mask in seen:
        patches = mask.hidden.unflatten(2, (3, 12))
        assert bool((patches.all(dim=3) == patches.any(dim=3)).all()) and bool(patches.any())


def test_a_model_config_sets_the_sizes(sessions):
    config = MtMConfig(width=32, heads=2, depth=1, mlp_width=16, stitch_width=20)
    model = fit(sessions[0], config, epochs=1, validations=1, progress=False).model
    assert isinstance(model, MtM) and model.config.width == 32
