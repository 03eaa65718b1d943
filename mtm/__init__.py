"""mtm: multi-task masking (MtM), a self-supervised model of neural population activity.

Read the package in this order, one idea a file::

    A recording
        session     one recording, cut into trials and binned
        binning     spike times to counts, behaviour traces to bins
        atlas       regions at three levels: Allen, Beryl, Cosmos

    The model
        masks       what is hidden, what is scored: six schemes, a sampler
        model       the whole model: embed, encode, read out

    Training
        recipes     settings of training: ours, and the authors'
        batches     a session as training needs it, and the batches of an epoch
        device      what a run computes on: GPU, precision, compiler, memory
        train       fit(): one explicit loop
        run         the state of a training on disk: one that was killed goes on
        parallel    several processes that train one model
        watch       what one sees of a run: bar, history, TensorBoard
        hub         save, load and share models
        official    checkpoints of the authors' code

    Evaluation
        metrics     bits per spike, Poisson D2, R2 of trials and PSTHs
        tasks       the six tasks: what is hidden, what is scored
        predict     one interface for whatever fills in hidden activity
        evaluate    the tasks, of one session or many, into a Report
        report      scores, neuron by neuron, and what is said of them
        decode      choice and continuous behaviour from predicted activity
        regression  spike counts from spike counts: ridge, Poisson, low rank
        baselines   what a user would otherwise pick, behind the same interface
        plots       rasters, PSTHs, masks, scores

    Recordings, many and from elsewhere
        simulate    animals with known firing rates
        alf         sessions written as files that ONE reads
        sources     readers: ibl, nwb, steinmetz, neuromatch, huggingface
        bwb         BrainWideBench: its files, its tasks, a submission
        download    large files by HTTPS, resumed where they were cut
        prepare     many recordings to session files, in parallel
        sessions    many recordings on disk: listed, filtered, trained on in place

    Beneath it all
        checks      settings and arrays are as they should be, or refused
        atomic      files that are complete or not there
        extras      packages that only some of this needs
        cli         python -m mtm simulate | prepare | train | evaluate | export

Recordings in, a trained model and honest scores out:

    >>> import mtm
    >>> session = mtm.Session(counts, regions)
    >>> model = mtm.fit(session).model
    >>> print(mtm.evaluate(model, session))

Reference: Zhang et al., "Towards a universal translator for neural dynamics at single-cell,
single-spike resolution", arXiv 2407.14668.
"""

import importlib
import importlib.util
import os
import sys
from types import ModuleType

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # GNU's OpenMP, which torch brings on Linux, reads this when it is loaded: threads that wait for
    # each other sleep soon. By default they stay awake for milliseconds, and where other processes
    # compute, too, keep a core from the very thread that they wait for: training on a CPU takes
    # several times as long then (benchmarks/threads.py). Results do not depend on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from mtm.atlas import at_level
from mtm.baselines import fit_baseline
from mtm.decode import decode, decode_by_region, decode_choice, decode_trace
from mtm.evaluate import evaluate
from mtm.hub import from_pretrained, load, push_to_hub, save
from mtm.masks import Mask, MaskSampler, register
from mtm.model import MtM, MtMConfig
from mtm.official import from_official
from mtm.predict import mean_rates, oracle
from mtm.prepare import Prepared, prepare
from mtm.recipes import TrainConfig
from mtm.report import Report, score_table
from mtm.session import Session, SessionError, Split
from mtm.sessions import Sessions
from mtm.simulate import simulate
from mtm.train import Fit, fit

__version__ = "0.1.0"

__all__ = [
    "Fit",
    "Mask",
    "MaskSampler",
    "MtM",
    "MtMConfig",
    "Prepared",
    "Report",
    "Session",
    "SessionError",
    "Sessions",
    "Split",
    "TrainConfig",
    "at_level",
    "decode",
    "decode_by_region",
    "decode_choice",
    "decode_trace",
    "evaluate",
    "fit",
    "fit_baseline",
    "from_official",
    "from_pretrained",
    "load",
    "mean_rates",
    "oracle",
    "prepare",
    "push_to_hub",
    "register",
    "save",
    "score_table",
    "simulate",
]


def __getattr__(name: str) -> ModuleType:
    """The files too, as ``mtm.plots``: each is imported when it is first asked for."""
    if name.startswith("_") or importlib.util.find_spec(f"mtm.{name}") is None:
        raise AttributeError(f"module 'mtm' has no attribute {name!r}")
    return importlib.import_module(f"mtm.{name}")
