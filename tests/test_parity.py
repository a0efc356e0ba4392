"""`memphis parity`: its logprobs against an independent computation, and what it refuses."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import save_checkpoint, small_model, write_questions
from scipy.special import log_softmax

from memphis_jax.__main__ import main
from memphis_jax.data.prompts import encode_prompt, load_tokenizer
from memphis_jax.model import StableLM
from memphis_jax.rounds import parity
from memphis_jax.rounds.files import write_jsonl
from memphis_jax.rounds.parity import rescore

Row = dict[str, Any]
NUMBER = 19

LENGTHS = (29, 45, 70)  # of prompt and completion: few, because each is compiled
logits_of = jax.jit(StableLM.logits, static_argnames="dtype")


def all_logprobs(model: StableLM, prompt: list[int], tokens: list[int], dtype: str) -> np.ndarray:
    """[new tokens, V] in float64, of one completion alone."""
    logits = logits_of(model, jnp.asarray([[*prompt, *tokens]]), dtype=dtype)
    return log_softmax(np.asarray(logits, np.float64)[0, len(prompt) - 1 : -1], axis=-1)


class World:
    """A checkpoint, its questions, and completions whose logprobs are right."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, small_model()
        self.checkpoint = save_checkpoint(folder / "checkpoint", self.model)
        self.questions = write_questions(folder / "q.jsonl", NUMBER)
        tokenizer, _ = load_tokenizer(self.checkpoint / "tokenizer")
        texts = [json.loads(line)["prompt"] for line in self.questions.read_text().splitlines()]
        self.prompts = [encode_prompt(tokenizer, text) for text in texts]
        rng = np.random.default_rng(0)
        self.tokens = [
            rng.integers(2, 300, LENGTHS[i % 3] - len(prompt)).tolist()
            for i, prompt in enumerate(self.prompts)
        ]
        self.rows = cache(self._rows)

    def _rows(self, dtype: str = "float32", step: int = 1) -> list[Row]:
        rows = []
        for i in range(0, NUMBER, step):
            prompt, tokens = self.prompts[i], self.tokens[i]
            scores = all_logprobs(self.model, prompt, tokens, dtype)
            right = scores[np.arange(len(tokens)), tokens].tolist()
            rows.append({"id": f"q{i}", "sample": i % 4, "token_ids": tokens, "logprobs": right})
        return rows

    def write(self, rows: list[Row], temperature: float = 1.0) -> Path:
        sampling = {"temperature": temperature}
        meta = {"meta": {"engine": "vllm", "sampling": sampling, "dtype": "float32"}}
        path = self.folder / "completions.jsonl"
        write_jsonl(path, [meta, {"id": "q0", "sample": 9, "text": "not to be rescored"}, *rows])
        return path

    def run(
        self,
        rows: list[Row],
        *options: str,
        temperature: float = 1.0,
        checkpoint: Path | None = None,
    ) -> Row:
        """What the command writes; it may end with an exit code."""
        (self.folder / "parity.json").unlink(missing_ok=True)
        words = ["--checkpoint", str(checkpoint or self.checkpoint)]
        words += ["--completions", str(self.write(rows, temperature))]
        words += ["--questions", str(self.questions)]
        main(["parity", *words, "--out", str(self.folder / "parity.json"), *options])
        return self.result()

    def result(self) -> Row:
        return json.loads((self.folder / "parity.json").read_text())

    def refused(self, *args: Any, **options: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            self.run(*args, **options)
        told = caught.value.code
        assert isinstance(told, str) and told.startswith("memphis parity: ")  # exit code 1
        assert len(told.splitlines()) == 1
        return told


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("parity"))


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps the settings of this process as they are."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


def changed(rows: list[Row], at: int, **fields: Any) -> list[Row]:
    return [{**row, **fields} if i == at else row for i, row in enumerate(rows)]


def shifted(rows: list[Row], at: int, token: int, by: float) -> list[Row]:
    logprobs = list(rows[at]["logprobs"])
    logprobs[token] += by
    return changed(rows, at, logprobs=logprobs)


def test_rescoring_is_the_logprobs_of_each_completion_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "TOKENS", 400)  # several batches, the last not full
    rows = world.rows()
    assert len({len(row["token_ids"]) for row in rows}) > 6
    found = rescore(world.model, world.prompts, rows, "float32")
    assert len(found) == NUMBER
    for prompt, row, one in zip(world.prompts, rows, found, strict=True):
        scores = all_logprobs(world.model, prompt, row["token_ids"], "float32")
        chosen = scores[np.arange(len(scores)), row["token_ids"]]
        np.testing.assert_allclose(one.ours, chosen, atol=2e-5)
        np.testing.assert_allclose(one.best, scores.max(-1), atol=2e-5)
        np.testing.assert_array_equal(one.theirs, np.float32(row["logprobs"]))


def test_the_same_model_passes_and_the_result_says_what_was_compared(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    result = world.run(world.rows())
    assert result["completions"] == NUMBER
    assert result["tokens"] == sum(map(len, world.tokens))
    assert result["mean_abs_difference"] <= result["max_abs_difference"] < 2e-5
    assert (result["bound"], result["dtype"], result["engine"]) == (0.02, "float32", "vllm")
    assert "identical" not in result  # these were not greedy
    assert f"over {NUMBER} completions" in capsys.readouterr().err


def test_the_mean_is_per_token_not_per_completion(world: World) -> None:
    """One whole completion is off, the shortest: it weighs as much as it has tokens."""
    rows, lengths = world.rows(), [len(tokens) for tokens in world.tokens]
    at = int(np.argmin(lengths))
    off = [x - 0.1 for x in rows[at]["logprobs"]]
    expected = 0.1 * lengths[at] / sum(lengths)
    assert expected < 0.5 * 0.1 / NUMBER
    found = world.run(changed(rows, at, logprobs=off))["mean_abs_difference"]
    assert found == pytest.approx(expected, rel=0.01)


def test_a_planted_logprob_is_refused_and_named(world: World) -> None:
    rows = world.rows()
    # One token of a long completion; every token of another is off too, but less.
    planted = shifted(rows, 17, 3, -20.0)
    planted = changed(planted, 3, logprobs=[x - 2.0 for x in rows[3]["logprobs"]])
    assert 20.0 / len(rows[17]["token_ids"]) < 2.0
    told = world.refused(planted)
    assert "trainer and sampler are not the same model" in told
    theirs, ours = planted[17]["logprobs"][3], rows[17]["logprobs"][3]
    assert "worst: q17 sample 1, new token 3 '" in told
    assert f"vllm {theirs:.4f}, JAX {ours:.4f}" in told
    worst = world.result()["worst"]
    assert (worst["id"], worst["sample"], worst["position"]) == ("q17", 1, 3)
    assert worst["token_id"] == rows[17]["token_ids"][3]
    assert worst["theirs"] == pytest.approx(theirs) and worst["ours"] == pytest.approx(
        ours, abs=1e-4
    )


@pytest.mark.slow
def test_the_bound_belongs_to_the_dtype(world: World) -> None:
    def all_shifted(by: float, dtype: str) -> list[Row]:
        rows = world.rows(dtype, 3)  # of one length
        return [{**row, "logprobs": [x + by for x in row["logprobs"]]} for row in rows]

    told = world.refused(all_shifted(-0.03, "float32"))
    assert "mean |logprob difference| 0.03 per token (bound 0.02)" in told
    result = world.run(all_shifted(0.03, "bfloat16"), "--dtype", "bfloat16")
    assert result["bound"] == 0.05
    assert "(bound 0.05)" in world.refused(all_shifted(0.06, "bfloat16"), "--dtype", "bfloat16")


def test_other_weights_another_prompt_and_shifted_tokens_are_refused(
    world: World, tmp_path: Path
) -> None:
    rows = world.rows()
    other = save_checkpoint(tmp_path / "other", small_model(seed=1))
    assert "not the same model" in world.refused(rows, checkpoint=other)
    late = [{**row, "token_ids": [*row["token_ids"][1:], 7]} for row in rows]
    assert "not the same model" in world.refused(late)
    others = {f"q{i}": f"Another question {i}?" for i in range(NUMBER)}
    before = world.questions.read_bytes()
    try:
        write_questions(world.questions, NUMBER, **others)
        assert "not the same model" in world.refused(rows)
    finally:
        world.questions.write_bytes(before)


def test_weights_that_give_no_number_are_refused(world: World, tmp_path: Path) -> None:
    broken = small_model()
    broken.norm.scale[...] = jnp.full_like(broken.norm.scale[...], jnp.nan)
    folder = save_checkpoint(tmp_path / "broken", broken)
    assert "cannot be compared" in world.refused(world.rows(), checkpoint=folder)


def greedy_rows(world: World, ranks: dict[tuple[int, int], int]) -> list[Row]:
    """Greedy completions of six tokens with right logprobs, but for the choices in `ranks`."""
    return [greedy_row(world, i, ranks) for i in range(4)]


def greedy_row(world: World, i: int, ranks: dict[tuple[int, int], int]) -> Row:
    tokens: list[int] = []
    right: list[float] = []
    for position in range(6):
        scores = scores_after(world, i, tokens)
        tokens.append(int(np.argsort(-scores)[ranks.get((i, position), 0)]))
        right.append(float(scores[tokens[-1]]))
    return {"id": f"q{i}", "sample": 0, "token_ids": tokens, "logprobs": right}


def scores_after(world: World, i: int, tokens: list[int]) -> np.ndarray:
    """Logprobs [V] of the token that comes next; what fills the row up is causal future."""
    filled = [*tokens, *[0] * (LENGTHS[1] - len(world.prompts[i]) - len(tokens))]
    return all_logprobs(world.model, world.prompts[i], filled, "float32")[len(tokens)]


def test_greedy_choices_are_compared_too(world: World) -> None:
    result = world.run(greedy_rows(world, {}), temperature=0.0)
    assert (result["identical"], result["largest_gap"]) == (4, 0.0)
    other = greedy_rows(world, {(2, 3): 5})
    told = world.refused(other, temperature=0.0)
    assert "greedy text identical in 3 of 4" in told
    result = world.result()
    assert result["mean_abs_difference"] < 1e-4  # the logprobs agree: only the choice is wrong
    scores = scores_after(world, 2, other[2]["token_ids"][:3])
    gap = scores.max() - other[2]["logprobs"][3]
    assert result["largest_gap"] == pytest.approx(gap, abs=1e-4) and gap > 0.04
    world.run(other, temperature=1.0)  # a sampled token need not be the best one


def test_rounded_logits_may_flip_one_greedy_token_in_a_hundred(world: World) -> None:
    other = greedy_rows(world, {(2, 3): 5})
    tokens = sum(len(row["token_ids"]) for row in other)
    options = ("--dtype", "bfloat16", "--bound", "0.005")
    assert f"in {100 / tokens:.2g} % of tokens" in world.refused(other, *options, temperature=0.0)


def test_a_near_tie_is_no_difference(world: World) -> None:
    other = greedy_rows(world, {(1, 2): 1})
    scores = scores_after(world, 1, other[1]["token_ids"][:2])
    gap = scores.max() - other[1]["logprobs"][2]
    result = world.run(other, "--bound", str(gap), temperature=0.0)
    assert result["identical"] == 3 and result["largest_gap"] == pytest.approx(gap, abs=1e-4)


def test_what_cannot_be_compared_is_refused(world: World) -> None:
    rows = world.rows()
    assert "holds no logprobs to compare: sample with --rescore" in world.refused([])
    assert "no question has the id 'elsewhere'" in world.refused(changed(rows, 3, id="elsewhere"))
    told = world.refused(changed(rows, 3, logprobs=[-1.0]))
    assert f"'q3', sample 3, has {len(world.tokens[3])} token_ids and 1 logprobs" in told
    assert "'q3', sample 3, has 0 token_ids" in world.refused(changed(rows, 3, token_ids=None))
    assert "0 logprobs" in world.refused(changed(rows, 3, logprobs=["-1.0"] * len(rows[3])))
    assert "'q3', sample 3, has 0" in world.refused(changed(rows, 3, token_ids=[], logprobs=[]))
    assert "line 6: an answer needs the field 'id'" in world.refused(changed(rows, 3, id=None))
    assert not (world.folder / "parity.json").exists()


@pytest.mark.parametrize(
    "meta", [{}, {"dtype": "int8", "engine": "x", "sampling": {"temperature": 1}}, {"sampling": 3}]
)
def test_a_header_of_another_program_is_named(tmp_path: Path, meta: Row) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"meta": meta}])
    words = ["--checkpoint", "c", "--completions", str(tmp_path / "c.jsonl"), "--questions", "q"]
    with pytest.raises(ValueError, match=r"c.jsonl, line 1: the header needs dtype, one of float"):
        parity.parity([*words, "--out", str(tmp_path / "out.json")])


@pytest.mark.parametrize("bound", ["-1", "nan", "inf"])
def test_a_bound_that_nothing_can_keep_is_refused(bound: str, tmp_path: Path) -> None:
    words = ["--checkpoint", "c", "--completions", "c", "--questions", "q", "--bound", bound]
    with pytest.raises(SystemExit) as ended:
        main(["parity", *words, "--out", str(tmp_path / "out.json")])
    assert ended.value.code == 2
