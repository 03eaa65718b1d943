"""Settings are what they are annotated as, in plain Python, or are refused by name."""

import json

import numpy as np
import pytest

from mtm import TrainConfig

BOTH = [TrainConfig]


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (TrainConfig, "epochs", ["9", 9.0, True, None, [9], np.nan, 2**63, 0, -1]),
        (TrainConfig, "lr", ["0.1", None, True, np.nan, np.inf, 10**400, 0.0]),
        (TrainConfig, "clip", ["1", np.nan, 0.0, -1.0]),
        (TrainConfig, "weight_decay", [-0.1, np.inf, [0.1]]),
        (TrainConfig, "micro_batch", [0, 1.5, "2"]),
        (TrainConfig, "prompt", [0, "yes", None]),
        (TrainConfig, "seed", [0.5, 2**64, None, "0"]),
        (TrainConfig, "tune", ["none", None, 0]),
        (TrainConfig, "schemes", [(), ["neuron", "neuron"], 5, None, [1]]),
        (TrainConfig, "ratios", [5, None, {"neuron": 0}, {"neuron": 1.1}, {"neuron": "x"}]),
    ],
)
def test_what_a_field_cannot_be_is_refused_by_its_name(kind, field, values):
    for value in values:
        with pytest.raises(ValueError, match=field):
            kind(**{field: value})


def test_numbers_of_numpy_become_plain_ones():
    config = TrainConfig(
        epochs=np.int64(3), lr=np.float32(0.5), weight_decay=1, prompt=np.bool_(False), clip=None
    )
    assert (config.epochs, config.lr, config.weight_decay) == (3, 0.5, 1.0)
    assert config.prompt is False and config.clip is None
    json.dumps(vars(config))
