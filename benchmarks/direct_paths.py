"""Our recipe with and without the direct paths, and with NDT2's tokens, on validation trials.

    python benchmarks/direct_paths.py FOLDER [--recordings NAME ...]

FOLDER is that of real_data.py. Out come results/direct_paths.json and .md. Takes half an hour.
"""

from __future__ import annotations

import common
from recipe import trained

VARIANTS = {
    "ours": {},
    "no direct paths": {"own_history": False, "latents": 0},
    "own history alone": {"latents": 0},
    "population alone": {"own_history": False},
    "no dropout of latents": {"latent_dropout": 0.0},
    "NDT2, patches of neurons": {"tokenizer": "ndt2"},
}
RECORDINGS = ("03_Cori_2016-12-18", "07_Forssmann_2017-11-05")


def main() -> None:
    """Read the command line, run, write the JSON and the table."""
    arguments = common.parser(__doc__, "direct_paths")
    arguments.set_defaults(seeds=[0], recordings=RECORDINGS)
    options = arguments.parse_args()
    sessions = common.recordings(options.folder, options.recordings)
    methods = {name: trained(VARIANTS[name]) for name in VARIANTS}
    common.run(sessions, methods, options.seeds, options.work, "val", common.FOUR)
    whole = common.table(sessions, methods, options.seeds, options.work)
    facts = common.described(sessions, options) | {"scores": whole}
    common.write_json(options.out / "direct_paths.json", facts)
    text = "# What the direct paths are worth\n\nValidation trials, bits per spike as in "
    text += "real_data.md. Made by `python benchmarks/direct_paths.py`.\n\n"
    text += common.markdown("Mean over recordings", common.averages(whole))
    text += "".join("\n" + common.markdown(name, tasks) for name, tasks in whole.items())
    (options.out / "direct_paths.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
