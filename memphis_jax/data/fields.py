"""What the fields of a row must be, and the items they become. No jax.

Sits below `recipes.py`. A row that cannot be used raises `Drop`, whose message is the reason that
is counted. Imports `sources.Row` only.
"""

import math
from typing import Any

from memphis_jax.data.sources import Row

Item = dict[str, Any]  # {prompt, rationale, target, source} of "cot", {messages, source} of "chat"


class Drop(Exception):
    """A row that cannot be used; the message is the reason."""


def clean(column: str, value: Any) -> str:
    """Text without outer whitespace and with "\\n" for every line end; "" for null.

    Raises Drop for what is not text, or cannot be written as UTF-8.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Drop(f"{column} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        raise Drop(f"{column} is not valid Unicode") from None
    return value.replace("\r\n", "\n").replace("\r", "\n").strip()


def filled(row: Row, column: str) -> str:
    """The clean text of a column. Raises Drop where there is none, or as `clean` does."""
    text = clean(column, row[column])
    if not text:
        raise Drop(f"empty {column}")
    return text


def posted(column: str, text: str) -> str:
    """The text of a Reddit post or comment. Raises Drop where its author or a moderator took it."""
    if text in ("[deleted]", "[removed]"):
        raise Drop(f"{column} was deleted")
    return text


def require_at_least(row: Row, column: str, lowest: float) -> None:
    """Raises Drop unless the column holds a number, or spells one, of `lowest` or more."""
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Drop(f"empty {column}")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # the last: an integer of 400 digits
        number = math.nan
    if math.isnan(number):
        raise Drop(f"{column} is not a number")
    if number < lowest:
        raise Drop(f"{column} below {lowest:g}")


def exchange(question: str, reply: str) -> Item:
    """A conversation of one question and one reply."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    }


def conversation(row: Row, column: str) -> Item:
    """A conversation of a list of {role, content}.

    Raises Drop unless the turns are user, assistant, user, assistant, ..., each with text.
    """
    turns = row[column]
    if turns is None or turns == []:
        raise Drop(f"empty {column}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Drop(f"{column} is not a list of turns")
    messages = [
        {"role": turn.get("role"), "content": clean("a turn", turn.get("content"))}
        for turn in turns
    ]
    if not all(message["content"] for message in messages):
        raise Drop("empty turn")
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise Drop("roles do not alternate user, assistant and end with assistant")
    return {"messages": messages}
