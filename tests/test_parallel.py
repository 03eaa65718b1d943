"""Processes that train together train what one would; one that dies ends all, and they go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mtm import MtM, MtMConfig, Session, Sessions, fit, load, distributed as parallel, simulate
from mtm.training import Batch
from mtm.masks import MaskSampler
from mtm.recipes import TrainConfig
from mtm.checkpoint import states
from mtm.training import _learning, accumulate

SETTINGS = ["--depth", "1", "--epochs", "4", "--validations", "4", "--batch-size", "8"]
SETTINGS += ["--device", "cpu", "--batches-per-step", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Session files of three animals, 28 training trials each: 12 batches, 2 steps an epoch."""
    folder = tmp_path_factory.mktemp("sessions")
    for session in simulate(3, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1):
        session.save(folder / f"{session.name}.npz")
    return folder


def command(folder, out, processes, *more):
    python = [sys.executable]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        python += [*launch, str(processes)]
    return [*python, "-m", "mtm", "train", str(folder), "--out", str(out), *SETTINGS, *more]


def start(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def train(*arguments):
    process = start(*arguments)
    said, problems = process.communicate(timeout=120)
    assert process.returncode == 0, problems
    return said


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_several_processes_train_what_one_does(folder, tmp_path):
    """Schemes with and without prompt; shares, and last steps, of different sizes."""
    more = ["--schemes", "neuron", "temporal", "--batches-per-step", "5"]
    whole, shared = tmp_path / "one", tmp_path / "several"
    train(folder, whole, 1, *more)
    said = train(folder, shared, 3, *more)
    assert said.count("best validation") == 1
    for one, other in zip(history(whole), history(shared), strict=True):
        assert one["step"] == other["step"]
        for key in ("loss", "lr", "losses", "mean", "validation"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5)
    found, expected = load(shared).state_dict(), load(whole).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_one_that_dies_ends_all_and_the_run_goes_on(folder, tmp_path):
    more = ["--epochs", "12", "--validations", "3", "--save-every", "0"]
    process = start(folder, tmp_path / "run", 2, *more)
    deadline = time.monotonic() + 60
    while len(states(tmp_path / "run")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if f"/{c}/" and b"mtm" in cmdline(c)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, problems = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in problems
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    step = int(states(tmp_path / "run")[-1].stem.removeprefix("state-"))
    assert 0 < step < 24
    train(folder, tmp_path / "run", 2, *more)
    whole = fit(
        Sessions(folder), depth=1, epochs=12, validations=3, batch_size=8, batches_per_step=6,
        device="cpu", progress=False,
    )  # fmt: skip
    found = load(tmp_path / "run").state_dict()
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def cmdline(process):
    return Path(f"/proc/{process}/cmdline").read_bytes()


def test_more_processes_than_batches_are_refused(folder, tmp_path, monkeypatch):
    session = Session.load(folder / "sim-3-0.npz")
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    with pytest.raises(ValueError, match="=1 leaves some of 2 processes without a batch"):
        fit(session, depth=1, batches_per_step=1, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("schemes", [("neuron", "causal"), ("temporal",), ("neuron", "temporal")])
@pytest.mark.parametrize("fields", [{}, {"tokenizer": "ndt2", "patch_size": 5}], ids=str)
def test_what_is_said_to_learn_in_a_step_is_what_gets_a_gradient(schemes, fields):
    """All processes must send the same parameters, and none that one process would leave alone."""
    sessions = simulate(3, 10, 12, seed=3, bin_size=0.1)
    prompts = tuple(name for name in schemes if name != "temporal")
    sizes = {s.name: s.n_neurons for s in sessions}
    model = MtM(MtMConfig.from_depth(1, **fields), 20, sizes, prompts=prompts)
    for name in schemes:
        model.zero_grad(set_to_none=True)
        sampler = MaskSampler([name])
        batches = []
        for session in sessions[:2]:
            counts = torch.from_numpy(session.counts).float()
            mask = sampler.draw(name, counts, torch.from_numpy(session.region_codes))
            batches.append(Batch(counts, name, mask, session.name))
        accumulate(model, batches, TrainConfig())
        learning = _learning(model, [(batch.session, name) for batch in batches])
        assert {id(p) for p in learning} == {
            id(p) for p in model.parameters() if p.grad is not None
        }


def test_one_process_needs_no_group(folder):
    session = simulate(1, 40, 12, seed=3, bin_size=0.1)[0]
    assert fit(session, depth=1, epochs=1, validations=1, progress=False).history
