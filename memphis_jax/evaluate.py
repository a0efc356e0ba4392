"""`memphis eval`: lm-evaluation-harness on a Hugging Face folder.

    HF folder + tasks -> OUT/requests.jsonl (answers, resumable) -> OUT/results.json, a table

Tasks, prompts, metrics and standard errors are lm-eval's; engines are lm-eval's `hf` and `vllm`,
and our own `jax` (`eval_lm`). The data of every task is opened before a model is loaded.
"""

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memphis_jax.progress import Progress
from memphis_jax.rounds.files import read_object, sha256_file, write_json, write_jsonl
from memphis_jax.rounds.ledger import locked
from memphis_jax.versions import versions

Row = dict[str, Any]

PACKAGES = {  # engine -> what decides its answers, beside lm-eval
    "jax": ("jax", "flax", "transformers", "tokenizers"),
    "hf": ("torch", "transformers", "tokenizers"),
    "vllm": (),  # of another environment: asked for there
}
SEED = 1234  # lm-eval's own: other seeds draw other few-shot examples
MODEL_FILES = (  # what decides an answer, beside *.safetensors
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


def evaluate(argv: Sequence[str]) -> None:
    args = _arguments(argv)
    _quiet(offline=bool(args.data_root))
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"lm-eval is missing ({error}): pip install -e '.[eval]' in the checkout"
        ) from error
    if args.engine == "hf" and (absent := [p for p in ("torch", "accelerate") if not find_spec(p)]):
        raise RuntimeError(
            f"--engine hf needs {' and '.join(absent)}: pip install 'lm-eval[hf]', or leave "
            "--engine out for our own on JAX"
        )
    model = describe(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        result = run(args, model)
    from memphis_jax.eval_table import show

    show(result)
    print(f"{args.out / 'results.json'}", file=sys.stderr)


def run(args: argparse.Namespace, model: Row) -> Row:
    """Evaluates, and writes OUT/results.json and OUT/samples/TASK.jsonl; returns the results."""
    from memphis_jax import eval_format, eval_tasks
    from memphis_jax.eval_cache import CachedLM

    names = [n for word in args.tasks for n in eval_tasks.PRESETS.get(word, (word,))]
    asked = eval_format.assemble(names, eval_tasks.load(names, args.data_root, args.out))
    identity = _identity(args, model)
    rows = 1024 if args.engine == "vllm" else 4 * args.batch_size
    lm = CachedLM(
        lambda: _engine(args, identity["dtype"], model["sha256"]),
        args.out / "requests.jsonl",
        identity,
        rows,
        lambda method, number: Progress(number, method),
    )
    begun = time.perf_counter()
    found = _harness(lm, asked, args)
    result = {
        "model": {"folder": str(args.model.resolve()), **model},
        "preset": args.tasks,
        **{name: value for name, value in identity.items() if name != "model"},
        "seed": args.seed,
        "limit": args.limit,
        "seconds": time.perf_counter() - begun,
        "answered": lm.computed,  # the others were in requests.jsonl
        "tasks": _scores(found, asked.about),
    }
    for task, samples in found["samples"].items():
        folder = args.out / "samples"
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / f"{task}.jsonl", json.loads(json.dumps(samples, default=str)))
    write_json(args.out / "results.json", result)
    shutil.rmtree(_checkpoint(args.out, model["sha256"]), ignore_errors=True)
    return result


def describe(folder: Path) -> Row:
    """{"sha256", "files"} of what decides a model's answers.

    Raises ValueError where the folder holds no model in safetensors.
    """
    paths = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in MODEL_FILES)]
    files = {path.name: sha256_file(path) for path in paths if path.is_file()}
    if not {"config.json", "tokenizer.json"} <= files.keys() or not any(
        name.endswith(".safetensors") for name in files
    ):
        raise ValueError(
            f"{folder} is no model folder: it needs config.json, tokenizer.json and *.safetensors "
            "(pickled weights are not read); `python -m convert to-hf` makes one of a checkpoint"
        )
    return {
        "sha256": sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "files": files,
    }


def _identity(args: argparse.Namespace, model: Row) -> Row:
    """What decides an answer beside the request."""
    config = read_object(args.model / "config.json")
    saved = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = saved if args.dtype == "auto" else args.dtype
    if args.engine == "jax" and dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"{args.model} is saved in {dtype}, --engine jax knows float32 and bfloat16: give one "
            "of them with --dtype"
        )
    return {
        "model": model["sha256"],
        "engine": args.engine,
        "dtype": dtype,
        "versions": versions(("lm_eval", *PACKAGES[args.engine])) | _vllm_version(args),
    }


def _vllm_version(args: argparse.Namespace) -> Row:
    if args.engine != "vllm":
        return {}
    ask = "import vllm, torch, json; print(json.dumps([vllm.__version__, torch.__version__]))"
    try:
        done = subprocess.run([args.python, "-c", ask], capture_output=True, text=True, check=True)
        vllm, torch = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise ValueError(
            f"--python {args.python} has no vLLM ({error}): `make vllm` builds .venv-vllm"
        ) from error
    return {"vllm": vllm, "torch": torch}


def _engine(args: argparse.Namespace, dtype: str, model_sha256: str) -> Any:
    """The model, loaded: at the first request that has no answer yet."""
    if args.engine == "vllm":
        from memphis_jax.eval_vllm import start

        return start(args.python, args.model, dtype)
    if args.engine == "hf":
        import torch
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=str(args.model),
            dtype=dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            batch_size=args.batch_size,
            use_safetensors=True,
        )
    return _jax_engine(args, dtype, model_sha256)


def _jax_engine(args: argparse.Namespace, dtype: str, model_sha256: str) -> Any:
    """Converted by a process, because this package does not import `convert`."""
    folder = _checkpoint(args.out, model_sha256)
    if not folder.is_dir():
        words = [sys.executable, "-m", "convert", "from-hf", str(args.model), str(folder)]
        if subprocess.run(words, stdout=sys.stderr).returncode:
            raise ValueError(f"{args.model} cannot be converted: see above")
    from transformers import AutoTokenizer

    from memphis_jax import checkpoint
    from memphis_jax.eval_lm import JaxLM
    from memphis_jax.runtime import start_jax

    start_jax(dtype)
    weights, _ = checkpoint.restore_model(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return JaxLM(weights, tokenizer, dtype=dtype, batch_size=args.batch_size)


def _checkpoint(out: Path, model_sha256: str) -> Path:
    """The converted model; it goes when the evaluation has ended."""
    return out / f"checkpoint-{model_sha256[:16]}"


def _harness(lm: Any, asked: Any, args: argparse.Namespace) -> Row:
    """lm-eval's `evaluate`, prepared as its `simple_evaluate` does."""
    import lm_eval.evaluator
    import numpy as np

    random.seed(0)
    np.random.seed(args.seed)
    for task in asked.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=args.seed)
    found = lm_eval.evaluator.evaluate(
        lm, {"tasks": asked.tasks, "groups": asked.groups}, limit=args.limit or None
    )
    assert found is not None  # one process
    return found


def _scores(found: Row, about: dict[str, Row]) -> Row:
    """{task or group: {metrics: {"metric,filter": {value, stderr}}, ...what was measured}}."""
    tasks: Row = {}
    for name, values in found["results"].items():
        metrics = {
            key: {"value": value, "stderr": _number(values.get(_stderr_key(key)))}
            for key, value in values.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
        if not metrics:
            continue  # a group without a score of its own
        samples = found.get("n-samples", {}).get(name, {})
        tasks[name] = {
            "metrics": metrics,
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "questions": samples.get("effective"),
            "of": samples.get("original"),
            **about.get(name, {"members": found.get("group_subtasks", {}).get(name, [])}),
        }
        if name in found["samples"]:
            asked = [sample["arguments"] for sample in found["samples"][name]]
            text = json.dumps(asked, sort_keys=True, default=str)
            tasks[name]["requests_sha256"] = sha256(text.encode()).hexdigest()
    return tasks


def _stderr_key(key: str) -> str:
    metric, _, name = key.partition(",")
    return f"{metric}_stderr,{name}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None  # lm-eval writes "N/A"


def _quiet(offline: bool) -> None:
    """Before the libraries are imported: no bars of theirs, and no network for local data."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memphis eval",
        description="Evaluate an HF folder with lm-evaluation-harness. Started again with the same "
        "--out, it goes on after the last answered block of requests.",
        epilog="Presets: memphis (the card's: gsm8k, agieval_nous, bbh_cot_fewshot; stock files) "
        "and memphis-format (the same questions as Rationale / Answer, graded as in training; one "
        "of them: gsm8k_memphis, agieval_sat_math_memphis, bbh_cot_fewshot_navigate_memphis). "
        "docs/eval.md tells what the scores mean.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="HF_DIR", help="config, tokenizer and safetensors")
    add(
        *("--tasks", "-t"),
        required=True,
        type=lambda text: [word.strip() for word in text.split(",") if word.strip()],
        help="presets, and tasks or groups of lm-eval, with commas between",
    )
    add("--out", required=True, type=Path, help="folder for answers and results.json")
    add("--engine", default="jax", choices=tuple(PACKAGES), help="what runs the model")
    add("--data-root", type=Path, help="read the questions from files below this folder only")
    add("--limit", type=int, default=0, help="the first N questions of each task; 0 = all")
    add("--seed", type=int, default=SEED, help="of the few-shot examples")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of weights and compute; auto = as the folder says",
    )
    add("--batch-size", type=int, default=32, help="sequences decoded at once (jax, hf)")
    add("--python", default=".venv-vllm/bin/python", help="vllm: the interpreter that has it")
    args = parser.parse_args(argv)
    for name in ("batch_size", "limit"):
        if getattr(args, name) < (name == "batch_size"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    if not args.tasks:
        parser.error("--tasks is empty: name tasks, or the preset memphis")
    if args.engine == "jax" and args.dtype == "float16":
        parser.error("--dtype float16: --engine jax knows float32 and bfloat16")
    if args.data_root and not args.data_root.is_dir():
        parser.error(f"--data-root {args.data_root} is not a folder")
    return args
