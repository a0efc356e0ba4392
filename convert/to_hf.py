"""Checkpoint folder -> HF folder that transformers and vLLM load, with a certificate.

Tensors are streamed: memory holds about two stacked leaves of the checkpoint, never the model. The
folder is written beside the target and published by rename, so a reader sees all of it or nothing.

conversion.json, the certificate:
    format    1
    model     the ModelConfig
    dtype     what was asked for: "keep", "float32" or "bfloat16"
    tensors   {name: {dtype, shape, sha256}}; the hash is over the little-endian bytes
    files     {file name: sha256} of every other file of the folder
    coverage  {leaves, leaves_mapped, tensors, tensors_mapped}: of the checkpoint and of the HF side
    source    {checkpoint, step, sha256}; the hash is `hash_folder` of that step
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orbax.checkpoint as ocp

from convert.hf_folder import DTYPES, INDEX, ConvertError, Progress, bits, published
from convert.mapping import Place, places, transpose_into
from memphis_jax.checkpoint import TOKENIZER_FILES, latest_step, read_meta
from memphis_jax.config import ModelConfig, build
from memphis_jax.model import abstract, flatten

CERTIFICATE = "conversion.json"
CODES = {dtype.name: code for code, dtype in DTYPES.items()}  # "bfloat16" -> "BF16"


@dataclass(frozen=True)
class Checkpoint:
    """The weights in the latest step of a checkpoint folder, not yet read."""

    folder: Path
    step: int
    config: ModelConfig
    dtypes: dict[str, np.dtype]  # of each leaf

    @property
    def step_folder(self) -> Path:
        return (self.folder / "checkpoints" / str(self.step)).absolute()

    def read(self, leaf: str, dtype: np.dtype) -> np.ndarray:
        """One leaf, rounded to nearest even where `dtype` is narrower than the saved one."""
        args = ocp.args.PyTreeRestore(
            item={leaf: 0},
            restore_args={leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)},
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.step_folder / "params", args=args)[leaf]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens the latest step, checking the names and shapes of its leaves against its own config.

    Raises CheckpointError where there is no step, ConfigError for a model that this program does
    not know, ConvertError naming every missing, unknown or misshapen leaf.
    """
    folder = Path(folder)
    step = latest_step(folder)
    config = build(ModelConfig, read_meta(folder, step)["model"], f"{folder}: model")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = (folder / "checkpoints" / str(step) / "params").absolute()
        saved = checkpointer.metadata(path).item_metadata.tree
    wanted = {leaf: tuple(array.shape) for leaf, array in flatten(abstract(config)).items()}
    problems = [f"missing: {leaf}" for leaf in wanted if leaf not in saved]
    problems += [f"unknown: {leaf}" for leaf in saved if leaf not in wanted]
    for leaf in wanted.keys() & saved.keys():
        shape, dtype = tuple(saved[leaf].shape), np.dtype(saved[leaf].dtype)
        if shape != wanted[leaf]:
            problems.append(f"wrong shape: {leaf} is {shape}, the config gives {wanted[leaf]}")
        if dtype.name not in CODES:
            problems.append(f"wrong dtype: {leaf} is {dtype.name}, not one of {', '.join(CODES)}")
    if problems:
        raise ConvertError(f"{folder} step {step} does not fit its config: {'; '.join(problems)}")
    return Checkpoint(folder, step, config, {leaf: np.dtype(saved[leaf].dtype) for leaf in wanted})


def to_hf(
    checkpoint: str | Path,
    hf: str | Path,
    dtype: str = "keep",
    max_shard_size: int = 5 * 10**9,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Exports the latest step of a checkpoint folder and returns the certificate.

    `max_shard_size` is in bytes of tensors per file. An existing `hf` is replaced only if it is an
    earlier export. Raises what `open_checkpoint` raises, and ConvertError for an unfit target.
    """
    source = open_checkpoint(checkpoint)
    kinds = {leaf: own if dtype == "keep" else _dtype(dtype) for leaf, own in source.dtypes.items()}
    table = places(source.config)
    # Wide tensors first: every tensor then starts at a multiple of its own item size.
    names = sorted(table, key=lambda name: -kinds[table[name].leaf].itemsize)
    sizes = {n: int(np.prod(table[n].shape)) * kinds[table[n].leaf].itemsize for n in names}
    shards = split(sizes, max_shard_size)
    tensors: dict[str, Any] = {}
    with published(Path(hf), is_export, f"an earlier export (no {CERTIFICATE})") as folder:
        values = _values(source, {name: table[name] for name in names}, kinds)
        for file, members in shards.items():
            shapes = {n: (kinds[table[n].leaf].name, table[n].shape) for n in members}
            with open(folder / file, "wb") as out:
                out.write(safetensors_header(shapes))
                for name in members:
                    progress(len(tensors), len(names))
                    tensors[name] = _append(out, next(values), *shapes[name])
        progress(len(names), len(names))
        if len(shards) > 1:
            weight_map = {name: file for file, members in shards.items() for name in members}
            total = {"total_size": sum(sizes.values())}
            _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
        _write_companions(folder, source, kinds)
        certificate = {
            "format": 1,
            "model": dataclasses.asdict(source.config),
            "dtype": dtype,
            "tensors": tensors,
            "files": hash_files(folder),
            "coverage": _coverage(source, table, tensors),
            "source": {
                "checkpoint": str(source.folder.resolve()),
                "step": source.step,
                "sha256": hash_folder(source.step_folder),
            },
        }
        _write_json(folder / CERTIFICATE, certificate)
    return certificate


def is_export(hf: Path) -> bool:
    """Whether a folder carries the certificate of an earlier `to_hf`."""
    return (hf / CERTIFICATE).is_file()


def split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """{file: its tensors}, in order, at most `limit` bytes each; a larger tensor is alone."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(shards, 1)}


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Start of a safetensors file of {name: (dtype, shape)} whose bytes follow in this order.

    The format (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes
    little-endian, then the header, JSON padded with spaces to a multiple of 8. The library itself
    writes only files that it is given whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * DTYPES[CODES[dtype]].itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def describe(value: np.ndarray, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the certificate says about a tensor; `value` is contiguous, of any type of that size."""
    return {"dtype": dtype, "shape": list(shape), "sha256": hashlib.sha256(value.data).hexdigest()}


def hash_files(folder: Path) -> dict[str, str]:
    """{path inside folder: sha256} of every file but the certificate, at any depth."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != CERTIFICATE:
            with open(path, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def hash_folder(folder: Path) -> str:
    """sha256 over the lines `sha256  path` of all files of a folder, sorted by path."""
    lines = (f"{digest}  {name}\n" for name, digest in hash_files(folder).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hf_view(leaf: np.ndarray, place: Place) -> np.ndarray:
    """The bits of one HF tensor of a leaf, contiguous in HF's orientation."""
    part = bits(leaf)[place.index]
    if not place.transposed:
        return np.ascontiguousarray(part)
    out = np.empty(place.shape, part.dtype)
    transpose_into(out, part)
    return out


def _values(
    source: Checkpoint, table: dict[str, Place], kinds: dict[str, np.dtype]
) -> Iterator[np.ndarray]:
    """The bits of the tensors in the order of `table`, one leaf in memory at a time."""
    current, leaf = "", np.empty(0)
    for place in table.values():
        if place.leaf != current:
            del leaf  # before the next is read
            current, leaf = place.leaf, source.read(place.leaf, kinds[place.leaf])
        yield hf_view(leaf, place)


def _append(out: BinaryIO, value: np.ndarray, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    out.write(value.data)
    return describe(value, dtype, shape)


def _dtype(name: str) -> np.dtype:
    if name not in ("float32", "bfloat16"):
        raise ConvertError(f"dtype = {name!r} is not one of 'keep', 'float32', 'bfloat16'")
    return DTYPES[CODES[name]]


def _coverage(
    source: Checkpoint, table: dict[str, Place], tensors: dict[str, Any]
) -> dict[str, int]:
    return {
        "leaves": len(source.dtypes),
        "leaves_mapped": len({table[name].leaf for name in tensors}),
        "tensors": len(table),
        "tensors_mapped": len(tensors),
    }


def _write_companions(folder: Path, source: Checkpoint, kinds: dict[str, np.dtype]) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    names = {dtype.name for dtype in kinds.values()}
    name = names.pop() if len(names) == 1 else "float32"
    # "dtype" for transformers 5, "torch_dtype" for older ones and for vLLM.
    _write_json(
        folder / "config.json", {**source.config.to_hf(), "dtype": name, "torch_dtype": name}
    )
    ids = {f: getattr(source.config, f) for f in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", ids)
    for file in TOKENIZER_FILES:
        if (source.folder / "tokenizer" / file).is_file():
            shutil.copy2(source.folder / "tokenizer" / file, folder / file)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
