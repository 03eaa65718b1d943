"""mtm: multi-task masking (MtM), a self-supervised model of neural population activity.

The core, to be read in this order::

    session       one recording: trials x time bins x neurons, regions, behaviour
    binning       spike times to counts, traces to bins
    masks         what is hidden and what is scored: six schemes and a sampler
    model         the whole model: embed, encode, read out
    direct_paths  linear paths around the encoder
    metrics       Poisson likelihood, bits per spike, D2, R2
    training      fit(): one explicit loop
    prediction    which entries each task hides, and how a predictor is asked for them
    evaluation    evaluate(): the six tasks of the paper
    decoding      decode(): behaviour from predicted activity
    behaviour     fit_behaviour(): a model fine-tuned to decode behaviour

Around it::

    inputs        arrays, tables and times as users have them, checked
    validation    scores of what a scheme hides, calibration
    files         files written as a whole, arrays on disk, optional packages
    recipes       settings of training: ours and the paper's
    batches       batches of trials for training, and their order
    distributed   what a run computes on: device, precision, compiler, processes
    progress      bar in terminals, line in notebooks, TensorBoard
    checkpoint    models and training runs on disk and on the Hugging Face Hub
    official      checkpoints of the authors' code
    bwb_weights   the public MtM of BrainWideBench
    report        tables of scores
    baselines     what a user would otherwise pick
    plots         rasters, PSTHs, masks, scores
    simulation    animals with known firing rates
    data          readers (IBL, NWB, Kilosort, Steinmetz, Hugging Face), many sessions on disk
    bwb           BrainWideBench: its files and submissions
    cli           python -m mtm simulate | prepare | train | evaluate | export

Recordings in, a trained model and scores out:

    >>> import mtm
    >>> session = mtm.Session(counts, regions)
    >>> model = mtm.fit(session).model
    >>> print(mtm.evaluate(model, session))

Reference: Zhang et al., "Towards a universal translator for neural dynamics at single-cell,
single-spike resolution", arXiv 2407.14668.
"""

import importlib
from types import ModuleType

from mtm.baselines import fit_baseline
from mtm.behaviour import fit_behaviour
from mtm.checkpoint import from_pretrained, load, push_to_hub, save
from mtm.data.collection import Prepared, Sessions, prepare
from mtm.data.regions import at_level
from mtm.decoding import decode, decode_by_region
from mtm.evaluation import evaluate
from mtm.inputs import SessionError, continuous_windows
from mtm.masks import Mask, MaskSampler, register
from mtm.model import MtM, MtMConfig
from mtm.official import from_official
from mtm.prediction import mean_rates, oracle
from mtm.recipes import TrainConfig
from mtm.report import Report, score_table
from mtm.session import Session, Split
from mtm.simulation import simulate
from mtm.training import Fit, fit

__version__ = "0.2.0"

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
    "continuous_windows",
    "decode",
    "decode_by_region",
    "evaluate",
    "fit",
    "fit_baseline",
    "fit_behaviour",
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
    """Import ``mtm.plots`` and ``mtm.bwb`` when they are first used."""
    if name in ("bwb", "plots"):
        return importlib.import_module(f"mtm.{name}")
    raise AttributeError(f"module 'mtm' has no attribute {name!r}")
