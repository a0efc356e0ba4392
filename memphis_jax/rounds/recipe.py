"""The stages of a recipe and how they follow each other: what `memphis rounds` runs. No jax.

    data -> [init] -> sft -> export -> [greedy parity] -> held-out accuracy
      -> per round: generate [-> parity] -> grade -> pairs -> rank -> export -> held-out accuracy
      -> results.json, report.html

Round r starts from the weights of round r - 1 (SFT's for the first). Each stage is a process with a
ledger record; started again after any interruption, the recipe goes on with the first stage that
has no valid record.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from memphis_jax import config as configs
from memphis_jax.rounds.files import read_jsonl, sha256_file, write_json
from memphis_jax.rounds.ledger import Ledger, Stage

MEMPHIS = (sys.executable, "-m", "memphis_jax")
CONVERT = (sys.executable, "-m", "convert")


class Recipe:
    """The stages of one run; every method runs a few of them and returns what they made."""

    def __init__(self, workdir: Path, config: configs.RunConfig):
        self.workdir, self.config = workdir, config
        self.ledger = Ledger(workdir, sha256_file(workdir / "config.json"))
        self.data = workdir / "data"
        self.exported: dict[Path, Path] = {}  # checkpoint folder -> HF folder
        for folder in ("eval", "parity"):
            (workdir / folder).mkdir(exist_ok=True)

    def run(self) -> dict[str, Any]:
        checkpoint = self.sft(self.start())
        self.greedy_parity(checkpoint)
        results: dict[str, Any] = {"sft": self.evaluate("sft", checkpoint), "rounds": []}
        for number in range(1, self.config.rounds.num_rounds + 1):
            checkpoint = self.round(number, checkpoint)
            results["rounds"].append(self.evaluate(f"round{number}", checkpoint))
        results["seconds"] = round(sum(row["seconds"] for row in self.ledger.records()), 1)
        results["seed"] = self.config.seed
        write_json(self.workdir / "results.json", results)
        subprocess.run([*MEMPHIS, "report", str(self.workdir)], check=True)
        return results

    def start(self) -> Path | None:
        """Data files, and the checkpoint to start from (None: random weights)."""
        config_file = self.workdir / "config.json"
        self.stage(
            "data",
            (*MEMPHIS, "data", "--config", config_file, "--out", self.data),
            inputs=data_files(self.config.data),
            outputs=[self.data],
        )
        if not self.config.start.hf_folder:
            return None
        source, init = Path(self.config.start.hf_folder), self.workdir / "init"
        self.stage("init", (*CONVERT, "from-hf", source, init), [source], [init])
        return init

    def rankable(self, pairs: Path, checkpoint: Path) -> bool:
        """Whether a pair is short enough for the rank phase."""
        from memphis_jax.data.examples import read_groups
        from memphis_jax.data.prompts import load_tokenizer

        if not read_jsonl(pairs):
            return False
        tokenizer, eos_id = load_tokenizer(checkpoint / "tokenizer")
        return bool(read_groups(pairs, tokenizer, eos_id, self.config.rank.seq_len)[0])

    def sft(self, init: Path | None) -> Path:
        folder = self.workdir / "sft"
        self.train("sft", "sft", folder, init, self.data)
        self.export("sft", folder)
        return folder

    def round(self, number: int, checkpoint: Path) -> Path:
        """One round from `checkpoint`; returns the new one, or the same where no pair was found."""
        config, name = self.config, f"round{number}"
        folder, questions = self.workdir / name, self.data / "train.jsonl"
        graded, pairs = folder / "graded.jsonl", folder / "pairs.jsonl"
        completions = self.sample(
            f"{name}-generate",
            checkpoint,
            [questions],
            folder / "generate",
            num_samples=config.generate.num_samples,
            temperature=config.generate.temperature,
            num_questions=config.generate.questions_per_round,
            seed=config.seed * 1000 + number,
            rescore=config.generate.parity_completions,
        )
        self.parity(f"{name}-parity", checkpoint, questions, completions)
        self.grade(f"{name}-grade", completions, [questions], graded)
        limit = config.rounds.max_pairs_per_question
        self.stage(
            f"{name}-pairs",
            (
                *(*MEMPHIS, "pairs", "--graded", graded, "--questions", questions),
                *("--max-pairs-per-question", limit, "--out", pairs),
            ),
            inputs=[graded, questions],
            outputs=[pairs, pairs.with_suffix(".json")],
        )
        if not self.rankable(pairs, checkpoint):
            note = (
                f"round {number}: no question has both a correct and an incorrect answer that fit "
                "rank.seq_len, so there is nothing to rank; the weights stay as they are"
            )
            self.ledger.note(f"{name}-rank", note)
            print(note, flush=True)
            return checkpoint
        trained = folder / "rank"
        self.train(f"{name}-rank", "rank", trained, checkpoint, pairs)
        self.export(name, trained)
        return trained

    def evaluate(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """Held-out accuracies of a checkpoint: greedy, and sampled as the rounds sample."""
        questions = [self.data / f"{split}.jsonl" for split in ("validation", "test")]
        graded = {}
        for kind, samples, temperature in (
            ("greedy", 1, 0.0),
            ("sampled", self.config.rounds.eval_samples, self.config.generate.temperature),
        ):
            graded[kind] = self.workdir / "eval" / f"{name}-{kind}.graded.jsonl"
            completions = self.sample(
                f"{name}-eval-{kind}",
                checkpoint,
                questions,
                self.workdir / "eval" / f"{name}-{kind}",
                num_samples=samples,
                temperature=temperature,
                num_questions=0,
                seed=self.config.seed,
            )
            self.grade(f"{name}-eval-{kind}-grade", completions, questions, graded[kind])
        out = self.workdir / "eval" / f"{name}.json"
        self.stage(
            f"{name}-accuracy",
            (
                *(*MEMPHIS, "accuracy", "--greedy", graded["greedy"]),
                *("--sampled", graded["sampled"], "--validation", questions[0]),
                *("--test", questions[1], "--out", out),
            ),
            inputs=[*graded.values(), *questions],
            outputs=[out],
        )
        return json.loads(out.read_text())

    def train(self, name: str, phase: str, folder: Path, init: Path | None, data: Path) -> None:
        start = ("--init", init) if init else ("--tokenizer", self.data / "tokenizer")
        inputs = [data, init / "checkpoints"] if init else [data, self.data / "tokenizer"]
        config_file = self.workdir / "config.json"
        self.stage(
            name,
            (
                *(*MEMPHIS, "train", "--config", config_file, "--phase", phase),
                *("--workdir", folder, "--data", data, *start),
            ),
            inputs=inputs,
            outputs=[folder / "checkpoints", folder / "tokenizer"],
            prefix=self.config.executor.train,
        )

    def export(self, name: str, folder: Path) -> None:
        out = self.workdir / name / "hf"
        inputs = [folder / "checkpoints", folder / "tokenizer"]
        # vLLM rounds to the dtype of compute anyway; rounded here, half the bytes travel.
        dtype = self.config.compute.dtype if self.config.generate.engine == "vllm" else "keep"
        command = (*CONVERT, "to-hf", folder, out, "--dtype", dtype)
        self.stage(f"{name}-export", command, inputs, [out], prefix=self.config.executor.train)
        self.exported[folder] = out

    def sample(
        self,
        name: str,
        checkpoint: Path,
        questions: list[Path],
        out: Path,
        *,
        num_samples: int,
        temperature: float,
        num_questions: int,
        seed: int,
        rescore: int = 0,
    ) -> Path:
        """Answers of a checkpoint by the configured engine; returns the completions file."""
        generate = self.config.generate
        options = {
            "--num-samples": num_samples,
            "--temperature": temperature,
            "--top-p": generate.top_p,
            "--max-new-tokens": generate.max_new_tokens,
            "--num-questions": num_questions,
            "--seed": seed,
            "--dtype": self.config.compute.dtype,
            "--batch-questions": generate.batch_questions,
        }
        prefix, suffix = self.config.executor.generate, tuple[Any, ...]()
        worker: tuple[Any, ...]
        if generate.engine == "jax":
            worker = (*MEMPHIS, "sample", "--checkpoint", checkpoint)
            inputs = [checkpoint / "checkpoints", checkpoint / "tokenizer"]
            options["--batch-size"] = generate.batch_size
        else:
            # The interpreter and the number of GPUs may change while a run goes on.
            prefix = f"{prefix} {shlex.quote(generate.python)}"
            suffix = ("--tensor-parallel-size", generate.tensor_parallel_size)
            suffix += ("--data-parallel", generate.data_parallel)
            worker = ("-m", "memphis_jax.rounds.generate", "--model", self.exported[checkpoint])
            inputs = [self.exported[checkpoint]]
            options["--rescore"] = rescore
        self.stage(
            name,
            (
                *(*worker, "--questions", *questions, "--out", out),
                # What an earlier run with other inputs left is of no use: the ledger has decided.
                *(*(word for pair in options.items() for word in pair), "--replace"),
            ),
            inputs=[*inputs, *questions],
            outputs=[out / "completions.jsonl"],
            prefix=prefix,
            suffix=suffix,
        )
        return out / "completions.jsonl"

    def parity(self, name: str, checkpoint: Path, questions: Path, completions: Path) -> None:
        """Stops the recipe where the trainer does not agree with what vLLM sampled."""
        generate = self.config.generate
        if generate.engine == "jax" or not generate.parity_completions:
            return
        out = self.workdir / "parity" / f"{name}.json"
        self.stage(
            name,
            (
                *(*MEMPHIS, "parity", "--checkpoint", checkpoint, "--completions", completions),
                *("--questions", questions, "--dtype", self.config.compute.dtype),
                *("--bound", generate.parity_bound, "--out", out),
            ),
            inputs=[checkpoint / "checkpoints", checkpoint / "tokenizer", questions, completions],
            outputs=[out],
            prefix=self.config.executor.train,
        )

    def greedy_parity(self, checkpoint: Path) -> None:
        """Before anything is sampled: greedy answers to 8 questions by both engines."""
        if self.config.generate.engine == "jax" or not self.config.generate.parity_completions:
            return
        questions = self.data / "train.jsonl"
        completions = self.sample(
            "start-greedy",
            checkpoint,
            [questions],
            self.workdir / "parity" / "start",
            num_samples=1,
            temperature=0.0,
            num_questions=8,
            seed=self.config.seed,
            rescore=8,
        )
        self.parity("start-parity", checkpoint, questions, completions)

    def grade(self, name: str, completions: Path, questions: list[Path], out: Path) -> None:
        self.stage(
            name,
            (
                *(*MEMPHIS, "grade", "--completions", completions),
                *("--out", out, "--questions", *questions),
            ),
            inputs=[completions, *questions],
            outputs=[out, out.with_suffix(".audit.json")],
        )

    def stage(
        self,
        name: str,
        command: tuple[Any, ...],
        inputs: list[Path],
        outputs: list[Path],
        prefix: str = "",
        suffix: tuple[Any, ...] = (),
    ) -> None:
        print(f"[{name}]", flush=True)
        stage = Stage(
            name,
            tuple(str(word) for word in command),
            tuple(inputs),
            tuple(outputs),
            tuple(shlex.split(prefix)),
            tuple(str(word) for word in suffix),
        )
        if not self.ledger.run(stage):
            print("    done before", flush=True)


def data_files(data: configs.DataConfig) -> list[Path]:
    """What examples are made of, as far as it lies here.

    What is no path is a name on the hub, or is missing, which `memphis data` tells.
    """
    paths = [data.train, data.validation, data.test, data.root, data.tokenizer, *data.evaluation]
    paths += [entry.path for entry in data.mixture.values()]
    return [Path(path) for path in paths if path and Path(path).exists()]
