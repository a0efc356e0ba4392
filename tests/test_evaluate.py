"""`memphis eval`: stock tasks on local files, our own format, killed and carried on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sampled
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks._yaml_loader import load_yaml
from reference_models import make_hf

from memphis_jax import eval_format, eval_table, eval_tasks
from memphis_jax.eval_cache import CachedLM
from memphis_jax.evaluate import evaluate
from memphis_jax.progress import Progress
from memphis_jax.rounds.files import write_json, write_jsonl

REPO = Path(__file__).parents[1]
MEMPHIS = [sys.executable, "-m", "memphis_jax", "eval"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
VLLM = REPO / ".venv-vllm" / "bin" / "python"
TASKS = ["gsm8k", "agieval_sat_math", "bbh_cot_fewshot_navigate"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root in the layout of the original repositories."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "agieval_v1_en", "bbh/tasks"):
        (folder / name).mkdir(parents=True)
    sums = [{"question": f"Add {i} and 2.", "answer": f"Easy.\n#### {i + 2}"} for i in range(30)]
    write_jsonl(folder / "gsm8k" / "train.jsonl", sums)
    exam = [
        {
            "passage": "" if i else "A passage. ",
            "question": f"What is {i} + 1?",
            "options": [f"(A){i}", f"(B){i + 1}", f"(C){i + 2}"],
            "label": "B",
        }
        for i in range(16)
    ]
    write_jsonl(folder / "agieval_v1_en" / "sat-math.jsonl", exam)
    walks = [
        {"input": f"Walk {i} steps. Back?\nOptions:\n- Yes\n- No", "target": "No"} for i in range(4)
    ]
    write_json(folder / "bbh" / "tasks" / "navigate.json", {"examples": walks})
    return folder


@pytest.fixture(scope="module")
def stock(root: Path, tmp_path_factory: pytest.TempPathFactory) -> eval_tasks.Stock:
    return eval_tasks.load(TASKS, root, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HF folder with a small tokenizer; vLLM's attention needs heads of 32."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    make_hf(
        folder, vocab_size=sampled.VOCAB, max_position_embeddings=2048, hidden_size=64,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    sampled.save_tokenizer(folder.with_name("tokenizer"))
    for file in folder.with_name("tokenizer").iterdir():
        shutil.move(file, folder / file.name)
    return folder


def words(model: Path, root: Path, out: Path, *options: str, tasks: str) -> list[str]:
    places = ["--data-root", str(root), "--out", str(out), "--dtype", "float32"]
    return [str(model), "--tasks", tasks, *places, *options]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def run_ok(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_only_the_data_of_a_stock_task_is_other(stock: eval_tasks.Stock) -> None:
    for name in TASKS:
        stock_file = stock.entries[name].yaml_path
        ours = Path(stock.tasks[name].config.metadata["config_source"])
        assert "lm_eval" in str(stock_file) and "lm_eval" not in str(ours)
        before, after = (load_yaml(path, resolve_func=False) for path in (stock_file, ours))
        changed = {k for k in before | after if before.get(k) != after.get(k)}
        assert changed <= {"dataset_path", "dataset_name", "dataset_kwargs"}
        assert changed >= {"dataset_path", "dataset_kwargs"}


def test_train_questions_stand_in_for_gsm8ks_test_and_are_no_examples(
    stock: eval_tasks.Stock,
) -> None:
    data = stock.tasks["gsm8k"].dataset
    test, train = ({row["question"] for row in data[split]} for split in ("test", "train"))
    assert (len(test), len(train), len(test & train)) == (15, 15, 0)
    assert "TRAINING questions 1 to 15" in stock.about["gsm8k"]["note"]
    assert not stock.about["agieval_sat_math"]["note"]


def test_a_real_test_split_is_taken_where_it_is_there(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    write_jsonl(tmp_path / "data" / "gsm8k" / "test.jsonl", [{"question": "?", "answer": "#### 1"}])
    data = eval_tasks.local_data(tmp_path / "data", "openai/gsm8k", "main")
    assert (len(data.splits["train"]), len(data.splits["test"]), data.note) == (30, 1, "")


def test_agievals_own_files_become_the_hubs_rows(stock: eval_tasks.Stock) -> None:
    row = stock.tasks["agieval_sat_math"].dataset["test"][0]
    assert row == {
        "query": "A passage. Q: What is 0 + 1? Answer Choices: (A)0 (B)1 (C)2\n"
        "A: Among A through C, the answer is",
        "choices": ["(A)0", "(B)1", "(C)2"],
        "gold": [1],
    }


@pytest.mark.parametrize(("name", "size"), [("sat-math", 110388), ("aqua-rat", 93696)])
def test_converted_agieval_has_the_size_that_the_hub_states(
    shared: Path, name: str, size: int
) -> None:
    import pyarrow as pa

    rows = eval_tasks.local_data(shared / "data", f"hails/agieval-{name}", None).splits["test"]
    assert pa.Table.from_pylist(rows).nbytes == size  # "num_bytes" of hails/agieval-*'s README


def test_all_tasks_without_data_are_named_before_a_model_is_read(
    root: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (hf / name).write_text("{}")  # no model at all
    with pytest.raises(ValueError) as caught:
        evaluate(words(hf, root, tmp_path / "out", tasks="memphis"))
    told = str(caught.value)
    assert told.startswith("33 of 36 tasks have no data:")
    assert f"agieval_lsat_ar: {root}/agieval_v1_en/lsat-ar.jsonl or {root}/hails/agieval" in told
    assert f"bbh_cot_fewshot_snarks: {root}/bbh/tasks/snarks.json or " in told
    assert told.endswith(f"--tasks {','.join(TASKS)}")


def test_unknown_tasks_and_folders_without_a_model_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no model folder"):
        evaluate(words(tmp_path, root, tmp_path / "out", tasks="gsm8k"))


def test_what_engine_hf_lacks_is_named_at_once(
    model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memphis_jax.evaluate.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs torch and accelerate: pip install 'lm-eval"):
        evaluate(words(model, root, tmp_path / "out", "--engine", "hf", tasks="gsm8k"))


def test_a_config_that_no_engine_can_take_is_refused(
    model: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for text, told in {
        "[]": "config.json holds a list, a JSON object is needed",
        '{"': "config.json is not JSON",
        json.dumps(config | {"dtype": "float16"}): "saved in float16, --engine jax knows float32",
    }.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            evaluate([*words(folder, root, tmp_path / "out", tasks="gsm8k"), "--dtype", "auto"])
    with pytest.raises(SystemExit):
        evaluate(words(folder, root, tmp_path / "out", tasks=" ,"))
    assert "--tasks is empty: name tasks" in capsys.readouterr().err


def test_our_format_asks_and_grades_as_rounds_do(stock: eval_tasks.Stock) -> None:
    names = [f"{name}{eval_tasks.SUFFIX}" for name in TASKS]
    asked = eval_format.assemble(names, stock)
    math, exam, walk = (asked.tasks[name] for name in names)
    assert math.doc_to_text(math.eval_docs[3]) == ("### User:\nAdd 3 and 2.\n### Rationale:\n")
    assert exam.doc_to_text(exam.eval_docs[0]) == (
        "### User:\nA passage.\n\nWhat is 0 + 1?\nAnswer Choices: (A)0 (B)1 (C)2\n### Rationale:\n"
    )

    def graded(task: Any, number: int, answer: str) -> tuple[float, ...]:
        found = task.process_results(task.eval_docs[number], [answer])
        return found["acc"], found["valid"], found["unknown"]

    correct, wrong, invalid = (1.0, 1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)
    assert graded(math, 3, "3 + 2 = 5.\n### Answer:\n5") == correct
    assert graded(math, 3, "3 + 2 = 6.\n### Answer:\n6") == wrong
    assert graded(math, 3, "3 + 2 = 5, so #### 5") == invalid  # stock's strict form
    assert graded(exam, 1, "1 + 1 = 2.\n### Answer:\nB") == correct
    assert graded(exam, 1, "1 + 1 = 2.\n### Answer:\n2") == correct
    assert graded(exam, 1, "Hm.\n### Answer:\n(C)") == wrong
    assert graded(walk, 0, "Far.\n### Answer:\nNo") == correct
    assert graded(walk, 0, "Far.\n### Answer:\nYes") == wrong


class Counting(LM):
    """Answers with the number of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.calls.append(len(requests))
        return [f"{r.args[0]}/{sum(self.calls)}" for r in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        return [(float("nan"), False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError


def cached(path: Path, lm: LM, **identity: Any) -> CachedLM:
    return CachedLM(lambda: lm, path, identity, 4, lambda method, n: Progress(n, method))


def ask(texts: list[str]) -> list[Instance]:
    return [Instance("generate_until", {}, (text, {"until": ["."]}), 0) for text in texts]


def test_answers_are_kept_in_whole_blocks_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path, lm = tmp_path / "requests.jsonl", Counting()
    texts = [f"{'x' * i}" for i in range(1, 11)]
    first = cached(path, lm).generate_until(ask(texts))
    assert lm.calls == [4, 4, 2] and [t.split("/")[0] for t in first] == texts
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-9])  # killed while it wrote the second block
    again = Counting()
    second = cached(path, again).generate_until(ask(texts))
    assert again.calls == [4, 2]
    assert second[6:] == first[6:]  # the longest four: the first block
    assert len(path.read_bytes().splitlines()) == 3
    third = Counting()
    assert cached(path, third).generate_until(ask(texts)) == second
    assert third.calls == []  # no model was needed

    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"keys": ["damaged\n', *lines[2:]]))
    fourth = Counting()
    cached(path, fourth).generate_until(ask(texts))
    assert fourth.calls == [4]  # what stands after the damage is kept


def test_another_model_has_answers_of_its_own_and_repeats_are_sampled_anew(tmp_path: Path) -> None:
    path, lm = tmp_path / "requests.jsonl", Counting()
    assert len(set(cached(path, lm, model="a").generate_until(ask(["x"])))) == 1
    cached(path, lm, model="b").generate_until(ask(["x"]))
    assert lm.calls == [1, 1]
    cached(path, lm, model="a").generate_until(ask(["x", "x", "x"]))
    assert lm.calls == [1, 1, 2]  # the first x is known


def test_nan_is_refused(tmp_path: Path) -> None:
    asked = [Instance("loglikelihood", {}, ("a", "b"), 0)]
    with pytest.raises(ValueError, match="not finite"):
        cached(tmp_path / "requests.jsonl", Counting()).loglikelihood(asked)


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_scores(
    model: Path, root: Path, tmp_path: Path
) -> None:
    options = ("--batch-size", "1", "--limit", "12")
    tasks = "agieval_sat_math,gsm8k_memphis"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ok([*MEMPHIS, *words(model, root, whole, *options, tasks=tasks)])
    command = [*MEMPHIS, *words(model, root, broken, *options, tasks=tasks)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    answers = broken / "requests.jsonl"
    deadline = time.monotonic() + 300
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "results.json").exists()
    kept = answers.read_bytes()
    run_ok(command)
    assert answers.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    first, second = results(whole), results(broken)
    assert second["tasks"] == first["tasks"]
    assert first["answered"] == 12 * 3 + 12 and 0 < second["answered"] < first["answered"]
    samples = [sorted(p.read_text() for p in out.glob("samples/*")) for out in (whole, broken)]
    assert samples[0] == samples[1]
    assert not list(broken.glob("checkpoint-*"))


@pytest.mark.slow
def test_jax_scores_as_hf_does_and_says_what_was_measured(
    model: Path, root: Path, tmp_path: Path
) -> None:
    tasks, found = "agieval_sat_math,gsm8k,gsm8k_memphis", {}
    for engine in ("jax", "hf"):
        options = ("--engine", engine, "--limit", "6")
        shown = run_ok([*MEMPHIS, *words(model, root, tmp_path / engine, *options, tasks=tasks)])
        found[engine] = results(tmp_path / engine)
        assert "exact_match,flexible-extract" in shown and "TRAINING questions" in shown
    ours, theirs = found["jax"]["tasks"], found["hf"]["tasks"]
    assert ours == theirs  # scores, errors, and the hashes of definitions and of requests
    assert ours["gsm8k"]["metrics"].keys() == {
        "exact_match,strict-match", "exact_match,flexible-extract"
    }  # fmt: skip
    assert ours["gsm8k"]["num_fewshot"] == 5 and ours["gsm8k"]["version"] == 3.0
    assert (ours["gsm8k"]["questions"], ours["gsm8k"]["of"]) == (6, 15)
    same_texts(tmp_path / "jax", tmp_path / "hf", tolerance=1e-4)
    share = ours["agieval_sat_math"]["metrics"]["acc,none"]["value"]
    error = ours["agieval_sat_math"]["metrics"]["acc,none"]["stderr"]
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 5), abs=1e-9)  # n - 1
    assert found["jax"]["versions"]["lm_eval"] == found["hf"]["versions"]["lm_eval"]
    assert found["jax"]["model"]["files"].keys() >= {"config.json", "model.safetensors"}


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_vllm_answers_as_jax_does(model: Path, root: Path, tmp_path: Path) -> None:
    if not VLLM.is_file():
        told = f"{VLLM} is missing: `make vllm` builds it"
        pytest.fail(told) if os.environ.get("MEMPHIS_CI") else pytest.skip(told)
    for engine in ("jax", "vllm"):
        options = ("--engine", engine, "--limit", "6", "--python", str(VLLM))
        tasks = "agieval_sat_math,gsm8k_memphis"
        run_ok([*MEMPHIS, *words(model, root, tmp_path / engine, *options, tasks=tasks)])
    same_texts(tmp_path / "jax", tmp_path / "vllm", tolerance=1e-3)
    assert results(tmp_path / "jax")["tasks"] == results(tmp_path / "vllm")["tasks"]
    assert results(tmp_path / "vllm")["versions"]["vllm"]


def same_texts(one: Path, other: Path, tolerance: float) -> None:
    """Equal generated texts, and loglikelihoods within `tolerance` per token (of 320)."""
    compared = 0
    for path in sorted(one.glob("samples/*.jsonl")):
        pairs = zip(path.open(), (other / "samples" / path.name).open(), strict=True)
        for ours, theirs in ((json.loads(a), json.loads(b)) for a, b in pairs):
            assert ours["arguments"] == theirs["arguments"]
            for arguments, a, b in zip(
                ours["arguments"], ours["resps"], theirs["resps"], strict=True
            ):
                compared += 1
                if isinstance(a[0], str):  # vLLM keeps half a character at the end to itself
                    assert a[0].rstrip("\ufffd") == b[0].rstrip("\ufffd")
                else:
                    assert abs(a[0][0] - b[0][0]) <= tolerance * len(arguments[1])
    assert compared > 12


def test_the_table_shows_the_cards_beside_the_metric_they_mean() -> None:
    from rich.console import Console

    task = {"num_fewshot": 5, "questions": 9, "note": ""}
    score = {"value": 0.125, "stderr": 0.011}
    metrics = {name: score for name in ("exact_match,strict-match", "exact_match,flexible-extract")}
    result = {"engine": "jax", "dtype": "float32", "limit": 9, "versions": {"lm_eval": "0.4.13"}}
    console = Console(width=120, record=True)
    eval_table.show({**result, "tasks": {"gsm8k": {**task, "metrics": metrics}}}, console)
    lines = console.export_text().splitlines()
    strict, flexible = (next(x for x in lines if name in x) for name in metrics)
    assert "12.50 ± 1.10" in strict and "18.8" in strict and "2.05" in strict
    assert "12.50 ± 1.10" in flexible and "18.8" not in flexible

    metrics = {"word_perplexity,none": {"value": 17.25, "stderr": 0.5}}
    eval_table.show({**result, "tasks": {"wikitext": {**task, "metrics": metrics}}}, console)
    assert "17.25 ± 0.50 (no %)" in console.export_text()
