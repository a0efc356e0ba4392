"""`memphis data show`: what a reader sees of an example, in colour and without."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from memphis_jax.data import procedural
from memphis_jax.data.prepare import data
from memphis_jax.data.prompts import Example, load_tokenizer
from memphis_jax.data.show import render, show
from memphis_jax.rounds.files import read_jsonl, write_jsonl

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    phase = dict(epochs=1, batch_size=2, seq_len=128, optimizer=dict())
    return ConfigDict(dict(sft=phase, rank=phase, data={data!r}))
"""
TALK = [
    {"role": "user", "content": "Hello [bold]there[/bold] \x1b[31m"},
    {"role": "assistant", "content": "Hi 🙂\nשלום"},  # noqa: RUF001
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<|endoftext|>"},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show")
    row = {"prompt": "1 + 1?", "rationale": "1 + 1 = 2.", "target": "2", "source": "sums"}
    write_jsonl(root / "cot.jsonl", [row, {**row, "target": "3"}])
    write_jsonl(root / "chat.jsonl", [{"messages": TALK}])
    procedural.save_tokenizer(procedural.train_tokenizer(["a"], 300), root / "tokenizer")
    mixture = {
        "mine": {
            "path": str(root / "cot.jsonl"),
            "template": "cot",
            "columns": {name: name for name in row},
        },
        "talk": {
            "path": str(root / "chat.jsonl"),
            "template": "chat",
            "columns": {"messages": "messages"},
        },
    }
    settings = {"source": "mixture", "tokenizer": str(root / "tokenizer"), "mixture": mixture}
    (root / "config.py").write_text(CONFIG.format(data=settings))
    data(["--config", str(root / "config.py"), "--out", str(root / "data")])
    return root / "data"


def printed(folder: Path, number: int, colour: bool) -> str:
    options = {"force_terminal": True, "color_system": "standard"} if colour else {}
    console = Console(file=io.StringIO(), width=40, **options)  # type: ignore[arg-type]
    show(folder, number, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_without_colour_brackets_hold_what_is_trained(built: Path) -> None:
    assert printed(built, 1, colour=False) == (
        "example 1 of 3: mine, source sums, {} tokens, {} trained\n"
        "### User:\n1 + 1?\n### Rationale:\n"
        "⟦1 + 1 = 2.\n### Answer:\n3<|endoftext|>⟧\n"
    ).format(*lengths(built))


def lengths(built: Path) -> tuple[int, int]:
    """Tokens and trained ones of the CoT row with target 3, from its text."""
    tokenizer, _ = load_tokenizer(built / "tokenizer")
    prompt = tokenizer.encode("### User:\n1 + 1?\n### Rationale:\n").ids
    answer = tokenizer.encode("1 + 1 = 2.\n### Answer:\n3").ids
    return len(prompt) + len(answer) + 1, len(answer) + 1


def test_every_turn_is_shown_and_text_cannot_act_on_the_terminal(built: Path) -> None:
    """Neither markup, nor an escape, nor a spelled-out EOS is taken for the real thing."""
    head, text = printed(built, 2, colour=False).split("\n", 1)
    assert head.startswith("example 2 of 3: talk, source talk, ")
    assert text == (
        "### User:\nHello [bold]there[/bold] \\x1b[31m\n### Assistant:\n"
        "⟦Hi 🙂\nשלום<|endoftext|>⟧"  # noqa: RUF001
        "\n### User:\nBye\n### Assistant:\n"
        "⟦<|endoftext|><|endoftext|>⟧\n"
    )


def test_in_colour_the_trained_tokens_are_green_and_eos_is_inverted(built: Path) -> None:
    text = printed(built, 1, colour=True)
    assert "⟦" not in text
    assert "\x1b[2m### User:" in text
    assert "\x1b[32m1 + 1 = 2." in text
    assert "\x1b[7;32m<|endoftext|>\x1b[0m" in text
    assert "\x1b[7;32m<|endoftext|>" in printed(built, 2, colour=True)
    assert "\x1b[32m<|endoftext|>" in printed(built, 2, colour=True)  # the one that was text


def test_an_untrained_eos_stays_outside(built: Path) -> None:
    tokenizer, eos_id = load_tokenizer(built / "tokenizer")
    tokens = [*tokenizer.encode("ab").ids, eos_id]
    example = Example(np.array(tokens, np.int32), np.array([False, True, False]))
    assert render(example, tokenizer, eos_id, colour=False).plain == "a⟦b⟧<|endoftext|>"


def test_a_number_that_is_not_there_names_those_that_are(built: Path) -> None:
    for number in (3, -1):
        with pytest.raises(ValueError, match=f"no example {number}: they are 0 to 2"):
            show(built, number, Console(file=io.StringIO()))


@pytest.mark.slow
def test_the_command_prints_to_a_pipe(built: Path) -> None:
    words = [sys.executable, "-m", "memphis_jax", "data", "show", str(built)]
    done = subprocess.run([*words, "0"], capture_output=True, text=True, check=True)
    assert f"{read_jsonl(built / 'train.jsonl')[0]['target']}<|endoftext|>⟧" in done.stdout
    missing = subprocess.run([*words, "9"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr.strip().endswith("has no example 9: they are 0 to 2")
