"""The two templates of the Memphis model cards, as text and as tokens with a loss mask.

    CoT   "### User:\\n{prompt}\\n### Rationale:\\n" | "{rationale}\\n### Answer:\\n{target}" EOS
    chat  "### User:\\n{content}\\n### Assistant:\\n" | "{content}" EOS | "\\n### User:\\n..." | ...

The bar marks where pieces are encoded separately: what the sampler is given is, token for token,
what was trained. Loss falls on the response and its EOS. A later chat turn starts with a newline
after the EOS, so that every header stands at the start of a line. Text from outside cannot open a
section (see `neutralise`) nor spell a special token (see `load_tokenizer`). This module imports
nothing of ours and no jax; `memphis_jax.rounds.grade` reads the same format back.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

STOP = "\n### User:"
"""Ends a completion that did not end with EOS: the model began a turn that is not its own."""

_HEADER = re.compile(r"^### (?=(?:User|Assistant|Rationale|Answer):)", re.MULTILINE)


class Example(NamedTuple):
    """One training sequence."""

    tokens: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool: this token is trained (the response and its EOS)


def neutralise(text: str) -> str:
    """Make text from outside unable to open a section.

    Strips outer whitespace and, in each line that starts with one of our headers, writes a second
    space after "###": "###  User:" is no header to the model, the samplers or the grader, and does
    not become one when whitespace is stripped. Applying it twice changes nothing more.
    """
    return _HEADER.sub("###  ", text.strip())


def cot_prompt(prompt: str) -> str:
    """The text that a sampler is given. Raises ValueError if the prompt is empty."""
    return f"### User:\n{_filled('prompt', prompt)}\n### Rationale:\n"


def cot_completion(rationale: str, target: str) -> str:
    """The text that follows `cot_prompt`, without EOS.

    Raises ValueError if the rationale or the target is empty.
    """
    return f"{_filled('rationale', rationale)}\n### Answer:\n{_filled('target', target)}"


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of `cot_prompt(prompt)`."""
    return _ids(tokenizer, cot_prompt(prompt))


def encode_cot(tokenizer: Tokenizer, prompt: str, completion_text: str, eos_id: int) -> Example:
    """One question and its completion (from `cot_completion`); loss on completion and EOS.

    Raises ValueError if the prompt or the completion is empty or no text, or if one contains EOS.
    """
    if not _text("completion", completion_text).strip():
        raise ValueError("the completion is empty: drop the row")
    return _example([(encode_prompt(tokenizer, prompt), _ids(tokenizer, completion_text))], eos_id)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], eos_id: int
) -> Example:
    """A conversation of {role, content} turns; loss on each reply and its EOS.

    Raises ValueError unless the roles are user, assistant, user, assistant, ... (the template has
    no others), for an empty turn, or if a text contains EOS.
    """
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"chat roles are {roles}: they must alternate user, assistant and end with assistant"
        )
    turns = []
    for i in range(0, len(messages), 2):
        question, reply = (
            _filled(f"{m['role']} content", m["content"]) for m in messages[i : i + 2]
        )
        opening = "\n" if i else ""
        turns.append(
            (
                _ids(tokenizer, f"{opening}### User:\n{question}\n### Assistant:\n"),
                _ids(tokenizer, reply),
            )
        )
    return _example(turns, eos_id)


def load_tokenizer(folder: str | Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a Hugging Face folder and the id of its EOS token.

    Reads tokenizer.json, and the EOS token's text from tokenizer_config.json or
    special_tokens_map.json. Special tokens spelled out in a text are encoded as ordinary
    characters; stored truncation and padding are switched off. Raises FileNotFoundError without a
    tokenizer.json; ValueError if it is broken, if no EOS token is named, if the vocabulary lacks
    it, or if ordinary text could still turn into it.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder}: save the tokenizer there in Hugging Face form"
            if folder.is_dir()
            else f"there is no folder {folder}, which should hold the tokenizer (tokenizer.json)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise plain Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eos = _eos_text(folder)
    eos_id = tokenizer.token_to_id(eos)
    if eos_id is None:
        raise ValueError(f"the EOS token {eos!r} named in {folder} is not in {path}")
    if eos_id in _ids(tokenizer, eos):
        raise ValueError(
            f"text that spells {eos!r} becomes the EOS token: mark it special in {path}"
        )
    return tokenizer, eos_id


def _eos_text(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text("utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a JSON object: {error}") from error
        if isinstance(eos, dict):  # an AddedToken written out
            eos = eos.get("content")
        if isinstance(eos, str) and eos:
            return eos
    raise ValueError(
        f'no eos_token in {folder}: add "eos_token": "<|endoftext|>" to tokenizer_config.json'
    )


def _filled(name: str, text: str) -> str:
    """The neutralised text; ValueError where nothing is left, or where it is no text."""
    text = neutralise(_text(name, text))
    if not text:
        raise ValueError(f"the {name} is empty: drop the row")
    return text


def _text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the {name} is not text: drop the row")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and no tokenizer takes
        raise ValueError(f"the {name} is not valid Unicode: drop the row") from None
    return text


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _example(turns: list[tuple[list[int], list[int]]], eos_id: int) -> Example:
    tokens: list[int] = []
    mask: list[bool] = []
    for prompt, response in turns:
        if eos_id in prompt or eos_id in response:
            raise ValueError(
                f"a text contains EOS (id {eos_id}): read the tokenizer with load_tokenizer"
            )
        tokens += [*prompt, *response, eos_id]
        mask += [False] * len(prompt) + [True] * (len(response) + 1)
    return Example(np.array(tokens, np.int32), np.array(mask, bool))
