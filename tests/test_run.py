"""Runs that were killed end as if they had not been; states are whole, and two are kept."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mtm import Session, fit, load, save, simulate, training as train
from mtm.checkpoint import read_config
from mtm.masks import MTM_SCHEMES
from mtm.checkpoint import StateError, read_state, states

ALONE = {"batch_size": 8, "batches_per_step": 1}
SHORT = {"epochs": 4, "validations": 3, "progress": False, "device": "cpu", **ALONE}
DEEP = {**SHORT, "depth": 2, "batches_per_step": 2}  # with dropout


@pytest.fixture(scope="module")
def sessions():
    """Two animals, 28 training trials each: 4 batches, and 4 steps an epoch for one or for two."""
    return simulate(2, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)


def weights(model):
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def killed_before(monkeypatch, step):
    take = train._take_step

    def watched(*arguments):
        if arguments[-1] == step:
            raise Killed
        return take(*arguments)

    monkeypatch.setattr(train, "_take_step", watched)


def resumed(monkeypatch, folder, step, call):
    """What ``call`` gives when the run ends before a step and is started again."""
    with monkeypatch.context() as patched:
        killed_before(patched, step)
        with pytest.raises(Killed):
            call(folder, save_every=0.0)
    return call(folder, save_every=1e9)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8, 14, 15])
def test_a_run_that_was_cut_ends_with_the_same_weights(sessions, tmp_path, monkeypatch, step):
    """Within an epoch, at its end (4 steps), before and after validations."""

    def call(folder, **how):
        return fit(sessions, **DEEP, folder=folder, **how)

    whole = call(None)
    found = resumed(monkeypatch, tmp_path, step, call)
    assert same(weights(found.model), weights(whole.model))
    for one, other in zip(found.history, whole.history, strict=True):
        for key in ("epoch", "step", "lr", "loss", "losses", "validation", "mean"):
            assert one[key] == other[key]
    assert same(weights(load(tmp_path)), weights(whole.model))


@pytest.mark.parametrize("step", [3, 4, 7, 8, 9, 14])
def test_phases_of_fine_tuning_go_on_too(sessions, tmp_path, monkeypatch, step):
    """4 steps an epoch; the maps learn in the first two of four."""
    start = fit(sessions[0], **SHORT, depth=1).model
    save(start, tmp_path / "start")

    def call(folder, **how):
        settings = {"tune": "maps-then-all", "maps_share": 0.5}
        model = load(tmp_path / "start")
        return fit(sessions[1], model, **SHORT, **settings, folder=folder, **how)

    found = resumed(monkeypatch, tmp_path / "run", step, call)
    assert same(weights(found.model), weights(call(None).model))


DRILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import mtm
from mtm.checkpoint import states

folder, kills = sys.argv[1], int(sys.argv[2])
sessions = mtm.simulate(2, 60, 12, seed=3, mean_rate=30.0, bin_size=0.1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half a second's worth
sizes = mtm.MtMConfig(width=32, heads=2, depth=2, mlp_width=32, stitch_width=16)


def run(folder, save_every):
    pid = os.fork()
    if pid == 0:
        mtm.fit(sessions, sizes, epochs=30, validations=15, progress=False, device="cpu",
                folder=folder, save_every=save_every)
        os._exit(0)
    return pid


def newest():
    found = states(Path(folder))
    return int(found[-1].stem.removeprefix("state-")) if found else -1


random.seed(0)
writing = 0
for kill in range(kills):
    before = newest()
    pid = run(folder, 0.0)
    while newest() <= before:  # until it has taken a step, and then some time more
        time.sleep(0.001)
    if kill % 2:
        time.sleep(random.uniform(0.0, 0.2))
    else:  # while it writes
        while not any(Path(folder).glob(".state-*.part")):
            pass
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it had ended already"
    writing += any(Path(folder).glob(".*.part"))
assert writing and newest() > 12, (writing, newest())  # past a validation, every 12 steps
for where in (folder, folder + "-whole"):
    assert os.waitpid(run(where, 1e9), 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """Also while a state is written: one is written before each step."""
    kills = 10
    command = [sys.executable, "-c", DRILL, str(tmp_path / "run"), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    killed, whole = (load(tmp_path / name) for name in ("run", "run-whole"))
    assert same(weights(killed), weights(whole))
    histories = [read_config(tmp_path / name)["info"]["history"] for name in ("run", "run-whole")]
    assert len(histories[0]) == 15
    for one, other in zip(*histories, strict=True):
        assert (one["mean"], one["loss"], one["lr"]) == (other["mean"], other["loss"], other["lr"])
    assert len(states(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_a_finished_run_is_not_run_again(sessions, tmp_path, monkeypatch):
    first = fit(sessions[0], **SHORT, depth=1, folder=tmp_path)
    killed_before(monkeypatch, 0)
    again = fit(sessions[0], **SHORT, depth=1, folder=tmp_path)
    assert same(weights(first.model), weights(again.model))
    assert first.history == again.history


def test_the_last_two_states_are_kept_and_a_damaged_one_is_passed_over(
    sessions, tmp_path, monkeypatch
):
    def call(folder, **how):
        return fit(sessions[0], **SHORT, depth=1, folder=folder, **how)

    whole = call(None)
    with monkeypatch.context() as patched:
        killed_before(patched, 12)
        with pytest.raises(Killed):
            call(tmp_path, save_every=0.0)
    assert [path.name for path in states(tmp_path)] == [
        "state-00000011.safetensors", "state-00000012.safetensors"
    ]  # fmt: skip
    last = states(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.warns(UserWarning, match="state-00000012.safetensors is damaged .* before it"):
        found = call(tmp_path)
    assert same(weights(found.model), weights(whole.model))
    state = states(tmp_path)[-1]
    good = state.read_bytes()
    for place in (200, len(good) // 2, len(good) - 1):  # of JSON and of numbers
        state.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.warns(UserWarning, match=f"{state.name} is damaged .* before it"):
            assert read_state(tmp_path).facts["step"] < int(state.stem[-8:])
    for path in states(tmp_path):
        path.write_bytes(b"nothing")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(StateError, match="none of the 2 states in .* restart=True"),
    ):
        call(tmp_path)
    assert same(weights(call(tmp_path, restart=True).model), weights(whole.model))


def test_a_folder_of_another_run_is_refused(sessions, tmp_path):
    fit(sessions[0], **SHORT, depth=1, folder=tmp_path)
    before = contents(tmp_path)
    for session, settings, problem in (
        (sessions[0], {"lr": 0.1}, "lr is 0.001 there, and 0.1 now"),
        (sessions[0], {"depth": 2}, "width is 128 there, and 192 now"),
        (sessions[1], {}, "sim-3-0 is .* there, and None now"),
        (changed_counts(sessions[0]), {}, "sim-3-0 is .* there, and .* now"),
    ):
        with pytest.raises(StateError, match=f"another run: {problem}.* restart=True"):
            fit(session, **{**SHORT, "depth": 1, **settings}, folder=tmp_path)
    assert contents(tmp_path) == before
    fit(sessions, **SHORT, depth=1, folder=tmp_path / "both")
    with pytest.raises(StateError, match="another run: .*order of sessions"):
        fit(sessions[::-1], **SHORT, depth=1, folder=tmp_path / "both")
    one, other = (fit(s, **SHORT, depth=1).model for s in sessions[:2])
    fit(sessions[0], copy.deepcopy(one), **SHORT, folder=tmp_path / "start")
    with pytest.raises(StateError, match="another run: .*known sessions"):
        fit(sessions[0], other, **SHORT, folder=tmp_path / "start")  # that knows another session
    save(fit(sessions[0], **SHORT, depth=1), tmp_path / "model")
    with pytest.raises(StateError, match="holds a model, but no run to go on with"):
        fit(sessions[0], **SHORT, depth=1, folder=tmp_path / "model")
    fit(sessions[1], **SHORT, depth=1, folder=tmp_path, restart=True)
    assert load(tmp_path).session_names == ["sim-3-1"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_counts(session):
    return Session(
        session.counts + 1, session.regions, session.name,
        bin_size=session.bin_size, window=session.window,
    )  # fmt: skip


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(
    sessions, tmp_path, monkeypatch, clip
):
    accumulate = train.accumulate

    def poisoned(model, batches, config, n_batches=None):
        losses = accumulate(model, batches, config, n_batches)
        if run_step[0] == 18:
            losses[0] = float("nan")
            model.norm.weight.grad.fill_(float("nan"))
        run_step[0] += 1
        return losses

    run_step = [0]
    monkeypatch.setattr(train, "accumulate", poisoned)
    with pytest.raises(FloatingPointError) as error:
        fit(sessions, **SHORT, depth=1, folder=tmp_path, save_every=0.0, clip=clip)
    said = r"the loss became nan in step 19, session 'sim-3-[01]', scheme '(.*)'; lower lr .* best "
    found = re.match(said + r"weights so far, of epoch 2, are kept in", str(error.value))
    assert found and found[1] in MTM_SCHEMES
    assert [path.name for path in states(tmp_path)] == [
        "state-00000017.safetensors", "state-00000018.safetensors"
    ]  # fmt: skip
    monkeypatch.setattr(train, "accumulate", accumulate)
    found = fit(sessions, **SHORT, depth=1, folder=tmp_path, clip=clip)
    assert same(weights(found.model), weights(fit(sessions, **SHORT, depth=1, clip=clip).model))


def test_weights_that_are_not_finite_are_never_saved(sessions, tmp_path, monkeypatch):
    """A finite loss may have a gradient that is not."""
    accumulate = train.accumulate

    def poisoned(model, *arguments):
        losses = accumulate(model, *arguments)
        model.norm.weight.grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(train, "accumulate", poisoned)
    with pytest.raises(FloatingPointError, match="weights became infinite or NaN in step 1, "):
        fit(sessions[0], **SHORT, depth=1, folder=tmp_path, save_every=0.0)
    assert [path.name for path in states(tmp_path)] == ["state-00000000.safetensors"]


def test_an_error_before_any_validation_names_nothing_that_is_kept(sessions):
    good = fit(sessions[0], **{**SHORT, "validations": 4}, depth=1).model
    before = {key: value.clone() for key, value in weights(good).items()}
    with pytest.raises(FloatingPointError, match="lower lr .now 1e.30. or set clip$"):
        fit(sessions[0], good, **SHORT, lr=1e30, clip=None)
    assert same(before, weights(good))  # a copy has diverged


def test_patience(sessions, tmp_path):
    settings = {**SHORT, "epochs": 40, "validations": 40, "depth": 1, "lr": 0.05, "patience": 3}
    result = fit(sessions[0], **settings, folder=tmp_path)
    means = [entry["mean"] for entry in result.history]
    assert len(means) == int(np.argmax(means)) + 1 + 3 < 40
    again = fit(sessions[0], **settings, folder=tmp_path)
    assert again.history == result.history


def test_history_is_written_as_it_grows(sessions, tmp_path):
    seen = []

    def listen(history):
        lines = (tmp_path / "history.jsonl").read_text().splitlines()
        seen.append((len(lines), len(history)))

    result = fit(sessions, **SHORT, depth=1, folder=tmp_path, on_validation=listen)
    assert seen == [(1, 1), (2, 2), (3, 3)]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    for entry in lines:
        assert set(entry["losses"]) <= set(MTM_SCHEMES) and set(entry["validation"]) == set(
            MTM_SCHEMES
        )
        assert entry["trials_per_second"] * 20 == pytest.approx(entry["tokens_per_second"])
        assert 0 < entry["memory_gb"] < 100


def test_a_full_disk_stops_training_and_leaves_the_states(sessions, tmp_path, monkeypatch):
    write, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 3:
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left .*free some space .*state-00000002"):
        fit(sessions[0], **SHORT, depth=1, folder=tmp_path, save_every=0.0)
    assert len(states(tmp_path)) == 2 and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(Path, "write_bytes", write)
    found = fit(sessions[0], **SHORT, depth=1, folder=tmp_path)
    assert same(weights(found.model), weights(fit(sessions[0], **SHORT, depth=1).model))
