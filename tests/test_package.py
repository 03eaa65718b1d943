"""What the package promises as a whole: its layout, no code run from files, no network, secrets."""

import ast
import subprocess
import sys
import tomllib
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import mtm
from mtm import MtM, MtMConfig, cli, from_pretrained, push_to_hub
from mtm.data import ibl, nwb

PACKAGE = Path(mtm.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SECRET = "s3cr3t-0123456789"

# A module imports only from those after it.
FLOORS = """
    __main__ cli __init__ bwb baselines behaviour evaluation training plots
    decoding validation progress checkpoint bwb_weights official
    prediction data simulation
    batches distributed model direct_paths recipes report session masks metrics binning
    inputs files
""".split()
CORE = {"session", "binning", "masks", "model", "metrics", "training", "evaluation", "decoding"}


def imported(path: Path) -> set[str]:
    """Modules and subpackages of mtm that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mtm":
            found |= {f"mtm.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mtm."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("mtm.")}
    return {name.split(".")[1] for name in found}


def test_imports_lead_downwards():
    wrong = []
    for path in MODULES:
        name, others = path.relative_to(PACKAGE).parts[0].removesuffix(".py"), imported(path)
        wrong += [(name, x) for x in others - {name} if FLOORS.index(x) < FLOORS.index(name)]
        if name in CORE:
            wrong += [(name, x) for x in others & {"baselines", "official", "bwb", "data"}]
    assert wrong == []


def test_functions_fit_a_screen():
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert [n.name for n in functions if n.end_lineno - n.lineno >= 60] == []


def test_all_of_it_is_shipped():
    """Every folder with modules, and the mark that they have types."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in MODULES}
    assert {".".join(folder.parts) for folder in folders} == set(settings["packages"])
    assert "py.typed" in settings["package-data"]["mtm"] and (PACKAGE / "py.typed").is_file()


# Functions that run code found in a file; a pickle is read only by an unpickler of ours.
UNSAFE = {
    *("eval", "exec", "compile", "joblib.load", "os.system", "pickle.load", "pickle.loads"),
    *("pd.read_pickle", "torch.jit.load"),
}
UNPICKLERS = {"official.py", "data/steinmetz.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_can_run_code(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            call, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            found += [call] * (call in UNSAFE)
            if call == "torch.load" and "pickle_module" not in options:
                found += [call] * (ast.unparse(options.get("weights_only", node)) != "True")
            if call == "np.load":
                found += [call] * (ast.unparse(options.get("allow_pickle", node)) != "False")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "pickle.Unpickler":
            found += [] if path.relative_to(PACKAGE).as_posix() in UNPICKLERS else ["Unpickler"]
    assert found == []


OFFLINE = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket.") or event == "urllib.Request":
        raise AssertionError(f"network: {event} {arguments}")

sys.addaudithook(refuse)
import torch
before = dict(os.environ)
import mtm, mtm.cli
from mtm.data import huggingface, ibl, kilosort, nwb, steinmetz
assert mtm.plots and mtm.bwb and dict(os.environ) == before

(session,) = mtm.simulate(1, 30, 8, seed=0)
model = mtm.fit(session, depth=1, epochs=1, progress=False).model
print(mtm.evaluate(model, session, tasks=["co-smoothing"]))
"""


def test_import_and_training_need_no_network_and_leave_the_environment_alone():
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True)
    assert done.returncode == 0 and "co-smoothing" in done.stdout, done.stderr


class Refusing(BaseHTTPRequestHandler):
    """A server that refuses everything and records the requests."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        self.requests.append(f"{self.path} {self.headers} {self.rfile.read(length)}")
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_HEAD = do_GET


@pytest.fixture
def server(serve, tmp_path, monkeypatch):
    """The server's handler, with its address as ``url``; caches go to a folder of the test."""
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    handler = type("Handler", (Refusing,), {"requests": []})
    handler.url = serve(handler)
    yield handler
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@contextmanager
def hidden(server, *kinds):
    """An error is raised, and the secret was sent but is not in the traceback."""
    server.requests.clear()
    with pytest.raises(kinds) as error:
        yield
    assert SECRET in str(server.requests)
    assert SECRET not in "".join(traceback.format_exception(error.value))


def test_password_of_one_is_not_shown(server, tmp_path):
    with hidden(server, OSError):
        ibl.connect(tmp_path / "cache", base_url=server.url, username="me", password=SECRET)


def test_token_of_the_hub_is_not_shown(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    model = MtM(MtMConfig.from_depth(1), 6, {"a": 3})
    with hidden(server, OSError, ValueError):
        push_to_hub(model, "lab/model", token=SECRET)
    with hidden(server, OSError, ValueError):
        from_pretrained("lab/model", token=SECRET, endpoint=server.url)


def test_passwords_in_addresses_are_not_shown(server, tmp_path, capfd):
    address = f"{server.url.replace('://', f'://me:{SECRET}@')}/x.nwb?signature={SECRET}"
    assert cli.main(["prepare", "nwb", address, "--out", str(tmp_path / "out")])
    assert SECRET not in "".join(capfd.readouterr())
    with hidden(server, mtm.SessionError):
        nwb.load_session(address)
