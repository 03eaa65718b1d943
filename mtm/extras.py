"""Packages that only some of the package needs, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = {
    "data": ("one", "iblutil", "iblatlas", "pandas", "pyarrow", "requests"),
    "nwb": ("h5py", "pynwb", "remfile", "requests"),
    "bwb": ("h5py",),
    "hub": ("huggingface_hub",),
}


def extra(module: str) -> ModuleType:
    """A module of an optional extra of this package.

    Raises:
        ImportError: saying which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        name = next((name for name, packages in PACKAGES.items() if package in packages), None)
        if name is None:
            raise
        raise ImportError(f'{module} is missing: pip install "mtm-neural[{name}]"') from error
