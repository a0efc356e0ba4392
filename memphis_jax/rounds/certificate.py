"""Checks an exported model folder against its certificate, conversion.json. No jax.

`convert/to_hf.py` writes the certificate: {"files": {name: sha256}, ...} of every other file.
"""

import json
from pathlib import Path

from memphis_jax.rounds.files import sha256_file

CERTIFICATE = "conversion.json"


def model_files(folder: Path) -> dict[str, Path]:
    """{name: path} of every file of a model folder but the certificate, at any depth, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if name != CERTIFICATE}


def file_hashes(folder: Path) -> dict[str, str]:
    """{name: sha256} of `model_files`."""
    return {name: sha256_file(path) for name, path in model_files(folder).items()}


def is_replaceable(folder: Path) -> bool:
    """Whether a folder carries a certificate, so that it is an output that can be made again.

    Raises FileExistsError, naming them, for files that the certificate does not cover: they are
    somebody's own or edited since, and would go with the folder. Weights are known by their names:
    nobody edits those, and hashing them takes long.
    """
    path = folder / CERTIFICATE
    if not path.is_file():
        return False
    try:
        certified = dict(json.loads(path.read_text("utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        certified = {}
    own = [
        name
        for name, path in model_files(folder).items()
        if name not in certified
        or (path.suffix != ".safetensors" and sha256_file(path) != certified[name])
    ]
    if own:
        shown = ", ".join(own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
        raise FileExistsError(
            f"{folder} would be replaced, and {shown} with it, which {CERTIFICATE} there does not "
            "cover: somebody made or changed that later; move it away, or name another folder"
        )
    return True


def check_certificate(folder: Path, hashes: dict[str, str]) -> None:
    """Raises ValueError, naming each file, unless the certificate covers exactly these files."""
    path = folder / CERTIFICATE
    remedy = "export it with `python -m convert to-hf`, or pass --uncertified"
    if not path.is_file():
        raise ValueError(f"{folder} has no {CERTIFICATE}, so nobody vouches for it: {remedy}")
    try:
        certified = dict(json.loads(path.read_text("utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a certificate of to-hf ({error}): {remedy}") from error
    problems = [
        f"{name} is {'not what was certified' if name in certified else 'not in it'}"
        if name in hashes
        else f"{name} is missing"
        for name in sorted(certified.keys() | hashes.keys())
        if certified.get(name) != hashes.get(name)
    ]
    if problems:
        raise ValueError(f"{path} does not match its folder: {'; '.join(problems)}; {remedy}")
