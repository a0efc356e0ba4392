"""The worker up to the moment where vLLM starts: what it refuses, and what it asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sampled import CONTEXT, save_tokenizer, write_questions

from memphis_jax.data.prompts import STOP
from memphis_jax.rounds import blocks, generate
from memphis_jax.rounds.certificate import file_hashes
from memphis_jax.rounds.files import read_completions
from memphis_jax.rounds.requests import Output, Request

REPO = Path(__file__).parents[1]
CONFIG = {"model_type": "stablelm", "max_position_embeddings": CONTEXT}


class World:
    """An HF folder with its certificate, questions, and an empty place for the answers."""

    def __init__(self, folder: Path):
        self.model, self.out = folder / "hf", folder / "out"
        save_tokenizer(self.model)
        (self.model / "model.safetensors").write_bytes(b"weights")
        self.configure(CONFIG)
        self.questions = write_questions(folder / "questions.jsonl", 20)

    def configure(self, config: Any) -> None:
        text = config if isinstance(config, str) else json.dumps(config)
        (self.model / "config.json").write_text(text)
        self.certify()

    def certify(self) -> None:
        certificate = {"files": file_hashes(self.model)}
        (self.model / "conversion.json").write_text(json.dumps(certificate))

    def words(self, *options: str) -> list[str]:
        words = ["--model", str(self.model), "--questions", str(self.questions)]
        return [*words, "--out", str(self.out), "--max-new-tokens", "16", *options]

    def plan(self, *options: str) -> generate.Plan:
        return generate.Plan(generate.parse(self.words(*options)))

    def refused(self, *options: str) -> str:
        """The one line that the command ends with; nothing may be published."""
        with pytest.raises(SystemExit) as caught:
            generate.main(self.words(*options))
        told = caught.value.code
        assert isinstance(told, str)  # which makes the exit code 1
        assert told.startswith("generate: ") and len(told.splitlines()) == 1
        assert not self.out.exists()
        return told


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return World(tmp_path)


def with_python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)


def test_help_needs_neither_jax_nor_vllm_nor_torch() -> None:
    code = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jax", "jaxlib", "flax", "optax", "orbax", "vllm", "torch")))
sys.argv = ["generate", "--help"]
runpy.run_module("memphis_jax.rounds.generate", run_name="__main__")
"""
    done = with_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--tensor-parallel-size" in done.stdout and "(default: 0.5)" in done.stdout


def test_too_many_gpus_asked_for_is_one_line_and_code_1(world: World) -> None:
    options = ["--tensor-parallel-size", "2"]
    done = with_python("-m", "memphis_jax.rounds.generate", *world.words(*options))
    assert done.returncode == 1 and done.stdout == ""
    told = "generate: --tensor-parallel-size 2 needs as many GPUs, this machine shows 0\n"
    assert done.stderr == told
    assert [path for path in world.out.rglob("*") if path.is_file()] == []


def test_data_parallel_beyond_the_gpus_starts_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    told = world.refused("--data-parallel", "2", "--tensor-parallel-size", "2")
    assert "needs 4 GPUs, this machine shows 3" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--shard 2/2", "I must be from 0 to K - 1"),
        ("--shard=-1/2", "I must be from 0 to K - 1"),
        ("--shard 0/0", "I must be from 0 to K - 1"),
        ("--shard 1", "not of the form I/K"),
        ("--shard 1/2/3", "not of the form I/K"),
        ("--shard 0/2 --data-parallel 2", "not allowed with argument --shard"),
        ("--shard 0/2 --gather 2", "not allowed with argument --shard"),
        ("--data-parallel 0", "--data-parallel 0 is under 1"),
        ("--data-par 2", "unrecognized arguments: --data-par"),
        ("--gather -1", "--gather -1 is under 0"),
        ("--num-samples 0", "--num-samples 0 must be 1 or more"),
        ("--max-new-tokens 0", "--max-new-tokens 0 must be 1 or more"),
        ("--batch-questions 0", "--batch-questions 0 must be 1 or more"),
        ("--tensor-parallel-size 0", "--tensor-parallel-size 0 is under 1"),
        ("--num-questions -5", "--num-questions -5 is under 0"),
        ("--rescore -1", "--rescore -1 is under 0"),
        ("--temperature -0.1", "--temperature -0.1 must be >= 0"),
        ("--top-p 0", "--top-p 0.0 in 0..1"),
        ("--top-p 1.5", "--top-p 1.5 in 0..1"),
        ("--dtype float64", "invalid choice: 'float64'"),
        ("--seed one", "invalid int value: 'one'"),
    ],
)
def test_an_impossible_option_is_refused(
    options: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["--model", "hf", "--questions", "q.jsonl", "--out", "out"]
    with pytest.raises(SystemExit) as caught:
        generate.parse([*required, *options.split()])
    assert caught.value.code == 2 and told in capsys.readouterr().err


def test_a_broken_line_17_is_named(world: World) -> None:
    lines = world.questions.read_text().splitlines()
    lines[16] = lines[16][:-3]
    world.questions.write_text("\n".join(lines) + "\n")
    assert f"{world.questions}, line 17: not JSON" in world.refused()


def test_questions_that_are_empty_or_absent(world: World) -> None:
    world.questions.write_text("")
    assert f"{world.questions}: there is no question to answer" in world.refused()
    world.questions.unlink()
    assert f"No such file or directory: '{world.questions}'" in world.refused()


def test_a_folder_without_its_certificate(world: World) -> None:
    (world.model / "conversion.json").unlink()
    assert f"{world.model} has no conversion.json" in world.refused()
    assert world.plan("--uncertified").meta["certified"] is False


def test_a_folder_that_is_not_what_was_certified(world: World) -> None:
    (world.model / "model.safetensors").write_bytes(b"Weights")
    told = world.refused()
    assert str(world.model / "conversion.json") in told
    assert "model.safetensors is not what was certified" in told
    assert "tokenizer.json" not in told
    for option in ("--gather", "--data-parallel"):
        assert "is not what was certified" in world.refused(option, "2")
    plan = world.plan("--uncertified")
    assert plan.meta["certified"] is False
    assert plan.meta["model"] == file_hashes(world.model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"max_position_embeddings": null}', '{"max_position_em'],
)
def test_an_unreadable_config(world: World, text: str) -> None:
    world.configure(text)
    told = world.refused()
    assert f"{world.model / 'config.json'} is not the config of a model" in told


def test_an_absent_model_and_an_absent_tokenizer(world: World) -> None:
    (world.model / "tokenizer.json").unlink()
    world.certify()
    assert f"no tokenizer.json in {world.model}" in world.refused()
    (world.model / "config.json").unlink()
    assert f"{world.model} is no model folder (no config.json)" in world.refused()


def test_the_plan_says_all_that_decides_what_is_sampled(world: World) -> None:
    plan = world.plan("--temperature", "0.7", "--top-p", "0.9", "--seed", "5", "--dtype", "float32")
    meta = plan.meta
    assert meta["certified"] is True and meta["model"] == file_hashes(world.model)
    assert (meta["engine"], meta["seed"], meta["dtype"]) == ("vllm", 5, "float32")
    assert (meta["context"], meta["num_samples"], meta["rescore"]) == (CONTEXT, 8, 64)
    assert {"vllm", "torch", "tokenizers"} <= meta["versions"].keys() and "python" not in meta[
        "versions"
    ]
    sampling = meta["sampling"]
    assert (sampling["temperature"], sampling["top_p"]) == (0.7, 0.9)
    assert (sampling["max_tokens"], sampling["stop"]) == (16, ["\n### User:"])
    assert sampling["stop_token_ids"] == [plan.tokenizer.token_to_id("<|endoftext|>")]
    assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (0, 0.0, 1.0)
    assert json.loads(json.dumps(meta)) == meta  # as it comes back from a block


def test_another_prompt_with_the_same_id_is_another_plan(world: World) -> None:
    before = world.plan().meta
    write_questions(world.questions, 20, q7="How many pears?")
    after = world.plan().meta
    assert [name for name in before if before[name] != after[name]] == ["prompts_sha256"]


def test_greedy_needs_no_top_p(world: World) -> None:
    sampling = world.plan("--temperature", "0", "--top-p", "0.8").sampling
    assert (sampling["temperature"], sampling["top_p"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("flag", "backend"),
    [
        ({}, "vllm"),
        ({"qk_layernorm": False}, "vllm"),
        ({"qk_layernorm": True}, "transformers"),
        ({"use_parallel_residual": True}, "transformers"),
    ],
)
def test_members_that_vllm_would_compute_wrong(world: World, flag: Any, backend: str) -> None:
    world.configure({**CONFIG, **flag})
    assert world.plan().model_impl == backend


def requests(plan: generate.Plan, *words: str) -> list[Request]:
    args = generate.parse(words)
    return [r for q in plan.questions for r in generate._requests(q, args, plan)]


def test_each_request_has_a_seed_of_its_own_whatever_else_is_sampled(world: World) -> None:
    every = requests(world.plan(), *world.words())
    assert len(every) == 20 * 8 == len({request.seed for request in every})
    assert sum(request.logprobs for request in every) == 64
    some = ["--num-questions", "3", "--num-samples", "2", "--batch-questions", "2"]
    for request in requests(world.plan(*some), *world.words(*some)):
        same = [r for r in every if (r.id, r.sample) == (request.id, request.sample)]
        assert [(r.seed, r.prompt) for r in same] == [(request.seed, request.prompt)]
    again = requests(world.plan("--seed", "1"), *world.words("--seed", "1"))
    assert not {r.seed for r in again} & {r.seed for r in every}


def finish_by_hand(world: World, shard: tuple[int, int], *options: str) -> None:
    """The blocks of one shard as the worker would publish them, all answers "7"."""
    args = generate.parse(world.words(*options))
    plan = generate.Plan(args)
    folder = blocks.shard_folder(world.out, *shard)
    folder.mkdir(parents=True)
    mine = blocks.chunks(plan.questions[shard[0] :: shard[1]], args.batch_questions)
    for number, questions in enumerate(mine):
        rows: list[Any] = [{"id": q.id, "skipped": q.skipped} for q in questions if q.skipped]
        for question in questions:
            for request in generate._requests(question, args, plan):
                rows.append(generate._line(request, Output([60], [-0.5], "stop"), plan))
        meta = {**plan.meta, "hardware": {"host": f"host {shard[0]}"}, "shard": list(shard)}
        blocks.write_block(blocks.block_path(folder, number), meta, rows)


def test_bad_questions_are_recorded_as_skipped_in_the_merge(world: World) -> None:
    write_questions(world.questions, 9, q2=" \n", q5="far too long " * 40)
    for index in range(2):
        finish_by_hand(world, (index, 2), "--batch-questions", "2")
    generate.main(world.words("--batch-questions", "2", "--gather", "2"))
    meta, rows = read_completions(world.out / "completions.jsonl")
    assert [row["id"] for row in rows[::8]] == ["q0", "q1", "q3", "q4", "q6", "q7", "q8"]
    assert len(rows) == 7 * 8
    assert meta["skipped"].keys() == {"q2", "q5"}
    assert "the prompt is empty" in meta["skipped"]["q2"]
    assert f"exceed the context of {CONTEXT}" in meta["skipped"]["q5"]
    assert meta["hardware"] == [{"host": "host 0"}, {"host": "host 1"}]
    assert (meta["shards"], meta["certified"], meta["seed"]) == (2, True, 0)
    assert sum("logprobs" in row for row in rows) == 7 * 8


@pytest.mark.parametrize("options", [["--seed", "1"], ["--num-samples", "4"], ["--top-p", "1"]])
def test_what_is_there_must_be_what_is_asked_for(world: World, options: list[str]) -> None:
    finish_by_hand(world, (0, 1))
    for more in ([], ["--gather", "1"]):
        with pytest.raises(SystemExit) as caught:
            generate.main(world.words(*options, *more))
        assert "was sampled otherwise" in str(caught.value.code)
        assert options[0][2:].replace("-", "_") in str(caught.value.code)
    assert not (world.out / "completions.jsonl").exists()


def test_finished_blocks_need_no_engine(world: World) -> None:
    """vLLM is not installed here: it would fail."""
    finish_by_hand(world, (0, 1))
    generate.main(world.words())
    assert len(read_completions(world.out / "completions.jsonl")[1]) == 20 * 8


def test_a_shard_is_every_kth_question_and_merges_nothing(world: World) -> None:
    options = ["--batch-questions", "4"]
    finish_by_hand(world, (1, 2), *options)  # three blocks of ten questions
    generate.main(world.words(*options, "--shard", "1/2"))
    assert not (world.out / "completions.jsonl").exists()


def test_text_ends_before_eos_and_before_the_stop_text(world: World) -> None:
    plan = world.plan()
    eos = plan.sampling["stop_token_ids"][0]
    request = Request("q0", 1, [5], seed=3, logprobs=False)

    def line(text: str, *end: int, reason: str = "stop") -> dict[str, Any]:
        tokens = plan.tokenizer.encode(text, add_special_tokens=False).ids
        return generate._line(request, Output([*tokens, *end], [], reason), plan)

    def count(text: str) -> int:
        return len(plan.tokenizer.encode(text, add_special_tokens=False).ids)

    row = line("so 12\n### Answer:\n12", eos)
    expected = {"id": "q0", "sample": 1, "text": "so 12\n### Answer:\n12"}
    assert row == {**expected, "finish_reason": "stop", "num_tokens": count(row["text"])}
    assert line("so 12" + STOP)["text"] == "so 12"
    assert line("so 12" + STOP)["num_tokens"] == count("so 12" + STOP)
    assert line("", eos) == {**expected, "text": "", "finish_reason": "stop", "num_tokens": 0}
    assert line("\u00e9\U0001f600 so", reason="length")["text"] == "\u00e9\U0001f600 so"


def test_token_ids_and_logprobs_are_kept_with_the_eos(world: World) -> None:
    plan = world.plan()
    eos = plan.sampling["stop_token_ids"][0]
    request = Request("q0", 0, [5], seed=3, logprobs=True)
    row = generate._line(request, Output([70, 71, eos], [-1.0, -2.0, -0.5], "stop"), plan)
    assert (row["token_ids"], row["logprobs"]) == ([70, 71, eos], [-1.0, -2.0, -0.5])
    assert row["num_tokens"] == 2
