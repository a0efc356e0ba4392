"""Compares an HF folder with a checkpoint bit by bit, and with its certificate where it has one.

Where the dtypes differ, the checkpoint is rounded to the HF folder's dtype first, as to-hf does.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_folder import DTYPES, ConvertError, Progress, Stored, open_folder, read_json
from convert.mapping import by_leaf, places, transpose_into
from convert.to_hf import describe, hash_folder
from convert.weights import Checkpoint, open_checkpoint
from memphis_jax.checkpoint import read_meta
from memphis_jax.config import ModelConfig
from memphis_jax.fields import difference
from memphis_jax.rounds.certificate import CERTIFICATE, file_hashes


@dataclass
class Verdict:
    """What `verify` found; `differences` empty means that the two hold the same model."""

    compared: int = 0  # tensors
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def verify(
    hf: str | Path, checkpoint: str | Path, progress: Progress = lambda done, total: None
) -> Verdict:
    """Compares every tensor, the config, and the certificate's hashes with files and checkpoint.

    An HF folder that does not hold a whole model is a difference. Raises ConvertError where `hf` is
    no folder, and what `open_checkpoint` raises.
    """
    hf = Path(hf)
    if not hf.is_dir():
        raise ConvertError(f"{hf} is not a folder")
    saved = open_checkpoint(checkpoint)
    verdict = Verdict()
    found: dict[str, Any] = {}
    try:
        config, stored = open_folder(hf)
    except ConvertError as error:
        verdict.differences.append(str(error))
    else:
        verdict.differences += _config_differences(saved.config, config)
        if not verdict.differences:
            found = _compare_tensors(saved, stored, verdict, progress)
    if (hf / CERTIFICATE).is_file():
        _compare_certificate(hf, saved, found, verdict)
    else:
        verdict.notes.append(f"{hf} has no {CERTIFICATE}: only the tensors were compared")
    return verdict


def _config_differences(saved: ModelConfig, hf: ModelConfig) -> list[str]:
    lines = difference(dataclasses.asdict(saved), dataclasses.asdict(hf))
    return [f"config, checkpoint -> HF: {line}" for line in lines]


def _compare_tensors(
    saved: Checkpoint, stored: dict[str, Stored], verdict: Verdict, progress: Progress
) -> dict[str, Any]:
    """Adds differing tensors to the verdict; returns the description of each HF tensor."""
    found: dict[str, Any] = {}
    rounded = Counter[str]()
    table = places(saved.config)
    kinds = {leaf: DTYPES[stored[next(iter(t))].dtype] for leaf, t in by_leaf(table).items()}
    for leaf, dtype in kinds.items():
        if dtype != saved.dtypes[leaf]:
            rounded[f"{saved.dtypes[leaf].name} in the checkpoint compared as {dtype.name}"] += 1
    values = saved.tensors(table, kinds)
    for name, place in table.items():
        progress(len(found), len(stored))
        ours, transposed = next(values)
        if transposed:
            turned = np.empty(place.shape, ours.dtype)
            transpose_into(turned, ours)
            ours = turned
        theirs, dtype = stored[name].read(), kinds[place.leaf]
        verdict.differences += _differing_values(name, theirs, ours, dtype)
        found[name] = describe(theirs, dtype.name, place.shape)
        del ours, theirs  # before the next is read
    progress(len(found), len(stored))
    verdict.compared = len(found)
    verdict.notes += [f"{count} leaves: {what}" for what, count in rounded.items()]
    return found


def _differing_values(
    name: str, theirs: np.ndarray, ours: np.ndarray, dtype: np.dtype
) -> list[str]:
    """Both as bits."""
    where = theirs != ours
    count = int(where.sum())
    if not count:
        return []
    a, b = (x.view(dtype)[where].astype(np.float64) for x in (theirs, ours))
    largest = float(np.abs(a - b).max())
    return [f"{name}: {count} of {where.size} values differ, at most by {largest:.3g}"]


def _compare_certificate(
    hf: Path, saved: Checkpoint, found: dict[str, Any], verdict: Verdict
) -> None:
    certificate = read_json(hf / CERTIFICATE)
    try:
        tensors, files, source = (certificate[part] for part in ("tensors", "files", "source"))
        step, source_hash = source["step"], source["sha256"]
    except (KeyError, TypeError):
        verdict.differences.append(
            f"{CERTIFICATE} is not a certificate of to-hf: parts are missing"
        )
        return
    if found:
        verdict.differences += _uncertified("tensor", tensors, found)
    present = file_hashes(hf)
    verdict.differences += _uncertified(
        "file", files, {n: present[n] for n in files if n in present}
    )
    if surplus := sorted(present.keys() - files.keys()):
        verdict.notes.append(f"{CERTIFICATE}: files that it does not cover: {', '.join(surplus)}")
    told = f"{CERTIFICATE}: exported from step {step}, "
    if step != saved.step and "converted_from" in read_meta(saved.folder, saved.step):
        verdict.notes.append(f"{told}and {saved.folder} was converted from an HF folder")
    elif step != saved.step:
        verdict.differences.append(f"{told}the checkpoint's latest is {saved.step}")
    elif source_hash != hash_folder(saved.step_folder):
        verdict.notes.append(
            f"{CERTIFICATE}: exported from other files than those of step {step} of {saved.folder}"
        )


def _uncertified(kind: str, certified: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = sorted(certified.keys() | found.keys())
    return [
        f"{CERTIFICATE}: {kind} {name} is {'not what was certified' if name in found else 'absent'}"
        for name in names
        if certified.get(name) != found.get(name)
    ]
