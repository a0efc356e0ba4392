"""Checkpoint folder -> HF folder that transformers and vLLM load, with a certificate.

Tensors are streamed: memory holds one at a time or, of a checkpoint that a training wrote, the part
of one stacked leaf whose layers share chunks, never the model. Several processes
(`convert.hosts`) divide the tensors by bytes, each writes files of its own. The folder is written
beside the target and published by rename, so a reader sees all of it or nothing.

conversion.json, the certificate, is the same from any number of processes but for "files":
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
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_folder import ConvertError, Progress, published
from convert.hosts import ALONE, Hosts, Team, team_of
from convert.mapping import Place
from convert.plan import Plan, divide, make_plan
from convert.raw import beside, threads
from convert.shard import new_shard
from convert.weights import CODES, Checkpoint, open_checkpoint
from memphis_jax.checkpoint import TOKENIZER_FILES
from memphis_jax.rounds.certificate import CERTIFICATE, file_hashes, is_replaceable, model_files
from memphis_jax.rounds.files import partial_of, sha256_file
from memphis_jax.tensors import INDEX, header

TOKEN = ".token"  # in the unfinished folder: shows that all processes see the same one


def to_hf(
    checkpoint: str | Path,
    hf: str | Path,
    dtype: str = "keep",
    max_shard_size: int = 5 * 10**9,
    progress: Progress = lambda done, total: None,
    hosts: Hosts = ALONE,
) -> dict[str, Any]:
    """Exports the latest step of a checkpoint folder and returns the certificate.

    `max_shard_size` is in bytes of tensors per file. An existing `hf` is replaced only if it is an
    earlier export. With `hosts`, every process calls this with the same arguments and gets the
    certificate once the folder is published; both folders must lie where all hosts see them.
    Raises what `open_checkpoint` raises, ConvertError for an unfit target or, in every process,
    where one of them fails, dies or falls silent, and FileExistsError for an earlier export with
    files that its certificate does not cover.
    """
    with team_of(hosts, {"--dtype": dtype, "--max-shard-size": max_shard_size}) as team:
        if hosts.process:
            task = team.wait_for("task")[0]
            source = open_checkpoint(checkpoint, task["step"])
            plan = make_plan(source, dtype, max_shard_size, hosts.count)
            folder = partial_of(Path(hf))
            _check_shared(folder, task["token"], hosts.seconds / 2)
            files = task["source_files"][hosts.process]
            team.tell(part=_write_part(source, plan, folder, hosts.process, files, team.tick))
            return team.wait_for("certificate")[0]
        source = open_checkpoint(checkpoint)
        plan = make_plan(source, dtype, max_shard_size, hosts.count)
        kind = f"an earlier export (no {CERTIFICATE})"
        with (
            published(Path(hf), source.folder, is_replaceable, kind) as folder,
            team.parting_on_error(),  # nobody writes any more when the folder is removed
        ):
            certificate = _lead(source, plan, folder, team, progress)
        team.part(certificate=certificate)
    return certificate


def describe(value: np.ndarray, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the certificate says about a tensor; `value` is contiguous, of any type of that size."""
    return _description(dtype, shape, hashlib.sha256(value.data).hexdigest())


def _description(dtype: str, shape: tuple[int, ...], sha256: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "sha256": sha256}


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{path inside folder: sha256} of the files named."""
    return {name: sha256_file(folder / name) for name in names}


def list_files(folder: Path) -> dict[str, int]:
    """{path inside folder: bytes} of every file but the certificate, at any depth, sorted."""
    return {name: path.stat().st_size for name, path in model_files(folder).items()}


def hash_folder(folder: Path) -> str:
    """sha256 over the lines `sha256  path` of all files of a folder, sorted by path."""
    return _hash_of_hashes(file_hashes(folder))


def _hash_of_hashes(files: Mapping[str, str]) -> str:
    lines = (f"{digest}  {name}\n" for name, digest in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _lead(
    source: Checkpoint, plan: Plan, folder: Path, team: Team, progress: Progress
) -> dict[str, Any]:
    """Process 0: writes its own part and all that is not tensors; returns the certificate."""
    token = secrets.token_hex(16)
    (folder / TOKEN).write_text(token)
    source_files = list_files(source.step_folder)
    owners = divide(source_files, team.hosts.count)
    by_process = [[n for n in owners if owners[n] == p] for p in range(team.hosts.count)]
    team.tell(task={"step": source.step, "token": token, "source_files": by_process})
    mine = 0

    def show() -> None:
        progress(mine + sum(team.done.values()), len(plan.table))

    def tick(done: int) -> None:
        nonlocal mine
        mine = done
        team.tick(done)
        show()

    parts = {0: _write_part(source, plan, folder, 0, by_process[0], tick)}
    parts |= team.wait_for("part", meanwhile=show)
    tensors, files, hashes = (
        {n: value for process in sorted(parts) for n, value in parts[process][kind].items()}
        for kind in ("tensors", "files", "source_files")
    )
    progress(len(tensors), len(plan.table))
    (folder / TOKEN).unlink()
    _check_arrived(folder, {name: file["size"] for name, file in files.items()})
    written = {name: file["sha256"] for name, file in files.items()}
    if len(plan.files) > 1:
        weight_map = {name: file for file, members in plan.files.items() for name in members}
        total = {"total_size": sum(plan.sizes.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    _write_companions(folder, source, plan.kinds)
    others = [name for name in list_files(folder) if name not in written]
    certificate = {
        "format": 1,
        "model": dataclasses.asdict(source.config),
        "dtype": plan.dtype,
        "tensors": tensors,
        "files": dict(sorted((written | hash_files(folder, others)).items())),
        "coverage": _coverage(source, plan.table, tensors),
        "source": {
            "checkpoint": str(source.folder.resolve()),
            "step": source.step,
            "sha256": _hash_of_hashes({name: hashes[name] for name in source_files}),
        },
    }
    _write_json(folder / CERTIFICATE, certificate)
    return certificate


def _write_part(
    source: Checkpoint,
    plan: Plan,
    folder: Path,
    process: int,
    source_files: list[str],
    tick: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Writes the files of one process and hashes `source_files`, for the certificate."""
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    mine = {name: place for name, place in plan.table.items() if plan.owners[name] == process}
    values = source.tensors(mine, plan.kinds)
    with threads() as pool, beside() as other:
        # Meanwhile, wherever a core is free.
        hashing = [other.submit(hash_files, source.step_folder, [name]) for name in source_files]
        for file, members in plan.files.items():
            if plan.owners[members[0]] != process:
                continue
            kinds = {n: plan.kinds[mine[n].leaf].name for n in members}
            start = header({n: (CODES[kinds[n]], mine[n].shape) for n in members})
            with new_shard(folder / file, start, pool) as shard:
                for name in members:
                    tick(len(tensors))
                    value, transposed = next(values)
                    sha256 = shard.add(value, transposed)
                    tensors[name] = _description(kinds[name], mine[name].shape, sha256)
                    del value  # before the next is read
                files[file] = shard.close()
        for hashed in hashing:
            tick(len(tensors))
            hashes |= hashed.result()
    return {"tensors": tensors, "files": files, "source_files": hashes}


def _check_shared(folder: Path, token: str, seconds: float) -> None:
    """Raises ConvertError unless this process sees the unfinished folder of process 0."""
    if not _soon(lambda: (folder / TOKEN).read_text() == token, seconds):
        raise ConvertError(
            f"{folder} of process 0 is not seen here: the HF folder must lie where all hosts see it"
        )


def _check_arrived(folder: Path, sizes: dict[str, int]) -> None:
    """Raises ConvertError unless every file of the other processes is here as a whole."""
    if not _soon(lambda: all((folder / n).stat().st_size == size for n, size in sizes.items())):
        raise ConvertError(f"{folder}: files written by other processes are not all seen here")


def _soon(seen: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether `seen()`, in a while: a mounted bucket shows new files late."""
    deadline = time.monotonic() + min(seconds, 30)
    while True:
        with suppress(OSError):
            if seen():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


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
