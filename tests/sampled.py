"""A small tokenizer, questions and checkpoints for the tests of sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from helpers import tiny_model
from tokenizers import Tokenizer

from memphis_jax import checkpoint
from memphis_jax.data import procedural
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.model import StableLM, flatten, unflatten
from memphis_jax.rounds.files import write_jsonl

VOCAB = 320
CONTEXT = 96
TEXTS = [
    *("### User:", "### Rationale:", "### Answer:"),
    *("Tom has 3 apples and 12 pears.", "so 12.\n### User:"),
]


def save_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """Every byte, and the headers of the templates as one token each."""
    procedural.save_tokenizer(procedural.train_tokenizer(TEXTS * 9, VOCAB), folder)
    return load_tokenizer(folder)


def save_checkpoint(folder: Path, model: StableLM) -> Path:
    """What `memphis train` leaves, without its train state."""
    with checkpoint.open_manager(folder, keep=1) as manager:
        checkpoint.save(manager, 0, model, {})
        manager.wait_until_finished()
    save_tokenizer(folder / "tokenizer")
    return folder


def small_model(seed: int = 0, **options: Any) -> StableLM:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    return tiny_model(seed, **{**sizes, "qk_layernorm": False, **options})


def chain_model(following: Mapping[int, int]) -> StableLM:
    """A model that puts after each token the one that `following` names, and nothing else."""
    model = small_model(hidden_size=VOCAB, num_hidden_layers=1)
    leaves = {
        name: jnp.ones_like(leaf) if name.endswith("scale") else jnp.zeros_like(leaf)
        for name, leaf in flatten(model).items()
    }
    leaves["embed_tokens"] = jnp.eye(VOCAB)
    arrows = jnp.asarray(list(following.items()))
    leaves["lm_head/kernel"] = jnp.zeros((VOCAB, VOCAB)).at[arrows[:, 0], arrows[:, 1]].set(1)
    return unflatten(model.config, leaves)


def write_questions(path: Path, number: int, **changed: str) -> Path:
    """`number` questions q0, q1, ...; `changed` gives some of them another prompt."""
    prompts = {f"q{i}": f"Tom has {i} apples and {'1' * (i % 7)} pears." for i in range(number)}
    rows = [{"id": name, "prompt": text} for name, text in (prompts | changed).items()]
    write_jsonl(path, rows)
    return path
