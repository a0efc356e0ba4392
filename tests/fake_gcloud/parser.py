"""Parses gcloud's words as strictly as gcloud does, by the table that read_flags.py made of it."""

import json
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "flags.json").read_text())
REPEATED = ("ssh-flag", "scp-flag")


class UsageError(Exception):
    pass


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """(command, {flag or POSITIONAL: value}). Raises UsageError with gcloud's own words."""
    names = [name for name in TABLE if name == " ".join(words[: len(name.split())])]
    if not names:
        raise UsageError(f"ERROR: (gcloud) Invalid choice: {' '.join(words)!r}.")
    (name,) = names
    error = f"ERROR: (gcloud.{name.replace(' ', '.')}) "
    flags = {a["name"]: a for a in _leaves(TABLE[name]) if not a.get("positional")}
    flags |= {key: {"type": kind} for key, kind in TABLE["global"].items()}
    given: dict[str, Any] = {}
    positional: list[str] = []
    rest = iter(words[len(name.split()) :])
    for word in rest:
        if word == "--":
            given["SSH_ARGS"] = list(rest)
        elif word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            if flag not in flags:
                raise UsageError(f"{error}unrecognized arguments: {word}")
            if flags[flag].get("type") == "bool":
                if equals:
                    raise UsageError(
                        f"{error}argument --{flag}: ignored explicit argument {value!r}"
                    )
                given[flag] = True
                continue
            if not equals and (value := next(rest, "")) == "":
                raise UsageError(f"{error}argument --{flag}: expected one argument")
            _put(given, flag, value, flags[flag], error)
        elif word.startswith("-"):
            raise UsageError(f"{error}unrecognized arguments: {word}")
        else:
            positional.append(word)
    _place(name, positional, given, error)
    for argument in TABLE[name]:
        _check(argument, given, error)
    return name, given


def _put(given: dict[str, Any], flag: str, value: str, about: dict[str, Any], error: str) -> None:
    if about.get("choices") and value not in about["choices"]:
        raise UsageError(f"{error}argument --{flag}: Invalid choice: {value!r}.")
    if about.get("type") == "int":
        try:
            given[flag] = int(value)
        except ValueError:
            raise UsageError(f"{error}argument --{flag}: invalid int value: {value!r}") from None
    elif flag in REPEATED:
        given.setdefault(flag, []).append(value)
    else:
        given[flag] = value


def _place(name: str, words: list[str], given: dict[str, Any], error: str) -> None:
    places = [a["name"] for a in _leaves(TABLE[name]) if a.get("positional")]
    places = [place for place in places if place != "SSH_ARGS"]
    if places == ["SOURCES", "DESTINATION"] and len(words) > 1:
        words = [" ".join(words[:-1]), words[-1]]
    if len(words) > len(places):
        raise UsageError(f"{error}unrecognized arguments: {' '.join(words[len(places) :])}")
    given |= dict(zip(places, words, strict=False))


def _leaves(arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for argument in arguments:
        found += _leaves(argument["group"]) if "group" in argument else [argument]
    return found


def _any(argument: dict[str, Any], given: dict[str, Any]) -> bool:
    return any(leaf["name"] in given for leaf in _leaves([argument]))


def _check(argument: dict[str, Any], given: dict[str, Any], error: str) -> None:
    """Required and exclusive arguments, group by group; inside a group only where it is used."""
    names = " | ".join(
        leaf["name"] if leaf.get("positional") else f"--{leaf['name']}"
        for leaf in _leaves([argument])
    )
    if "group" not in argument:
        if argument.get("required") and argument["name"] not in given:
            raise UsageError(f"{error}argument {names}: Must be specified.")
        return
    used = [inner for inner in argument["group"] if _any(inner, given)]
    if argument.get("mutex") and (len(used) > 1 or (argument.get("required") and not used)):
        how = "Exactly" if argument.get("required") else "At most"
        raise UsageError(f"{error}{how} one of ({names}) must be specified.")
    if argument.get("required") and not used:
        raise UsageError(f"{error}argument {names}: Must be specified.")
    for inner in used if argument.get("mutex") else argument["group"]:
        if used:
            _check(inner, given, error)
