"""Checks of what a user passes: settings have the types they declare, arrays hold numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np

WORDS = {
    "int": "a whole number of at most 64 bits",
    "float": "a finite number",
    "bool": "True or False",
    "str": "a string",
    "tuple[str, ...]": "a list of names",
    "dict[str, float]": "a dict from names to finite numbers",
}


def check_types(settings: Any) -> None:
    """Check all fields of a frozen dataclass, and keep them as plain Python.

    Raises:
        ValueError: for a value of another type; the message names the field.
    """
    for field in fields(settings):
        value = checked(field.name, getattr(settings, field.name), str(field.type))
        object.__setattr__(settings, field.name, value)


def checked(name: str, value: Any, kind: str) -> Any:
    """The value as plain Python, which JSON can hold; ``kind`` is an annotation.

    Numbers of numpy are numbers; a bool is none, though Python has it so.

    Raises:
        ValueError: naming what is called ``name``.
    """
    wanted = kind.removesuffix(" | None")
    if value is None and wanted != kind:
        return None
    whole = isinstance(value, Integral) and is_number(value)
    if wanted == "int" and whole and -(2**63) <= value < 2**63:
        return int(value)
    if wanted == "float" and is_number(value):
        return float(value)
    if wanted == "bool" and isinstance(value, bool | np.bool_):
        return bool(value)
    if wanted == "str" and isinstance(value, str):
        return value
    if wanted == "tuple[str, ...]" and isinstance(value, list | tuple):
        return tuple(checked(f"each of {name}", each, "str") for each in value)
    if wanted == "dict[str, float]" and isinstance(value, Mapping):
        return {each: checked(f"{name}[{each!r}]", x, "float") for each, x in value.items()}
    if wanted not in WORDS:
        return value  # a field that somebody has added
    none = " or None" if wanted != kind else ""
    raise ValueError(f"{name} must be {WORDS[wanted]}{none}, got {value!r}")


def one_of(name: str, value: Any, known: Iterable[str | None]) -> None:
    """Check that a value is one of the known words.

    Raises:
        ValueError: naming what is called ``name``, and listing them.
    """
    if value not in (words := tuple(known)):
        raise ValueError(f"{name} must be one of {', '.join(map(str, words))}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether this is a number that float64 can hold; no bool, NaN or infinity."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of some hundred digits
        return False


def numbers(name: str, values: Any) -> np.ndarray:
    """An array of booleans, integers or floats; objects that are numbers become float64.

    Raises:
        ValueError: naming what is called ``name``.
    """
    try:
        array = np.asarray(values)
        array = array.astype(np.float64) if array.dtype == object else array
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array of numbers ({error})") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, got {array.dtype}")
    return array
