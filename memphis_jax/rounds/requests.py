"""What the worker asks an engine for, and what it gets back. No jax, no vLLM."""

from typing import Any, NamedTuple


class Request(NamedTuple):
    """One completion to sample."""

    id: str
    sample: int
    prompt: list[int]
    seed: int
    logprobs: bool  # whether each new token's logprob is wanted


class Output(NamedTuple):
    tokens: list[int]  # as sampled, EOS included
    logprobs: list[float]  # of each, untempered; empty where not wanted
    finish_reason: str  # "stop" (EOS or stop text) or "length"


# Every other field that shapes a distribution, at the value that leaves it alone.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": False,
    "include_stop_str_in_output": False,
}
