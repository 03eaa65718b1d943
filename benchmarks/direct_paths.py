"""Our recipe without parts of the direct paths, and with other settings, on validation trials.

    python benchmarks/direct_paths.py FOLDER [--recordings NAME ...]

FOLDER is that of real_data.py. Out come results/direct_paths.json and .md. Takes two hours.
"""

from __future__ import annotations

from typing import Any

import common
import torch
from recipe import AGAIN, trained, variants

from mtm.masks import Mask, neuron, register
from mtm.recipes import RECIPES

ANY = "neuron, any share"
OURS = RECIPES["mtm"]
PATHS: dict[str, dict[str, Any]] = {
    "ours": {},
    "no direct paths": {"own_history": False, "latents": 0},
    "own history alone": {"latents": 0},
    "population alone": {"own_history": False},
    "no dropout of latents": {"latent_dropout": 0.0},
    "NDT2, patches of neurons": {"tokenizer": "ndt2"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "regions equally likely": {"regions_by_size": False},
    "no input dropout": {"input_dropout": {}},
    "neither of the two": {"regions_by_size": False, "input_dropout": {}},
}
SEARCH: dict[str, dict[str, Any]] = {
    "16 latents": {"latents": 16},
    "64 latents": {"latents": 64},
    "two layers": {"depth": 2},
    "half the epochs": {"epochs": OURS.epochs // 2},
    "weight decay 0.3": {"weight_decay": 0.3},
    "weight decay 3": {"weight_decay": 3.0},
    "causal twice as often": {"schemes": (*OURS.schemes, AGAIN)},
    "also neurons, 0.3 to 0.9": {"schemes": (*OURS.schemes, ANY)},
}
RECORDINGS = (
    "03_Cori_2016-12-18", "06_Forssmann_2017-11-04", "07_Forssmann_2017-11-05",
    "09_Hench_2017-06-16",
)  # fmt: skip


def any_share(counts: torch.Tensor, regions: torch.Tensor, _: float, generator: Any) -> Mask:
    """Neuron masking of a share that is drawn, too, from 0.3 to 0.9."""
    share = torch.rand((), generator=generator, device=counts.device)
    return neuron(counts, regions, 0.3 + 0.6 * float(share), generator)


def main() -> None:
    """Read the command line, run, write the JSON and the tables."""
    arguments = common.parser(__doc__, "direct_paths")
    arguments.set_defaults(seeds=[0], recordings=RECORDINGS)
    options = arguments.parse_args()
    variants()  # registers AGAIN
    register(ANY, any_share, prompt=False)
    sessions = common.recordings(options.folder, options.recordings)
    methods = {name: trained(how) for name, how in {**PATHS, **SETTINGS, **SEARCH}.items()}
    common.run(sessions, methods, options.seeds, options.work, "val", common.FOUR)
    whole = common.table(sessions, methods, options.seeds, options.work)
    facts = common.described(sessions, options) | {"scores": whole}
    common.write_json(options.out / "direct_paths.json", facts)
    text = "# What the direct paths are worth\n\nValidation trials, bits per spike as in "
    text += "real_data.md. Made by `python benchmarks/direct_paths.py`.\n\n"
    means = common.averages(whole)
    parts = {"Mean over recordings": PATHS, "One setting changed": SETTINGS, "Others": SEARCH}
    for title, names in parts.items():
        rows = ["ours", *(name for name in names if name != "ours")]
        some = {task: {n: row[n] for n in rows if n in row} for task, row in means.items()}
        text += common.markdown(title, some) + "\n"
    text += "\n".join(common.markdown(name, tasks) for name, tasks in whole.items())
    (options.out / "direct_paths.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
