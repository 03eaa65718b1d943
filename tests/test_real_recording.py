"""Every step of the chapter on a real recording, against local stand-ins: a bucket and a Hub."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bwb_model import Theirs

import mtm
from mtm import bwb
from mtm.bwb import files
from mtm.data import dandi

pytest.importorskip("h5py")
PAGE = Path(__file__).parents[1] / "book/26_real_recording.md"
KEY = "brainsets/selected_units/ibl_brain_wide_bench_2026/eval/{}.h5"
EID = "0802ced5-33a3-405e-8336-b65ebc5cb07c"


@pytest.fixture
def bucket(serve, tmp_path, monkeypatch):
    """A bucket with one small session."""
    (animal,) = mtm.simulate(1, 100, 14, window=(-1.0, 2.5), seed=3, mean_rate=20.0)
    body = bwb.write_session(animal, tmp_path / "session.h5").read_bytes()
    key = KEY.format(EID)

    class Bucket(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            sent = body
            if url.path == "/":
                listed = key if key.startswith(parse_qs(url.query)["prefix"][0]) else "none"
                item = f"<Key>{listed}</Key><ETag>v1</ETag><Size>{len(body)}</Size>"
                sent = f"<List><Contents>{item}</Contents></List>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("ETag", '"v1"')
            self.end_headers()
            self.wfile.write(sent)

    monkeypatch.setattr(files, "BUCKET", serve(Bucket))


@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs_with_a_network(bucket, tmp_path, monkeypatch, capsys):
    weights = Theirs({"other": 9}, heads=8).write(tmp_path / "hub/best.pt").parent
    streamed = mtm.simulate(1, 60, 8, seed=4)[0]
    streamed.neurons = {"ibl_quality_score": np.resize([1.0, 0.5], 8)}
    monkeypatch.setattr(dandi, "find", lambda session: session)
    monkeypatch.setattr(dandi, "load_session", lambda address, window: streamed)
    monkeypatch.setenv("MTM_REAL", "1")
    names, shown = {}, []
    for cell in jupytext.read(PAGE, fmt="md:myst").cells:
        if cell.cell_type != "code":
            continue
        source = cell.source.replace('"NerDSLab/ibl-bwb-mtm", 100', f'"{weights}", 2')
        source = source.replace("../benchmarks", str(PAGE.parents[1] / "benchmarks"))
        source = source.replace('"recordings"', repr(str(tmp_path / "recordings")))
        exec(compile(source, PAGE.name, "exec"), names)
        shown.append(source)
    plt.close("all")
    assert names["REAL"] and sum("if REAL:" in source for source in shown) == 7
    assert names["session"].window == (0.0, 1.0) and names["session"].bin_size == 0.02
    assert not names["start"].session_names and not names["tuned"].config.causal
    printed = capsys.readouterr().out
    assert EID in printed and all(name in printed for name in names["methods"])
