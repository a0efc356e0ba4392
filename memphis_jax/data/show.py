"""`memphis data show DIR N`: one example as the model sees it, and what is trained. No jax."""

import argparse
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from memphis_jax.data.examples import open_built
from memphis_jax.data.prompts import Example, load_tokenizer

OPEN, CLOSE = "⟦", "⟧"
# Controls of a terminal, and marks that turn the direction of what follows.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="memphis data show",
        description="Print an example of a built folder: what is trained on is green, or inside "
        f"{OPEN}{CLOSE} where there is no colour.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="as `memphis data` wrote it")
    parser.add_argument("number", type=int, metavar="N", help="of the example, from 0")
    args = parser.parse_args(argv)
    show(args.folder, args.number, Console())


def show(folder: Path, number: int, console: Console) -> None:
    """Prints example `number`: its data set, its source, its lengths, and its text.

    Raises ValueError where there is no such example.
    """
    examples, manifest = open_built(folder)
    if not 0 <= number < len(examples):
        raise ValueError(f"{folder} has no example {number}: they are 0 to {len(examples) - 1}")
    ends = np.cumsum([record["examples"] for record in manifest["data_sets"].values()])
    data_set = [*manifest["data_sets"]][np.searchsorted(ends, number, side="right")]
    example = examples[number]
    head = (
        f"example {number} of {len(examples)}: {data_set}, source {examples.source(number)}, "
        f"{len(example.tokens)} tokens, {int(example.loss_mask.sum())} trained"
    )
    tokenizer, eos_id = load_tokenizer(folder / "tokenizer")
    console.print(Text(_printable(head), "bold"), soft_wrap=True)
    colour = console.color_system is not None
    console.print(render(example, tokenizer, eos_id, colour), soft_wrap=True)


def render(example: Example, tokenizer: Tokenizer, eos_id: int, colour: bool) -> Text:
    """The decoded tokens: trained ones green or in brackets, EOS as its own text, inverted.

    Characters that would act on the terminal are spelled out, such as \\x1b.
    """
    text = Text()
    pairs = zip(example.loss_mask.tolist(), example.tokens.tolist(), strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[0]):
        style = "green" if trained else "dim"
        text.append("" if colour or not trained else OPEN)
        for is_eos, tokens in groupby((token for _, token in run), key=lambda t: t == eos_id):
            decoded = tokenizer.decode([*tokens], skip_special_tokens=False)
            text.append(_printable(decoded), f"{style} reverse" if is_eos else style)
        text.append("" if colour or not trained else CLOSE)
    return text


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)
