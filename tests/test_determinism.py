"""The same seed gives the same numbers: twice in a process, in two processes, on more threads."""

import json
import subprocess
import sys

import numpy as np
import pytest

RUN = """
import json, sys
import numpy as np, torch
torch.set_num_threads(int(sys.argv[1]))
import mtm

np.random.seed(int(sys.argv[2]))  # states of others, which nothing here may depend on
torch.manual_seed(int(sys.argv[2]))
[session] = mtm.simulate(1, 40, 12, seed=5, bin_size=0.1)
sizes = mtm.MtMConfig(width=32, heads=2, depth=1, mlp_width=32, stitch_width=16)
fit = mtm.fit(session, sizes, epochs=2, validations=2, progress=False, device="cpu", seed=11)
report = mtm.evaluate(fit, session, tasks=[*mtm.prediction.TASKS, "choice", "wheel-speed"])
print(json.dumps({
    "counts": session.counts.sum((1, 2)).tolist() + session.counts[0].argmax(0).tolist(),
    "split": [part.tolist() for part in session.split(3)],
    "weights": [float(p.double().abs().sum()) for p in fit.model.state_dict().values()],
    "history": [(e["loss"], e["mean"]) for e in fit.history],
    "neurons": {k: s.by_neuron(session.name).tolist() for k, s in report.tasks.items()
                if k in mtm.prediction.TASKS},
    "scores": {k: s.mean() for k, s in report.tasks.items()},  # decoded behaviours too
}))
"""


def numbers(threads, state):
    """Everything from simulating to scoring, in a process of its own."""
    command = [sys.executable, "-c", RUN, str(threads), str(state)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def once():
    return numbers(threads=1, state=0)


def test_two_processes_agree_to_the_last_bit(once):
    assert numbers(threads=1, state=123) == once


def test_two_threads_agree_but_for_rounding(once):
    other = numbers(threads=2, state=0)
    assert (other["counts"], other["split"]) == (once["counts"], once["split"])
    for what in ("weights", "history"):
        np.testing.assert_allclose(other[what], once[what], rtol=1e-4)
    for task, values in once["neurons"].items():
        np.testing.assert_allclose(other["neurons"][task], values, atol=1e-3, err_msg=task)
