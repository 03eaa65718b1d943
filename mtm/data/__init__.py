"""Readers that end in a Session (ibl, nwb, kilosort, steinmetz, huggingface); many on disk."""

import importlib
import importlib.util
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Import a reader when it is first used."""
    if importlib.util.find_spec(f"mtm.data.{name}"):
        return importlib.import_module(f"mtm.data.{name}")
    raise AttributeError(f"module 'mtm.data' has no attribute {name!r}")
