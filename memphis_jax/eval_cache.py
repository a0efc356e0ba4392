"""Answers of a model, kept per request, so that an evaluation goes on where it was. No jax.

OUT/requests.jsonl has one line per block of requests: {"keys": [...], "answers": [...]}. A key is
the hash of everything that decides an answer: the weights, the engine and its versions, the dtype,
and the request itself. A line is written and flushed when its block is done; one that a kill cut
short, or that is damaged, is asked for again. Blocks are cut from all requests, answered or not, so
that a resumed evaluation computes the same batches as one that was never stopped.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class CachedLM(LM):
    """lm-eval's LM that asks `make()` (called at the first request) for what the file lacks."""

    def __init__(
        self,
        make: Callable[[], LM],
        path: Path,
        identity: Mapping[str, Any],
        block: int,
        progress: Callable[[str, int], Any],
    ):
        """progress(method, requests) -> an object whose add(rows, tokens) counts answers."""
        super().__init__()
        self._make, self._path, self._block, self._progress = make, path, block, progress
        self._identity = json.dumps(identity, sort_keys=True)
        self._lm: LM | None = None
        self._known = _read(path)
        self.computed = 0

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(score), bool(best)) for score, best in self._all("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._all("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._all("generate_until", requests)

    def _all(self, method: str, requests: Sequence[Instance]) -> list[Any]:
        """Answers in the order of the requests, computed in blocks of similar ones."""
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            text = json.dumps([method, request.args], sort_keys=True)
            # A request that is repeated is sampled anew each time.
            keys.append(_sha256(f"{self._identity}\n{text}\n{seen[text]}"))
            seen[text] += 1
        order = sorted(range(len(requests)), key=lambda i: (_similar(requests[i].args), keys[i]))
        missing = sum(key not in self._known for key in keys)
        progress = self._progress(method, missing)
        for start in range(0, len(order), self._block):
            block = [i for i in order[start : start + self._block] if keys[i] not in self._known]
            if block:
                answers = self._answer(method, [requests[i] for i in block])
                self._append([keys[i] for i in block], answers)
                progress.add(len(block), 0)
        return [self._known[key] for key in keys]

    def _answer(self, method: str, requests: list[Instance]) -> list[Any]:
        if self._lm is None:
            self._lm = self._make()
        self.computed += len(requests)
        return getattr(self._lm, method)(requests, disable_tqdm=True)

    def _append(self, keys: list[str], answers: list[Any]) -> None:
        try:
            line = json.dumps({"keys": keys, "answers": answers}, allow_nan=False)
        except ValueError as error:
            raise ValueError(
                "the model gives a loglikelihood that is not finite: are its weights?"
            ) from error
        with self._path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known.update(zip(keys, json.loads(line)["answers"], strict=True))


def _similar(args: Sequence[Any]) -> tuple[str, int, str]:
    """Equal settings together, the longest first, and what shares a context side by side."""
    settings = json.dumps(args[1], sort_keys=True) if isinstance(args[-1], Mapping) else ""
    return settings, -len(args[0]), args[0]


def _read(path: Path) -> dict[str, Any]:
    """{key: answer} of a file; a last line that was cut short is cut off the file too."""
    known: dict[str, Any] = {}
    if not path.is_file():
        return known
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            known.update(zip(row["keys"], row["answers"], strict=True))
        except (ValueError, TypeError, KeyError):
            print(f"{path}, line {number}: damaged, asked for again", file=sys.stderr, flush=True)
    return known


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
