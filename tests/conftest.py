"""What many tests share: small simulated sessions and a model trained on them once."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from mtm import baselines, decoding, fit, simulate

torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))

REFERENCE = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Decoders and baselines search less: fewer penalties, widths, ranks and steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANKS", (6,)), ("LBFGS_STEPS", 12), ("COMPONENTS", (4,))):
            patch.setattr(baselines, name, value)
        patch.setattr(decoding, "CLASS_PENALTIES", decoding.CLASS_PENALTIES[1::3])
        patch.setattr(decoding, "RIDGE_PENALTIES", decoding.RIDGE_PENALTIES[[0, 5, 8]])
        patch.setattr(decoding, "WIDTHS", (0, 2))
        yield


@pytest.fixture(scope="session")
def parity():
    """Folder of numerical fixtures of the authors' model; not part of the project."""
    folder = REFERENCE / "parity"
    if not folder.is_dir():
        pytest.skip("the authors' numerical fixtures are not on this machine")
    return folder


@pytest.fixture(scope="session")
def sessions():
    """Two simulated animals: 100 trials, 25 bins, 24 neurons of 6 regions."""
    return simulate(2, 100, 24, seed=3, mean_rate=30.0, bin_size=0.08)


@pytest.fixture(scope="session")
def trained(sessions):
    """A small model, trained briefly on both."""
    return fit(sessions, depth=1, epochs=12, validations=2, progress=False)


def brute_force(trains, events, window, bin_size):
    """Counts (K, T, N) of trains of spikes (seconds), one comparison for each bin and spike."""
    bins = np.arange(round((window[1] - window[0]) / bin_size))[:, None]
    starts = np.asarray(events)[:, None, None] + window[0] + bin_size * bins
    return np.stack([((t >= starts) & (t < starts + bin_size)).sum(-1) for t in trains], -1)


class Handler(BaseHTTPRequestHandler):
    """Answers requests with bytes, and logs nothing."""

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """A function that serves a handler's class until the test ends, and returns the address."""
    servers = []

    def start(handler):
        handler.log_message = lambda *_: None
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
