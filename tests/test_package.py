"""What the package promises of itself: nothing is unpickled, nobody is called, secrets are kept."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import codespell_lib
import numpy as np
import pytest

import mtm
from mtm import MtM, MtMConfig, Session, cli, from_pretrained, prepare, push_to_hub
from mtm.data import ibl, nwb

PACKAGE = Path(mtm.__file__).parent
ROOT = PACKAGE.parent
SECRET = "s3cr3t-0123456789"


def test_all_of_it_is_shipped():
    """Every folder with modules, and the mark that they have types."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(settings["packages"])
    assert "py.typed" in settings["package-data"]["mtm"] and (PACKAGE / "py.typed").is_file()


# ------------------------------------------------------------------- what runs the code in a file

NEVER = (
    *("eval", "exec", "compile", "joblib.load", "np.loads", "os.system", "pickle.load"),
    *("pickle.loads", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.package"),
)
MODULES = ("cloudpickle", "dill", "marshal", "shelve", "subprocess")


def dangers(source: str) -> list[str]:
    """What in a module could run code that is in a file: calls, imports, bases of classes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            if name in NEVER:
                found.append(name)
            # Theirs are read with an unpickler of ours.
            if name == "torch.load" and "pickle_module" not in options:
                if ast.unparse(options.get("weights_only", node)) != "True":
                    found.append(name)
            if name == "np.load" and ast.unparse(options.get("allow_pickle", node)) != "False":
                found.append(name)
        elif isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            if not any(getattr(part, "name", "") == "find_class" for part in node.body):
                found.append(f"{node.name} finds any class")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "pickle.Unpickler":
            found.append("pickle.Unpickler")  # the ones of ours are counted below
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.partition(".")[0] in MODULES]
            found += ["from pickle"] * (getattr(node, "module", "") == "pickle")
    return found


def test_dangers_are_seen():
    for source in ("eval('1')", "import dill", "from pickle import loads", "np.load(f)",
                   "np.load(f, allow_pickle=True)", "torch.load(f)", "pickle.load(f)",
                   "torch.load(f, weights_only=False)", "joblib.load(f)",
                   "class A(pickle.Unpickler): pass"):  # fmt: skip
        assert dangers(source), source
    safe = "np.load(f, allow_pickle=False); torch.load(f, weights_only=True); model.eval()"
    assert dangers(safe) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_can_run_code(path):
    """But for two unpicklers, which find no class but those of plain arrays and tensors."""
    ours = path.relative_to(PACKAGE).as_posix() in ("official.py", "sources/neuromatch.py")
    assert dangers(path.read_text("utf-8")) == ["pickle.Unpickler"] * ours


def test_every_file_is_reached_from_the_package():
    for name in ("alf", "bwb", "plots"):
        vars(mtm).pop(name, None)  # which an import somewhere else has put there
        assert getattr(mtm, name) is sys.modules[f"mtm.{name}"]
    with pytest.raises(AttributeError, match="module 'mtm' has no attribute 'nothing'"):
        _ = mtm.nothing


# ------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    "first, said, expected",
    [
        ("mtm", {}, "1000"),
        ("mtm", {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ("torch, mtm", {}, None),  # too late, so nothing is claimed
    ],
)
def test_threads_sleep_soon_where_nobody_said_otherwise(first, said, expected):
    words = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {key: value for key, value in os.environ.items() if key not in words} | said
    code = f"import {first}, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr


# ------------------------------------------------------------------------------------ the network

OFFLINE = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") or event == "urllib.Request":
        raise AssertionError(f"network: {event} {arguments}")

sys.addaudithook(refuse)
import mtm, mtm.cli
from mtm.data import huggingface, ibl, neuromatch, nwb, steinmetz

(session,) = mtm.simulate(1, 30, 8, seed=0)
model = mtm.fit(session, depth=1, epochs=1, progress=False).model
print(mtm.evaluate(model, session))
"""


def test_nobody_is_called():
    """Importing, simulating, training and evaluating, while every socket is an error."""
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True)
    assert done.returncode == 0 and "co-smoothing" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------- secrets


class Refusing(BaseHTTPRequestHandler):
    """A server that knows nobody, and remembers what it was told."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        self.told.append(f"{self.path} {self.headers} {self.rfile.read(length)}")
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(serve):
    """Its handler, with the address as ``url``."""
    handler = type("Handler", (Refusing,), {"told": []})
    handler.url = serve(handler)
    return handler


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch, capfd):
    """After each test, the secret is in no file, home and caches included, nor was it printed."""
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    yield
    assert SECRET not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        assert SECRET not in str(path)
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def said(error: pytest.ExceptionInfo) -> str:
    """An error as it is printed, with what led to it."""
    return "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("secret", [{"token": SECRET}, {"username": "me", "password": SECRET}])
def test_log_in_to_one(server, tmp_path, secret):
    with pytest.raises(OSError) as error:
        ibl.connect(tmp_path / "cache", base_url=server.url, **secret)
    assert SECRET in str(server.told) and SECRET not in said(error)


def test_token_of_the_hub(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    model = MtM(MtMConfig.from_depth(1, n_bins=6), {"a": 3})
    for call in (
        lambda: push_to_hub(model, "lab/model", token=SECRET),
        lambda: from_pretrained("lab/model", token=SECRET, endpoint=server.url),
    ):
        server.told.clear()
        with pytest.raises((OSError, ValueError)) as error:
            call()
        assert SECRET in str(server.told) and SECRET not in said(error)


def test_addresses_with_a_password_or_a_signature(server, tmp_path, capfd):
    address = f"{server.url.replace('://', f'://me:{SECRET}@')}/x.nwb?signature={SECRET}"
    assert cli.main(["prepare", "nwb", address, "--out", str(tmp_path / "out")])
    printed = "".join(capfd.readouterr())
    assert "401" in printed and SECRET not in printed and SECRET in str(server.told)
    for nowhere in (address, f"http://me:{SECRET}@127.0.0.1:9/x.nwb?signature={SECRET}"):
        with pytest.raises(mtm.SessionError) as error:
            nwb.load_session(nowhere)
        assert SECRET not in said(error)
    with pytest.raises(ValueError, match="cannot be the name") as error:
        prepare(load, [address], tmp_path / "out")
    assert SECRET not in said(error)


def load(address: str, token: str = "") -> Session:
    """As a user's own reader, which needs a token."""
    assert SECRET in address + token
    return Session(np.ones((10, 2, 3), dtype=np.uint8), name="session")


def test_session_files_of_addresses(tmp_path):
    addresses = {"a": f"https://me:{SECRET}@server/x?signature={SECRET}", "b": "https://server/y"}
    options = {"token": SECRET, "workers": 1, "progress": False}
    for status in ("written", "there already"):
        done = prepare(load, addresses, tmp_path, **options)
        assert [outcome.status for outcome in done.outcomes] == [status] * 2, done
    other = addresses | {"a": f"https://server/x?session=2&signature={SECRET}"}
    done = prepare(load, other, tmp_path, **options)
    assert [outcome.status for outcome in done.outcomes] == ["written", "there already"]


# --------------------------------------------------------------------------------------- spelling


def british() -> dict[str, str]:
    """American spelling -> the British one: codespell's dictionary, turned round."""
    words = Path(codespell_lib.__file__).parent / "data/dictionary_en-GB_to_en-US.txt"
    pairs = (line.split("->") for line in words.read_text("utf-8").splitlines())
    theirs = {american.partition(",")[0]: word for word, american in pairs}
    for word in ("math", "optimizer", "program"):  # TeX; as torch calls it; of a computer
        del theirs[word]
    return theirs


def prose(path: Path) -> str:
    """The text of a page, or the docstrings of a module, without code."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    text = re.sub(r"^( *)(`{3,}(?!\{(?!code))).*?^\1`{3,}$", "", text, flags=re.M | re.S)
    return re.sub(r"``.*?``|`[^`]*`|\]\([^)]*\)|https?://\S+", "", text)


def test_spelling_is_british():
    theirs, wrong = british(), {}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("book/*.md"), *PACKAGE.rglob("*.py")]:
        words = set(re.findall(r"[a-z]+", prose(path).lower()))
        wrong |= {f"{path.name}: {word}": theirs[word] for word in words & theirs.keys()}
    assert wrong == {}
