"""The HF folder on disk: read and checked from its headers, and published by rename.

Only safetensors are read: a .bin is a pickle, and unpickling runs code. Imports
`memphis_jax.config`, `memphis_jax.tensors`, `memphis_jax.rounds.files` and `convert.mapping`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.mapping import Place, by_leaf, places
from convert.raw import mapped
from memphis_jax.config import ModelConfig
from memphis_jax.rounds.files import new_folder, read_object
from memphis_jax.tensors import DTYPES as KNOWN
from memphis_jax.tensors import IGNORED, INDEX

Progress = Callable[[int, int], None]  # (leaves or tensors done, in all)
DTYPES = {code: KNOWN[code] for code in ("F32", "BF16", "F16")}  # that are converted


class ConvertError(RuntimeError):
    """A folder that cannot be converted; the message names everything that is wrong with it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, not yet read."""

    path: Path
    name: str
    dtype: str  # as safetensors writes it: "F32", "BF16"
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    def read(self) -> np.ndarray:
        """Its bits, mapped: unsigned integers, for numpy copies and compares bfloat16 slowly."""
        return mapped(self.path, self.start, self.shape, f"u{DTYPES[self.dtype].itemsize}")


def open_folder(folder: str | Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """(config, {HF tensor name: tensor}) of an HF folder whose tensors fit its config exactly.

    Reads config.json and the headers of the safetensors files (and, where a tied model stores its
    head as well, those two tensors). Raises ConfigError for a config that the model does not
    support, and ConvertError naming at once every missing, unknown or repeated tensor, every wrong
    shape or dtype, absent shards and damaged files.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    stored, repeated = _read_headers(_safetensors_files(folder))
    table = places(config)
    problems = [f"repeated: {line}" for line in repeated]
    problems += [f"missing: {name}" for name in table if name not in stored]
    for name, tensor in stored.items():
        if name in table:
            problems += _misfit(tensor, table[name])
        elif not _is_redundant_head(name, config) and not IGNORED.fullmatch(name):
            problems.append(f"unknown: {name} in {tensor.path.name}")
    problems += _mixed_dtypes({n: stored[n] for n in table if n in stored}, table)
    if problems:
        raise ConvertError(
            f"{folder} does not hold the model of its config.json: " + "; ".join(problems)
        )
    _check_tied_head(folder, config, stored)
    return config, {name: stored[name] for name in table}


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ConvertError naming the file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise ConvertError(f"{path} does not exist: is {path.parent} an HF folder?") from None
    except ValueError as error:
        raise ConvertError(str(error)) from None


def _safetensors_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if not files and pickles:
        raise ConvertError(
            f"{folder} holds {', '.join(pickles)} and no safetensors: pickle is never loaded; "
            "convert to safetensors"
        )
    if not files:
        raise ConvertError(f"{folder} holds no *.safetensors file")
    if (folder / INDEX).is_file():
        table = read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
            raise ConvertError(f"{folder / INDEX}: weight_map is not {{tensor: file}}: delete it")
        absent = sorted(set(table.values()) - {path.name for path in files})
        if absent:
            raise ConvertError(f"{folder / INDEX} names files that are absent: {', '.join(absent)}")
    return files


def _read_headers(files: list[Path]) -> tuple[dict[str, Stored], list[str]]:
    """({tensor name: tensor}, repeated names with their files) of all files together."""
    found: dict[str, list[Stored]] = defaultdict(list)
    damaged = []
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                names = list(file.keys())
        except SafetensorError as error:
            size = path.stat().st_size
            damaged.append(f"{path} ({size} bytes) is truncated or damaged: {error}")
            continue
        data, header = _header(path)
        for name in names:
            at = header[name]
            start = data + at["data_offsets"][0]
            found[name].append(Stored(path, name, at["dtype"], tuple(at["shape"]), start))
    if damaged:
        raise ConvertError("; ".join(damaged) + "; copy or download again")
    repeated = [
        f"{name} in {', '.join(t.path.name for t in tensors)}"
        for name, tensors in found.items()
        if len(tensors) > 1
    ]
    return {name: tensors[0] for name, tensors in found.items()}, repeated


def _header(path: Path) -> tuple[int, dict]:
    """(where the tensors' bytes begin, {name: {dtype, shape, data_offsets}}) of a checked file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def _misfit(tensor: Stored, place: Place) -> list[str]:
    problems = []
    if tensor.shape != place.shape:
        have, want = list(tensor.shape), list(place.shape)
        problems.append(f"wrong shape: {tensor.name} is {have}, the config gives {want}")
    if tensor.dtype not in DTYPES:
        problems.append(f"wrong dtype: {tensor.name} is {tensor.dtype}, not {', '.join(DTYPES)}")
    return problems


def _mixed_dtypes(stored: dict[str, Stored], table: dict[str, Place]) -> list[str]:
    """A leaf stacks the same tensor of all layers: they must share one dtype."""
    problems = []
    for leaf, tensors in by_leaf({name: table[name] for name in stored}).items():
        dtypes = sorted({stored[name].dtype for name in tensors})
        if len(dtypes) > 1:
            problems.append(f"mixed dtypes: {leaf} is {' and '.join(dtypes)} in different layers")
    return problems


def _is_redundant_head(name: str, config: ModelConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def _check_tied_head(folder: Path, config: ModelConfig, stored: dict[str, Stored]) -> None:
    if not config.tie_word_embeddings or "lm_head.weight" not in stored:
        return
    head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    same_kind = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same_kind or not np.array_equal(head.read(), embedding.read()):
        raise ConvertError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false to keep the head, or remove the head"
        )


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy copies and compares bfloat16 slowly."""
    return array.view(f"u{array.dtype.itemsize}")


@contextmanager
def published(
    target: Path, source: Path, is_ours: Callable[[Path], bool], kind: str
) -> Iterator[Path]:
    """`new_folder`, where a `target` that exists is empty or `is_ours(target)`.

    That is an earlier output, which can be made again; otherwise ConvertError, with `kind` saying
    what would have been allowed. So is a `target` with `source` in it, which would go with the
    earlier output.
    """
    target, source = target.resolve(), source.resolve()
    if target in (source, *source.parents):
        raise ConvertError(f"{target} holds {source}, which is read: name another folder")
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target} is a file, a folder is needed")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise ConvertError(f"{target} is not empty and is not {kind}: name another folder")
    with new_folder(target) as partial:
        yield partial
