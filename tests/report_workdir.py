"""A made-up workdir of a run, for the tests of its report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from memphis_jax.rounds.audit import audit

HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
VERSIONS = {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"}
EVALS = [  # validation greedy, sampled, test greedy, sampled
    (0.544, 0.471, 0.530, 0.462),
    (0.612, 0.530, 0.601, 0.524),
    (0.668, 0.571, 0.652, 0.566),
    (0.704, 0.590, 0.694, 0.583),
    (0.721, 0.602, 0.715, 0.597),
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def record(folder: Path, stage: str, minute: int, seconds: float, note: str = "") -> None:
    record = {
        "stage": stage,
        "command": ["python", "-m", "memphis_jax.train", "--config", "configs/tiny.py", stage],
        "exit_code": 0,
        "started": f"2024-02-03T10:{minute:02d}:00+00:00",
        "seconds": seconds,
        "config_sha256": "c0ffee" + "0" * 58,
        "inputs": {"data/train.jsonl": "1" * 64},
        "outputs": {f"{stage}/out": "2" * 64},
        "versions": VERSIONS,
        "host": "box7",
        "note": note,
    }
    write(folder / "ledger" / f"{stage}.json", record)


def metrics(rng: random.Random, steps: int, every: int, peak: float, rank: bool) -> list[dict]:
    rows = []
    for step in range(every, steps + 1, every):
        done = step / steps
        loss = 0.45 + 2.5 * math.exp(-6 * done) + rng.gauss(0, 0.02)
        row = {
            "step": step,
            "loss": loss,
            "ce": loss + 0.15,
            "learning_rate": peak * min(1, done / 0.1) * (1 + math.cos(math.pi * done)) / 2,
            "grad_norm": 0.8 + math.exp(-8 * done) * 4 + abs(rng.gauss(0, 0.1)),
            "tokens_per_second": 21000 + rng.gauss(0, 300),
            "padding_share": 0.031,
            "skipped_steps": 0,
            "epoch": 2 * done,
        }
        if rank:
            row |= {"ce": 0.42 + rng.gauss(0, 0.01), "rank_loss": 0.66 - 0.05 * done}
            row |= {"loss": row["ce"] + 5 * row["rank_loss"]}
            row |= {"chosen_logprob": -0.2 - 0.02 * done, "rejected_logprob": -0.25 - 0.14 * done}
            row |= {"rank_margin": row["chosen_logprob"] - row["rejected_logprob"]}
        rows.append(row)
    return rows


def make_round(folder: Path, number: int, rng: random.Random, pairs: int) -> None:
    here = folder / f"round{number}"
    rationale = "Mia has 7 shells. She finds 5 more. 7 + 5 = 12. Then the number doubles. 12 * 2 = "
    texts = {
        "chosen": f"{rationale}24\n### Answer:\n24",
        "rejected": f"{rationale}22\n### Answer:\n22",
    }
    prompt = "Mia has {} shells. She finds 5 more. Then the number doubles. How many now?"
    rows = [
        {"id": f"q{number}-{i}", "prompt": prompt.format(i), **texts, "gold": texts["chosen"]}
        for i in range(pairs)
    ]
    rows[1] |= {"chosen": HOSTILE, "prompt": "Grün & “zwölf” \u2028 \ud800"}
    write_lines(here / "pairs.jsonl", rows)
    graded = [
        {
            "id": f"q{i}",
            "sample": 0,
            "text": "…",
            "finish_reason": "length" if i % 50 == 0 else "stop",
            "num_tokens": max(4, int(rng.gauss(44 + 3 * number, 14))),
            "verdict": "correct",
        }
        for i in range(800)
    ]
    write_lines(here / "graded.jsonl", [{"meta": {"engine": "jax"}}, *graded])
    write(here / "graded.audit.json", audit_of(number))
    mixed = 300 - 20 * number
    stats = {"questions": 500, "all_correct": 490 - mixed - 63, "mixed": mixed, "all_wrong": 63}
    verdicts = {"correct": 2000 + 100 * number, "incorrect": 1700 - 100 * number}
    stats |= {"no_valid": 10, "pairs": pairs, "duplicates": 1234}
    write(here / "pairs.json", stats | {"verdicts": verdicts | {"invalid": 260, "unknown": 40}})
    write_lines(here / "rank" / "metrics.jsonl", metrics(rng, 60, 2, 3e-6, rank=True))


def audit_of(number: int) -> dict[str, Any]:
    """What `memphis grade` writes: one source with every count, and hostile or long samples."""
    questions = {
        "q1": {"prompt": HOSTILE, "target": "24", "source": "sums"},
        "q2": {"prompt": "p" * 1000, "target": "<b>", "source": ""},
    }
    row = {"sample": 3, "finish_reason": "stop", "rationale": "", "answer": "", "reason": ""}
    answer = row | {"id": "q1", "text": f"{HOSTILE}\n### Answer:\n24", "answer": "24"}
    long = row | {"id": "q2", "text": "begin" + "x" * 990 + "the end"}
    graded = [answer | {"verdict": "correct", "rationale": str(i % 30)} for i in range(40 + number)]
    graded += [answer | {"verdict": "unknown", "reason": "time-out"}]
    graded += [long | {"verdict": "invalid", "reason": "no answer header"}] * 3
    graded += [long | {"verdict": "invalid", "reason": "truncated", "finish_reason": "length"}]
    return audit(graded, questions)


def make_workdir(folder: Path, rounds: int = 4, pairs: int = 700) -> Path:
    """A finished run with made-up numbers."""
    rng = random.Random(0)
    model = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    generate = {"num_samples": 8, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 160}
    config = {"seed": 17, "model": model, "generate": generate, "rounds": {"num_rounds": rounds}}
    config |= {"start": {"hf_folder": ""}, "data": {"source": "procedural"}}
    write(folder / "config.json", config | {"sft": {"optimizer": {"learning_rate": 0.0005}}})
    (folder / "sft" / "hf").mkdir(parents=True)
    save_file({"a": np.zeros((3, 1000), np.float32)}, folder / "sft" / "hf" / "model.safetensors")
    write_lines(folder / "sft" / "metrics.jsonl", metrics(rng, 1200, 10, 5e-4, rank=False))
    stages = ["data", "sft", "sft-export", "sft-eval-greedy", "sft-eval-sampled", "sft-accuracy"]
    for r in range(1, rounds + 1):
        make_round(folder, r, rng, pairs)
        parts = ("generate", "grade", "pairs", "rank", "export", "eval-greedy", "eval-sampled")
        stages += [f"round{r}-{part}" for part in (*parts, "accuracy")]
    for minute, stage in enumerate(stages):
        slow = {"sft": 151.0, "generate": 14.2, "rank": 11.0}.get(stage.split("-")[-1], 3.25)
        record(folder, stage, minute, slow)
    for r, values in enumerate(EVALS[: rounds + 1]):
        names = ("validation_greedy", "validation_sampled", "test_greedy", "test_sampled")
        row = dict(zip(names, values, strict=True)) | {"validation_questions": 500}
        row |= {"test_questions": 1000, "valid_share": 0.985, "mean_tokens": 47.3}
        name = f"round{r}.json" if r else "sft.json"
        write(folder / "eval" / name, row | {"truncated_share": 0.004})
    write(folder / "results.json", {"sft": {}, "rounds": [], "seconds": 400.0, "seed": 17})
    return folder
