"""lm-eval's own vLLM engine in the environment that has vLLM, asked from outside. No jax.

`VllmProcess` is an `LM` that starts `python -m memphis_jax.eval_vllm` with another interpreter and
hands it requests as JSON lines; that process loads the model once and answers with
`lm_eval.models.vllm_causallms.VLLM`. Of lm-eval only that engine runs there, so that environment
needs lm-eval without most of what it depends on (requirements/vllm-*.txt).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax.rounds.processes import DIE_WITH_PARENT


def start(python: str, model: Path, dtype: str) -> Any:
    """A running `VllmProcess`. Raises RuntimeError where it cannot be started."""
    from lm_eval.api.model import LM

    class VllmProcess(LM):
        def __init__(self) -> None:
            super().__init__()
            words = [python, "-m", "memphis_jax.eval_vllm", str(model), dtype]
            try:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    preexec_fn=DIE_WITH_PARENT,
                    # Its own division by the time on the bar fails where bars are off.
                    env={k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"},
                )
            except OSError as error:
                raise RuntimeError(
                    f"--python {python} cannot be run ({error}): `make vllm` builds .venv-vllm"
                ) from error
            self._read()  # ready

        def _read(self) -> Any:
            line = self.process.stdout.readline() if self.process.stdout else ""
            if not line.endswith("\n"):
                code = self.process.wait()
                raise RuntimeError(f"the vLLM process ended with code {code}: see above")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"vLLM: {answer['error']}")
            return answer["answers"]

        def _ask(self, method: str, requests: Sequence[Any]) -> Any:
            assert self.process.stdin is not None
            call = {"method": method, "args": [request.args for request in requests]}
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            return self._read()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._ask("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._ask("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._ask("generate_until", requests)

    return VllmProcess()


def serve(model: Path, dtype: str) -> None:
    """Loads the model, then answers one call per line of standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints: that must not come between the answers

    def say(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        engine = _load(model, dtype)
    except Exception as error:
        say(error=f"{type(error).__name__} while loading {model}: {' '.join(str(error).split())}")
        raise
    from lm_eval.api.instance import Instance

    say(answers=[])
    for line in sys.stdin:
        call = json.loads(line)
        kind = call["method"]
        requests = [Instance(kind, doc={}, arguments=tuple(args), idx=0) for args in call["args"]]
        say(answers=getattr(engine, kind)(requests, disable_tqdm=True))


def _load(model: Path, dtype: str) -> Any:
    """lm-eval's engine with the settings of `rounds.engine`: see there for the reasons."""
    from memphis_jax.rounds.shards import visible_gpus

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config = json.loads((model / "config.json").read_text("utf-8"))
    special = any(config.get(name) for name in ("qk_layernorm", "use_parallel_residual"))
    options: dict[str, Any] = {"model_impl": "transformers" if special else "vllm"}
    if not visible_gpus():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        context = config["max_position_embeddings"]
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 4096)}
    return _engine()(
        pretrained=str(model),
        dtype=dtype,
        batch_size="auto",
        generation_config="vllm",
        load_format="safetensors",
        hf_overrides={"head_dtype": "float32"},
        disable_log_stats=True,
        **options,
    )


def _engine() -> Any:
    """lm-eval's class. It asks for the version of the package "vllm", which is "vllm-cpu" here.

    Only its module is told so: vLLM itself finds out by that name which platform it is on.
    """
    from importlib import metadata

    import vllm
    from vllm.platforms import current_platform

    assert current_platform.device_type, "vLLM knows no platform for this machine"
    real = metadata.version

    def version(distribution_name: str) -> str:
        return vllm.__version__ if distribution_name == "vllm" else real(distribution_name)

    metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        metadata.version = real
    return VLLM


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
