"""Frozen dataclasses from nested mappings, checked field by field, and what two of them differ in.

Imports nothing of ours.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A value the program cannot run with; the message names the field, the value and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    require(value in allowed, f"{name} = {value!r} is not one of {', '.join(map(repr, allowed))}")


def positive(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{name} = {value!r} must be greater than 0")


def not_negative(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        require(value >= 0, f"{name} = {value!r} must be 0 or greater")


def share(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        require(0.0 <= value <= 1.0, f"{name} = {value!r} must be between 0 and 1")


def build(cls: Any, values: Mapping[str, Any], path: str = "config") -> Any:
    """Dataclass `cls` of nested mappings; ConfigError for unknown, missing or ill-typed fields."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{path}.{name} is not a known field; {hint}")
    built = {}
    for name, f in fields.items():
        where = f"{path}.{name}"
        if name in values:
            built[name] = _convert(hints[name], values[name], where)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} is missing")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, Mapping), f"{where} = {value!r} must be a section with fields")
        return build(kind, value, where)
    if typing.get_origin(kind) is dict:  # dict[str, kind of the values]
        require(isinstance(value, Mapping), f"{where} = {value!r} must be a section with fields")
        inner = typing.get_args(kind)[1]
        return {name: _convert(inner, value[name], f"{where}.{name}") for name in value}
    if typing.get_origin(kind) is tuple:  # tuple[kind of the items, ...]; JSON has lists
        require(isinstance(value, list | tuple), f"{where} = {value!r} must be a tuple")
        inner = typing.get_args(kind)[0]
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, float):
        require(math.isfinite(value), f"{where} = {value} must be a finite number")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if wrong_bool or not isinstance(value, kind):
        raise ConfigError(f"{where} = {value!r} must be of type {kind.__name__}")
    return value


def with_defaults(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with every default of the dataclass filled in, so that each can be overridden."""
    hints, filled = typing.get_type_hints(cls), dict(given)
    for f in dataclasses.fields(cls):
        kind, value = hints[f.name], given.get(f.name, {})
        if dataclasses.is_dataclass(kind):
            if isinstance(value, Mapping):
                filled[f.name] = with_defaults(kind, value)
        elif typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
            if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
                value = {
                    name: with_defaults(inner, entry) if isinstance(entry, Mapping) else entry
                    for name, entry in value.items()
                }
            filled[f.name] = value
        elif f.default is not dataclasses.MISSING:
            filled.setdefault(f.name, f.default)
    return filled


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Lines `field: old -> new` for every leaf in which two nested mappings differ."""
    lines = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{path}{name}.")
        elif a != b:
            lines.append(f"{path}{name}: {a!r} -> {b!r}")
    return lines
