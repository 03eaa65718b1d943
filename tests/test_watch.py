"""What is seen of a run: lines, files, TensorBoard; and that compiling is worth it."""

import functools
import io
import json
from contextlib import redirect_stderr

import pytest
import torch

from mtm import MtMConfig, evaluate, fit, plots, simulate, training as watch
from mtm.training import flat, write_history

SHORT = {"epochs": 4, "validations": 4, "device": "cpu", "batch_size": 8, "batches_per_step": 1}


@pytest.fixture(scope="module")
def sessions():
    """Three animals of different numbers of neurons."""
    animals = simulate(3, 40, 12, seed=3, mean_rate=30.0, bin_size=0.1)
    return [s.select(neurons=range(12 - i)) for i, s in enumerate(animals)]


def test_one_line_says_what_it_runs_on_and_one_what_came_out(sessions):
    said = io.StringIO()
    with redirect_stderr(said):
        fit(sessions[0], depth=1, **SHORT)
        fit(sessions[0], depth=1, **SHORT, progress=False)
    first, last = said.getvalue().splitlines()
    assert first == f"training on cpu, threads: {torch.get_num_threads()}, float32"
    assert last.startswith("16 steps in ") and "best: epoch" in last


def test_a_log_is_not_silent_and_a_finished_run_says_so(sessions, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", 0.0)
    lines = []
    for _ in range(2):
        said = io.StringIO()
        with redirect_stderr(said):
            fit(sessions[0], depth=1, **SHORT, folder=tmp_path)
        lines.append(said.getvalue().splitlines())
    epochs = SHORT["epochs"]
    assert [line.split("  ")[0] for line in lines[0][1:-1]] == [
        f"epoch {n} of {epochs}" for n in range(1, epochs + 1)
    ]
    assert lines[1][0] == f"the run in {tmp_path} is finished already" and len(lines[1]) == 2


def test_bf16_is_said_and_used(sessions):
    said = io.StringIO()
    with redirect_stderr(said):
        result = fit(sessions[0], depth=1, **SHORT, precision="bf16")
    assert said.getvalue().splitlines()[0].endswith(", bf16")
    assert result.model.norm.weight.dtype == torch.float32
    exact = fit(sessions[0], depth=1, **SHORT, progress=False)
    assert result.history[-1]["loss"] != exact.history[-1]["loss"]
    assert result.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.01)


@pytest.mark.parametrize("fields", [{}, {"tokenizer": "ndt2", "patch_size": 5}], ids=str)
def test_compiling_does_not_start_again_for_each_session(sessions, monkeypatch, fields):
    """Sessions of 12, 11 and 10 neurons, batches of 8 and 4, both kinds of attention."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_ = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda encode, mode: compile_(encode))
    sizes = MtMConfig.from_depth(1, **fields)
    limit = "fail_on_recompile_limit_hit"  # before torch 2.7, the cache had one
    limit = limit if hasattr(torch._dynamo.config, limit) else "fail_on_cache_limit_hit"
    with torch._dynamo.config.patch({limit: True}):
        result = fit(sessions, sizes, **SHORT, progress=False, compile="default")
    n_graphs = len(graphs)
    assert 0 < n_graphs <= 8
    fit(sessions[:1], sizes, **SHORT, progress=False, compile="default")
    fit(sessions, sizes, **SHORT, progress=False, compile="default")
    assert len(graphs) <= n_graphs + 8  # a new model may be compiled anew, but no more often
    plain = fit(sessions, sizes, **SHORT, progress=False)
    assert result.best["mean"] == pytest.approx(plain.best["mean"], abs=1e-4)
    assert "encode" not in vars(result.model)  # the model left behind is a plain one
    evaluate(result, sessions[0], tasks=["forward-prediction"])


def test_tensorboard_shows_each_validation_once_though_the_run_was_cut(sessions, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def cut(history):
        if len(history) == 3:
            raise KeyboardInterrupt

    how = {"depth": 1, **SHORT, "progress": False, "folder": tmp_path, "save_every": 1e9}
    with pytest.raises(KeyboardInterrupt):
        fit(sessions[0], **how, on_validation=cut)
    result = fit(sessions[0], **how)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "mean", "lr", "validation/neuron", "losses/causal", "tokens_per_second"):
        assert name in events.Tags()["scalars"]
    found = {event.step: event.value for event in events.Scalars("validation/neuron")}
    expected = {e["step"]: e["validation"]["neuron"] for e in result.history}
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("mean")) == 4


def test_history_with_nothing_to_say_is_still_json(tmp_path):
    entry = {"validation": {"neuron": float("nan"), "causal": 0.5}, "memory_gb": None}
    write_history(tmp_path, [entry])

    def refuse(name):
        raise ValueError(name)

    line = json.loads((tmp_path / "history.jsonl").read_text(), parse_constant=refuse)
    assert line == {"validation": {"neuron": None, "causal": 0.5}, "memory_gb": None}
    assert flat(line) == {"validation/causal": 0.5}


def test_a_live_drawing_follows(sessions, monkeypatch):
    display = pytest.importorskip("IPython.display")
    updates = []

    class Shown:
        def update(self, figure):
            updates.append([len(line.get_xdata()) for line in figure.axes[0].get_lines()])

    monkeypatch.setattr(display, "display", lambda figure, display_id: Shown())
    fit(sessions[0], depth=1, **SHORT, progress=False, on_validation=plots.live())
    assert [max(update) for update in updates] == [2, 2, 3, 4]  # the line at 0 has two points
    assert all(len(update) == 6 for update in updates)  # four schemes, their mean, and 0
