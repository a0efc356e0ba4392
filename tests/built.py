"""Rows to build a data folder from, and the command that builds it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from memphis_jax.data.prepare import data

REPO = Path(__file__).parents[1]
SEQ_LEN = 96
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    phase = dict(epochs=2, batch_size=4, seq_len={seq_len}, optimizer=dict(learning_rate=1e-3))
    return ConfigDict(dict(
        model=dict(
            vocab_size=512, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        ),
        data={data!r}, sft=phase, rank=phase, seed=3,
    ))
"""


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(["seven", "bells", "ring", "twice", "now"], words))


def cot_row(rng: np.random.Generator, number: int, words: int = 8) -> dict[str, str]:
    return {
        "prompt": f"Question {number}: {sentence(rng, words)}?",
        "rationale": sentence(rng, words) + ".",
        "target": str(number % 10),
        "source": f"set{number % 3}",
    }


def chat_row(rng: np.random.Generator, turns: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": sentence(rng, int(rng.integers(1, 9)))}
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
    }


def process(*words: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "memphis_jax", *map(str, words)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    cot = {name: name for name in ("prompt", "rationale", "target", "source")}
    return {
        "source": "mixture",
        "tokenizer": str(world / "tokenizer"),
        "mixture": {
            "mine": {"path": str(world / "cot.jsonl"), "template": "cot", "columns": cot},
            "talk": {
                "path": str(world / "chat.jsonl"),
                "template": "chat",
                "columns": {"messages": "messages"},
            },
        },
        **changes,
    }


def command(world: Path, name: str = "data", seq_len: int = SEQ_LEN, **changes: Any) -> list[str]:
    config = CONFIG.format(data=settings(world, **changes), seq_len=seq_len)
    (world / f"{name}.py").write_text(config)
    return ["--config", str(world / f"{name}.py"), "--out", str(world / name)]


def built(world: Path, name: str = "data", **changes: Any) -> Path:
    data(command(world, name, **changes))
    return world / name


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
