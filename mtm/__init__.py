"""mtm: multi-task masking (MtM), a self-supervised model of neural population activity.

Read the package in this order, one idea a file::

    session     one recording, cut into trials and binned
    binning     spike times to counts, behaviour traces to bins
    masks       what is hidden, what is scored: six schemes and the sampler that alternates them
    model       the whole model: embed, encode, read out
    metrics     bits per spike, Poisson D2, R2 of trials and PSTHs
    train       fit(): one explicit loop
    evaluate    the four activity tasks, into a Report
    decode      choice and continuous behaviour from predicted activity, with controls
    hub         save, load and share models; read the authors' checkpoints
    simulate    animals with known firing rates
    alf         sessions written as files that ONE reads
    sources     recordings from elsewhere: sources.ibl
    plots       rasters, PSTHs, masks, scores
    cli         python -m mtm simulate | prepare | train | evaluate

Recordings in, a trained model and honest scores out:

    >>> import mtm
    >>> session = mtm.Session(counts, regions)
    >>> model = mtm.fit(session).model
    >>> print(mtm.evaluate(model, session))

Reference: Zhang et al., "Towards a universal translator for neural dynamics at single-cell,
single-spike resolution", arXiv 2407.14668.
"""

from mtm.decode import decode, decode_choice, decode_trace
from mtm.evaluate import Report, evaluate, mean_rates, oracle, score_table
from mtm.hub import from_pretrained, load, push_to_hub, save
from mtm.masks import Mask, MaskSampler, register
from mtm.model import MtM, MtMConfig
from mtm.session import Session, SessionError, Split
from mtm.simulate import simulate
from mtm.train import Fit, TrainConfig, fit

__version__ = "0.1.0.dev0"

__all__ = [
    "Fit",
    "Mask",
    "MaskSampler",
    "MtM",
    "MtMConfig",
    "Report",
    "Session",
    "SessionError",
    "Split",
    "TrainConfig",
    "decode",
    "decode_choice",
    "decode_trace",
    "evaluate",
    "fit",
    "from_pretrained",
    "load",
    "mean_rates",
    "oracle",
    "push_to_hub",
    "register",
    "save",
    "score_table",
    "simulate",
]
