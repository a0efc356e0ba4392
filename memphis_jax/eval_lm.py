"""lm-eval's `LM` on JAX: the same requests, tokens, truncation and stops as its `hf` engine.

Continuations of one context are scored in one pass (`eval_score`); generation is the KV-cache
sampler's, greedy. Lengths are padded to a few sizes, so that few shapes are compiled. The batch is
split over the mesh's devices; `place_model` puts the weights on all of them.

What differs from `hf`: a text ends at the first stop however requests are batched (hf at batch
sizes above 1 decodes on until all rows are done, then cuts; that is the same text unless stop
strings overlap), an empty stop string means nothing (hf stops after one token), and requests that
sample are refused.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from memphis_jax import sampler
from memphis_jax.eval_score import SCORED_CHUNK, Row, lay_out, pack, score
from memphis_jax.model import StableLM

SHORTEST = 32  # the smallest padded length
ROW_TOKENS = 8192  # scored at once per device
MAX_GEN_TOKS = 256  # of lm-eval's hf engine, for tasks that do not say

Pair = tuple[Any, list[int], list[int]]  # (lm-eval's key, context, continuation)


def make_mesh() -> Mesh:
    """All devices of this host on one axis, which splits the batch."""
    return jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))


def place_model(model: StableLM, mesh: Mesh) -> StableLM:
    """The weights on every device of the mesh."""
    return jax.device_put(model, NamedSharding(mesh, PartitionSpec()))


def padded(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, ... that holds `length` tokens."""
    size = SHORTEST
    while size < length:
        size *= 2
    return size * 3 // 4 if length <= size * 3 // 4 and size > SHORTEST else size


class JaxLM(TemplateLM):
    """A StableLM as lm-eval asks for it.

    Args:
      tokenizer: transformers' own, as the hf engine loads it.
      dtype: of compute; logits and logprobs are float32.
      batch_size: rows decoded at once, rounded up to a multiple of the devices.
    """

    backend = "causal"

    def __init__(
        self,
        model: StableLM,
        tokenizer: Any,
        *,
        dtype: str,
        batch_size: int,
        mesh: Mesh | None = None,
    ):
        super().__init__()
        self.mesh = mesh or make_mesh()
        self.model, self.tokenizer, self.dtype = place_model(model, self.mesh), tokenizer, dtype
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begins = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is None and begins:
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of logprobs, whether each token is the most probable) of every continuation."""
        rows = pack(
            [(context, continuation) for _, context, continuation in requests], self.max_length
        )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for length, batch in self._batches(rows):
            arrays, owners = lay_out(batch, length, self._rows(length))
            logprobs, best = self._score(*arrays)
            for owner in np.unique(owners):
                mine = owners == owner
                found[owner] = (float(logprobs[mine].sum(dtype=np.float64)), bool(best[mine].all()))
        return found

    def _rows(self, length: int) -> int:
        """Rows of this length that are scored at once."""
        return max(1, ROW_TOKENS // length) * self.mesh.size

    def _batches(self, rows: Sequence[Row]) -> Iterable[tuple[int, list[Row]]]:
        """(padded length, rows) with the longest first."""
        waiting = sorted(rows, key=lambda row: -row.length)
        while waiting:
            length = padded(waiting[0].length)
            batch = [row for row in waiting[: self._rows(length)] if padded(row.length) == length]
            waiting = waiting[len(batch) :]
            yield length, batch

    def _score(self, batch: dict[str, np.ndarray], targets: np.ndarray, at: np.ndarray) -> Any:
        spread = self._spread(batch)
        number = len(at)
        size = SCORED_CHUNK
        while size < number:
            size *= 2
        targets, at = (np.pad(array, (0, size - number)) for array in (targets, at))
        logprobs, best = score(self.model, **spread, targets=targets, at=at, dtype=self.dtype)
        return np.asarray(logprobs)[:number], np.asarray(best)[:number]

    def _spread(self, batch: Any) -> Any:
        """The batch with its rows split over the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            contexts = [requests[i].args[0] for i in members]
            for number, text in zip(members, self._generate(contexts, settings), strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        until = handle_stop_sequences(
            options.pop("until", None), self.tokenizer.decode(self.eot_token_id)
        )
        new = options.pop("max_gen_toks")
        if options.pop("do_sample") or options.pop("temperature", 0.0) or options:
            raise ValueError(
                f"generation_kwargs {settings}: --engine jax decodes greedily and knows only "
                "until, max_gen_toks, do_sample: false and temperature: 0; use --engine hf or vllm"
            )
        room = self.max_length - new
        if room <= 0:
            raise ValueError(
                f"max_gen_toks {new} leaves no room for a prompt in the model's "
                f"max_position_embeddings {self.max_length}: leave out the tasks that generate "
                "(multiple choice needs no room), or take a model with a longer context"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        stops = [stop for stop in until if stop]
        done = sampler.sample(
            self.model,
            prompts,
            np.zeros((len(prompts), 2), np.uint32),
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=new,
            eos_id=self.eot_token_id,
            batch_size=min(self.batch_size, self._least_batch(len(prompts))),
            stops=partial(self._stopped, stops),
            dtype=self.dtype,
            pad=padded,
            spread=self._spread,
        )
        return [self._text(completion.tokens, stops) for completion in done]

    def _least_batch(self, number: int) -> int:
        """A power of two times the devices that holds `number` rows: few shapes, little padding."""
        return self.mesh.size * 2 ** max(0, -(-number // self.mesh.size) - 1).bit_length()

    def _stopped(self, stops: Sequence[str], tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """The text before the first stop. The sampler looks for stops every few tokens only."""
        if self._stopped(stops, tokens):
            while self._stopped(stops, tokens[:-1]):
                tokens = tokens[:-1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
