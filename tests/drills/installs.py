"""Install the package as a stranger would, and run its tests where its source is not.

    python tests/drills/installs.py --python python3.13 [--lowest] [--sdist] [--json OUT]

Builds a wheel (or a source distribution, from which pip then builds one), installs it with all
extras and what the tests need in a fresh environment of that Python, asks `pip check`, and runs the
quick tests in a copy of the project without ``mtm/``. With ``--lowest`` every requirement that has
a lower bound in pyproject.toml is installed at that bound. The result is added to OUT, with the
versions that were met and the licences of what the package needs.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = "data,nwb,bwb,hub"
TESTS = ("pytest", "pytest-xdist", "hypothesis", "tensorboard", "torchmetrics", "rich", "codespell")
TESTS += ("jupytext", "jupyter-book", "nbmake")  # for the tests of the book and its twins

FACTS = """
import json, re, sys
from importlib.metadata import distribution, distributions
from pathlib import Path
import mtm
assert "site-packages" in mtm.__file__, mtm.__file__

def licence(meta):
    said = [c.split(" :: ")[-1] for c in meta.get_all("Classifier", []) if c[:7] == "License"]
    words = meta.get("License-Expression") or "; ".join(said) or meta.get("License") or ""
    return re.split(r"[\\r\\n]", words.strip())[0][:60] or "not stated"

def needs(name, seen):
    for line in distribution(name).requires or []:
        found = re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-")
        wanted = "extra ==" not in line or (name == "mtm-neural" and "extra ==" in line)
        if wanted and found in there and found not in seen:
            seen.add(found)
            needs(found, seen)
    return seen

there = {d.metadata["Name"].lower().replace("_", "-"): d for d in distributions()}
used = sorted(needs("mtm-neural", set()))
print(json.dumps({
    "versions": {name: there[name].version for name in used},
    "licences": {name: licence(there[name].metadata) for name in used},
}))
"""


def lowest() -> list[str]:
    """Constraints: each requirement of pyproject.toml at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


def tools() -> list[str]:
    """What the tests need, as requirements.txt has it."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [line.split(" #")[0] for line in lines if re.split(r"[<>=]", line)[0] in TESTS]


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run and return; the end of what was said where it failed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, text=True, capture_output=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}")
    return done


def drill(python: str, low: bool, sdist: bool, work: Path) -> dict:
    """One environment, from building to testing; what is to be kept of it."""
    source = work / "source"
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(python, "-m", "venv", work / "env", cwd=work)
    inside = work / "env" / "bin" / "python"
    pip = (inside, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "build", cwd=work)
    kind = "--sdist" if sdist else "--wheel"
    run(inside, "-m", "build", kind, "--outdir", work / "dist", source, cwd=work)
    [built] = (work / "dist").iterdir()
    shutil.rmtree(source / "mtm")  # the tests must find the installed one
    bounds = work / "constraints.txt"
    bounds.write_text("\n".join(lowest() if low else ["torch==2.13.0"]) + "\n")
    start = time.monotonic()
    run(*pip, "-c", bounds, f"mtm-neural[{EXTRAS}] @ file://{built}", cwd=work)
    installed = time.monotonic() - start
    run(*pip, "-c", bounds, *tools(), cwd=work)
    check = run(inside, "-m", "pip", "check", cwd=work, check=False)
    facts = json.loads(run(inside, "-c", FACTS, cwd=work).stdout)
    run(*pip, "--no-deps", "ibl-bwb-eval==0.1.0", cwd=work)
    start = time.monotonic()
    tests = (inside, "-m", "pytest", "tests", "-q", "-n", "2", "-p", "no:cacheprovider")
    tests += ("-k", "not twins_are_in_step and not all_of_it_is_shipped")  # they need the source
    tested = run(*tests, cwd=source, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tested.stdout, re.M)
    (work / "tests.txt").write_text(tested.stdout + tested.stderr)
    return {
        "python": run(inside, "-V", cwd=work).stdout.split()[1],
        "built": "sdist" if sdist else "wheel",
        "requirements": "lowest" if low else "newest, torch 2.13.0",
        "bytes": built.stat().st_size,
        "install_s": round(installed),
        "pip_check": check.stdout.strip(),
        "tests": tested.stdout.strip().splitlines()[-1].strip("= "),
        "failed": failed,
        "exit": tested.returncode,
        "test_s": round(time.monotonic() - start),
        **facts,
    }


def main() -> None:
    """Run one drill and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to install for")
    parser.add_argument("--lowest", action="store_true", help="lower bounds of pyproject.toml")
    parser.add_argument("--sdist", action="store_true", help="from the source distribution")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = drill(options.python, options.lowest, options.sdist, work)
    result |= {"platform": platform.platform(terse=True), "date": time.strftime("%Y-%m-%d")}
    shown = {key: value for key, value in result.items() if key not in ("versions", "licences")}
    print(json.dumps(shown, indent=1))
    if options.json:
        done = json.loads(options.json.read_text()) if options.json.exists() else []
        same = ("python", "built", "requirements")
        done = [one for one in done if any(one[key] != result[key] for key in same)]
        options.json.write_text(json.dumps([*done, result], indent=1) + "\n")
    if result["exit"] or "No broken" not in result["pip_check"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
