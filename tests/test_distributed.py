"""Processes that train together train what one would, and resume what one had begun."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mtm import MtMConfig, Sessions, fit, load, simulate

SETTINGS = {"epochs": 4, "validations": 4, "batch_size": 8, "batches_per_step": 5}
SETTINGS |= {"schemes": ("neuron", "temporal"), "device": "cpu", "progress": False}
COMMAND = """
import sys
import torch
import mtm
from mtm.distributed import process_group

with process_group(torch.device("cpu")) as device:
    # Without dropout, which each process draws by itself.
    model = mtm.MtMConfig.from_depth(1, dropout=0.0, embed_dropout=0.0, latent_dropout=0.0)
    mtm.fit(mtm.Sessions(sys.argv[1]), model, folder=sys.argv[2], save_every=1e9, **{settings})
"""


def test_several_processes_train_what_one_does_and_resume_what_it_began(tmp_path):
    """Schemes with and without a prompt; shares, and last steps, of different sizes."""
    folder = tmp_path / "sessions"  # 28 training trials each: 12 batches, 3 steps an epoch
    for session in simulate(3, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1):
        session.save(folder / f"{session.name}.npz")

    def stop(history):
        raise KeyboardInterrupt

    model = MtMConfig.from_depth(1, dropout=0.0, embed_dropout=0.0, latent_dropout=0.0)
    sessions, how = Sessions(folder), {"model": model, **SETTINGS}
    whole = fit(sessions, **how, folder=tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        fit(sessions, **how, folder=tmp_path / "two", on_validation=stop)
    script = tmp_path / "train.py"
    script.write_text(COMMAND.format(settings=repr(SETTINGS)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", str(script), str(folder), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "two" / "history.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for one, other in zip(whole.history, map(json.loads, lines), strict=True):
        assert one["step"] == other["step"]
        for key in ("loss", "lr", "losses", "mean", "validation"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5)
    found = load(tmp_path / "two").state_dict()
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
