"""Our engine for lm-eval against lm-eval's own `hf` engine on the same float32 weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import sampled
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from reference_models import make_hf, rewrite
from transformers import AutoTokenizer

from convert.from_hf import load_hf
from memphis_jax.eval_lm import JaxLM, padded
from memphis_jax.eval_score import Row, lay_out, pack

CONTEXT = 96
NATS_PER_TOKEN = 1e-4


class Engines(NamedTuple):
    jax: JaxLM
    hf: HFLM


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("eval") / "hf"
    make_hf(
        folder, vocab_size=sampled.VOCAB, max_position_embeddings=CONTEXT, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    sampled.save_tokenizer(folder.with_name("tokenizer"))
    for file in folder.with_name("tokenizer").iterdir():
        file.rename(folder / file.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [i for i in range(sampled.VOCAB) if tokenizer.decode([i]).isascii()]

    def write_plainly(tensors: dict[str, np.ndarray]) -> None:
        """What is no character, such as half of one, gets half the logit of what is."""
        head = tensors["lm_head.weight"]
        for i in set(range(sampled.VOCAB)) - set(plain):
            head[i] = 0.5 * head[plain[i % len(plain)]]

    rewrite(folder, write_plainly)
    ours = JaxLM(load_hf(folder), tokenizer, dtype="float32", batch_size=8)
    assert ours.mesh.size == 8  # conftest: eight devices, over which every batch is split
    return Engines(ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4))


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, doc={}, arguments=a, idx=0) for a in arguments]


def texts(number: int, longest: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = list("abcdefgh 0123456789.,\né→")
    return ["".join(rng.choice(letters, rng.integers(1, longest))) for _ in range(number)]


@pytest.mark.slow
def test_loglikelihoods_equal_those_of_hf(engines: Engines) -> None:
    contexts = ["", "Tom has", "Tom has ", "<|endoftext|>Tom", *texts(6, 40), *texts(4, 400)]
    endings = [" 3", "apples and 12 pears.", *texts(3, 30, seed=1), texts(1, 90, seed=2)[0][:40]]
    pairs = [(c, e) for c in contexts for e in endings]
    # One merged into the context's last token leaves nothing to score: hf fails there too.
    pairs = [(c, e) for c, e in pairs if not c or engines.jax._encode_pair(c, e)[1]]
    theirs = engines.hf.loglikelihood(requests("loglikelihood", pairs))
    ours = engines.jax.loglikelihood(requests("loglikelihood", pairs))
    lengths = [len(engines.jax.tok_encode(e)) for _, e in pairs]
    for pair, length, (score, best), (wanted, is_best) in zip(
        pairs, lengths, ours, theirs, strict=True
    ):
        assert abs(score - wanted) <= NATS_PER_TOKEN * max(1, length), pair
        assert best == is_best, pair
    assert not all(best for _, best in ours)
    cut = [c for c in contexts if len(engines.jax.tok_encode(c)) > CONTEXT]
    assert len(cut) >= 2  # contexts that lose their start


@pytest.mark.slow
def test_what_is_written_greedily_is_the_most_likely(engines: Engines) -> None:
    """As tokens: a random model's survive no decoding."""
    asked = []
    for context in texts(8, 40, seed=9):
        ids = engines.jax.tok_encode(context)
        new = engines.hf.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
        asked.append(((context, ""), ids, new[0, len(ids) :].tolist()))
    theirs = engines.hf._loglikelihood_tokens(asked)
    ours = engines.jax._loglikelihood_tokens(asked)
    assert [best for _, best in ours] == [best for _, best in theirs] == [True] * 8
    assert np.allclose([s for s, _ in ours], [s for s, _ in theirs], atol=3 * NATS_PER_TOKEN)


@pytest.mark.slow
def test_rolling_loglikelihoods_equal_those_of_hf(engines: Engines) -> None:
    documents = [(text,) for text in [*texts(4, 60, seed=3), *texts(3, 600, seed=4)]]
    theirs = engines.hf.loglikelihood_rolling(requests("loglikelihood_rolling", documents))
    ours = engines.jax.loglikelihood_rolling(requests("loglikelihood_rolling", documents))
    lengths = [len(engines.jax.tok_encode(text)) for (text,) in documents]
    assert max(lengths) > 2 * CONTEXT  # three windows at least
    for length, score, wanted in zip(lengths, ours, theirs, strict=True):
        assert abs(score - wanted) <= NATS_PER_TOKEN * length


@pytest.mark.slow
def test_greedy_texts_equal_those_of_hf_with_every_kind_of_stop(engines: Engines) -> None:
    """Stops are taken from what the model writes: inside a token, over borders, never met."""
    contexts = [*texts(5, 40, seed=5), *texts(2, 300, seed=6)]
    free = engines.hf.generate_until(
        requests("generate_until", [(c, {"until": [], "max_gen_toks": 24}) for c in contexts])
    )
    asked = []
    for context, text in zip(contexts, free, strict=True):
        for start, length in ((1, 1), (3, 2), (len(text) // 2, 7)):
            stops = [text[start : start + length], "\n\n\n"]
            asked.append((context, {"until": stops, "max_gen_toks": 24, "do_sample": False}))
    asked += [(c, {"until": "q", "max_gen_toks": 40, "temperature": 0.0}) for c in contexts]
    theirs = engines.hf.generate_until(requests("generate_until", asked))
    ours = engines.jax.generate_until(requests("generate_until", asked))
    assert ours == theirs
    cut = [text != whole for text, whole in zip(ours, np.repeat(free, 3), strict=False)]
    assert sum(cut) > 15


@pytest.mark.slow
def test_a_text_ends_with_eos_and_before_a_stop_over_two_tokens() -> None:
    """A model that writes a, b, c, d, then EOS: what comes out is worked by hand."""
    tokenizer = _tokenizer_of_bytes()
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    lm = JaxLM(
        sampled.chain_model({a: b, b: c, c: d, d: 0}), tokenizer, dtype="float32", batch_size=8
    )

    def write(*until: str, new: int = 8) -> str:
        settings = {"until": list(until), "max_gen_toks": new}
        return lm.generate_until(requests("generate_until", [("a", settings)]))[0]

    assert write() == "bcd"
    assert write(new=2) == "bc"
    assert write("cd") == "b"
    assert write("d", "bc") == ""  # the first to be complete, not the first in the list
    assert write("x", "d") == "bc"


def _tokenizer_of_bytes() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sampled.save_tokenizer(Path(folder) / "t")
        return AutoTokenizer.from_pretrained(Path(folder) / "t")


@pytest.mark.slow
def test_what_else_is_asked_changes_no_answer(engines: Engines) -> None:
    pairs = [(c, e) for c in texts(5, 60, seed=7) for e in (" 3", " no, 12")]
    together = engines.jax.loglikelihood(requests("loglikelihood", pairs))
    alone = [engines.jax.loglikelihood(requests("loglikelihood", [p]))[0] for p in pairs]
    assert np.allclose([s for s, _ in together], [s for s, _ in alone], atol=1e-5)
    settings = {"until": ["."], "max_gen_toks": 20}
    asked = [(c, settings) for c in texts(11, 60, seed=8)]
    written = engines.jax.generate_until(requests("generate_until", asked))
    for pair, text in zip(asked, written, strict=True):
        assert engines.jax.generate_until(requests("generate_until", [pair])) == [text]


def test_two_continuations_share_a_row() -> None:
    rows = pack([([7, 8], [1, 2, 3]), ([9], [4]), ([7, 8], [5, 6])], max_length=10)
    assert rows == [Row((7, 8), [(0, [1, 2, 3]), (2, [5, 6])]), Row((9,), [(1, [4])])]
    (inputs, targets, at), owners = lay_out(rows, length=6, count=2)
    assert inputs["tokens"].tolist() == [[7, 8, 1, 2, 5, 0], [9, 0, 0, 0, 0, 0]]
    assert inputs["positions"].tolist() == [[0, 1, 2, 3, 2, 0], [0] * 6]
    assert inputs["segments"].tolist() == [[0, 0, 1, 1, 2, -1], [0, -1, -1, -1, -1, -1]]
    assert targets.tolist() == [1, 2, 3, 5, 6, 4]
    assert at.tolist() == [1, 2, 3, 1, 4, 6]  # the context's end predicts both first tokens
    assert owners.tolist() == [0, 0, 0, 2, 2, 1]


def test_a_full_row_is_followed_by_another_and_long_contexts_lose_their_start() -> None:
    rows = pack([([1, 2], [3, 4, 5]), ([1, 2], [6, 7])], max_length=4)
    assert [row.length for row in rows] == [4, 3]
    assert pack([([1, 2, 3, 4, 5], [6, 7])], max_length=4) == [Row((3, 4, 5), [(0, [6, 7])])]
    with pytest.raises(ValueError, match="continuation of 5 tokens"):
        pack([([1], [1] * 5)], max_length=4)
    with pytest.raises(ValueError, match="continuation of 0 tokens"):
        pack([([1], [])], max_length=4)


def test_lengths_are_padded_to_few_sizes() -> None:
    wanted = {1: 32, 32: 32, 33: 48, 48: 48, 49: 64, 65: 96, 97: 128, 1500: 1536, 2049: 3072}
    assert {length: padded(length) for length in wanted} == wanted
    assert len({padded(length) for length in range(1, 4097)}) == 15


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_sample": True, "temperature": 0.7}, "decodes greedily"),
        ({"until": ["x"], "top_k": 5}, "'top_k': 5"),
        ({"max_gen_toks": CONTEXT}, f"max_gen_toks {CONTEXT} leaves no room"),
        ({"max_gen_toks": CONTEXT}, "leave out the tasks that generate"),
    ],
)
def test_what_it_cannot_do_is_refused(engines: Engines, settings: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        engines.jax.generate_until(requests("generate_until", [("a", settings)]))


def test_weights_lie_on_every_device(engines: Engines) -> None:
    for leaf in jax.tree.leaves(engines.jax.model):
        assert len(leaf.sharding.device_set) == 8
