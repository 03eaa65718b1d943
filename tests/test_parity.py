"""Numbers that the authors' code gave for small models of theirs, and ours with their weights."""

import warnings

import numpy as np
import pytest
import torch

from mtm import Mask, Session, evaluate, metrics
from mtm.checkpoint import from_settings, settings
from mtm.masks import MTM_SCHEMES
from mtm.model import Batch
from mtm.official import from_official, their_key
from mtm.recipes import TrainConfig
from mtm.training import accumulate

FILES = {"ndt1_prompt.pt": 12, "ndt1_no_prefix.pt": 6, "ndt2_no_prefix.pt": 6}


@pytest.fixture(params=FILES)
def fixture(request, parity):
    found = torch.load(parity / request.param, weights_only=True)
    assert len(found["cases"]) == FILES[request.param]
    assert tuple(found["prompt_order"]) == MTM_SCHEMES
    return found


def eid(case):
    return case["eid"] if isinstance(case["eid"], str) else case["eid"][0]


def ours(fixture):
    neurons = {eid(case): int(case["num_neuron"]) for case in fixture["cases"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not used of the checkpoint: .*decoder.0")
        model = from_official(fixture["state_dict"], neurons, heads=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # their models have none, which a state dict does not tell
    return model


def batch(case):
    n = int(case["num_neuron"])
    hidden, target = (case[key][..., :n].bool() for key in ("input_mask", "target_mask"))
    real = case["time_attn_mask"].bool()[:, :, None]  # padded bins are not scored
    mask = Mask(hidden, target & real, causal=case["mode"] == "causal")
    return Batch(case["spikes"][..., :n].float(), case["mode"], mask, eid(case))


def test_log_rates_equal_the_authors(fixture):
    """Every mode, their leaks and their padding included."""
    model = ours(fixture)
    for case in fixture["cases"]:
        log_rates = model(*batch(case))
        for path in ("train_path", "eval_path"):  # hidden by their masker, and beforehand
            torch.testing.assert_close(log_rates, case[path]["preds"], atol=1e-5, rtol=1e-5)


def test_losses_and_gradients_equal_the_authors(fixture):
    for case in fixture["cases"]:
        model = ours(fixture).train()
        loss = accumulate(model, [batch(case)], TrainConfig(loss="sum")).sum()
        theirs = case["train_path"]
        torch.testing.assert_close(loss, theirs["loss"], rtol=1e-5, atol=1e-4)
        assert int(batch(case).mask.target.sum()) == theirs["n_examples"]
        compared = set()
        for key, parameter in model.named_parameters():
            if parameter.grad is None or parameter.numel() == 0:
                continue
            name, row = their_key(key, model, fixture["eid_order"])
            expected = theirs["grads"][name] if row is None else theirs["grads"][name][row]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4, msg=name)
            compared.add(name)
        assert compared == set(theirs["grads"])


def test_nine_steps_of_training_follow_the_authors(fixture):
    """AdamW and the one-cycle schedule on their batches: losses on the way, weights at the end."""
    trajectory, model = fixture["trajectory"], ours(fixture).train()
    hyper = trajectory["hyper"]
    of_adam = {key: hyper[key] for key in ("lr", "weight_decay", "eps", "betas")}
    optimizer = torch.optim.AdamW(model.parameters(), **of_adam)
    keys = ("total_steps", "pct_start", "div_factor", "final_div_factor")
    of_schedule = {key: hyper[key] for key in keys}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=hyper["lr"], **of_schedule)
    assert len(trajectory["steps"]) == 9
    for step in trajectory["steps"]:
        assert schedule.get_last_lr()[0] == pytest.approx(step["lr"], rel=1e-6)
        loss = accumulate(model, [batch(step)], TrainConfig(loss="sum")).sum()
        assert float(loss) == pytest.approx(step["loss"], rel=1e-4)
        for layers in model.sessions.values():
            # Their session tokens are rows of one table, which AdamW moves as a whole.
            if layers.token is not None and layers.token.grad is None:
                layers.token.grad = torch.zeros_like(layers.token)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    for key, value in model.state_dict().items():
        # A key's bias cancels in the softmax: its gradient is rounding, which Adam blows up.
        name, row = their_key(key, model, fixture["eid_order"])
        if name and value.numel() and not key.endswith("key.bias"):
            expected = trajectory["final_state_dict"][name]
            expected = expected if row is None else expected[row]
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4, msg=name)


@pytest.fixture
def scored(parity):
    """The authors' evaluation, our model with their weights, and the session it was done on."""
    found = torch.load(parity / "ndt1_prompt.pt", weights_only=True)
    theirs = found["official_eval"]
    behaviour = {key: values[:, 0].numpy() for key, values in theirs["behaviour"].items()}
    spikes = theirs["spikes"].numpy()
    session = Session(spikes, theirs["regions"], theirs["eid"], behaviour=behaviour)
    return theirs, ours(found), session


def compare(table, theirs, neurons):
    """One neuron is silent: the authors score it -inf and 0, we do not."""
    expected = np.column_stack([theirs["bps"].numpy(), theirs["r2_psth_trial"].numpy()])[neurons]
    silent = np.isnan(table["bits_per_spike"])
    assert silent.sum() == 1
    columns = "bits_per_spike", "psth_r2", "trial_r2"
    for column, values in zip(columns, expected.T, strict=True):
        found = table[column][~silent]
        np.testing.assert_allclose(found, values[~silent], atol=1e-4, err_msg=column)


@pytest.mark.parametrize("task", ["co-smoothing", "inter-region", "intra-region"])
def test_scores_equal_the_authors(scored, task):
    theirs, model, session = scored
    name = {"co-smoothing": "per_neuron"}.get(task, task.replace("-", "_"))
    with pytest.raises(ValueError, match="not known which trials this model was trained on"):
        evaluate(model, session, tasks=[task], trials=np.arange(10))
    report = evaluate(model, session, tasks=[task], trials=np.arange(10), split_seed=0)
    scores = report.tasks[task]
    compare(scores.table, theirs[name], scores.neurons)


def test_forward_prediction_equals_the_authors(scored):
    """They hold out four bins of 20 here, where we take a tenth: scored by hand."""
    theirs, model, session = scored
    bins = theirs["fwd_held_out"]
    hidden = torch.zeros(session.counts.shape, dtype=torch.bool)
    hidden[:, bins] = True
    counts = torch.from_numpy(session.counts).float()
    log_rates = model.predict_log_rates(counts, "causal", Mask(hidden, hidden, True), session.name)
    predicted, observed = log_rates[:, bins].numpy(), session.counts[:, bins]
    conditions = np.stack([session.behaviour[key] for key in ("choice", "reward", "block")], axis=1)
    table = {
        "bits_per_spike": metrics.bits_per_spike(predicted, observed),
        "psth_r2": metrics.psth_r2(predicted, observed, conditions),
        "trial_r2": metrics.trial_r2(predicted, observed),
    }
    compare(table, theirs["forward_pred"], np.arange(session.n_neurons))


def test_their_causal_mode_leaks_and_ours_does_not(fixture):
    """The same weights, with their attention and with ours."""
    if not fixture["prompt_order"] or "ndt1_no_prefix" in str(fixture["kind"]):
        pytest.skip("their NDT1 without tokens in front does not leak")
    model = ours(fixture)
    case = next(case for case in fixture["cases"] if case["mode"] == "causal")
    counts, prompt, mask, session = batch(case)
    nothing = torch.zeros_like(mask.hidden)
    future = counts.clone()
    future[:, -1] += 5
    described = {**settings(model), "class": "mtm"}
    del described["n_places"]
    plain, weights = from_settings(described).eval(), model.state_dict()
    if "tokenizer.space" in weights:  # of the places that these sessions need
        weights["tokenizer.space"] = weights["tokenizer.space"][: len(plain.tokenizer.space)]
    plain.load_state_dict(weights)
    mask = Mask(nothing, nothing, True)
    for which in (model, plain):
        before, after = (which(x, prompt, mask, session)[:, :-1] for x in (counts, future))
        assert torch.equal(before, after) == (which is plain)
