"""Packages that only some of this one needs, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(module: str, name: str) -> ModuleType:
    """A module that comes with an optional extra of this package.

    Args:
        module: to import.
        name: of the extra, as in ``pip install "mtm-neural[name]"``.

    Raises:
        ImportError: saying which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, and lacks something itself
        raise ImportError(f'{module} is missing: pip install "mtm-neural[{name}]"') from error
