"""One process per shard of a generation, each on GPUs of its own. No jax."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import takewhile
from typing import BinaryIO

from memphis_jax.rounds.processes import DIE_WITH_PARENT

WORKER = (sys.executable, "-m", "memphis_jax.rounds.generate")


def run_shards(argv: Sequence[str], count: int, gpus_each: int) -> None:
    """Runs the worker `count` times with --shard I/COUNT, at once, lines marked with the shard.

    On a GPU host each process sees `gpus_each` GPUs that no other sees; on a CPU it is bound to
    its share of the cores, where vLLM would bind all to the same. One that fails does not stop the
    others. Raises ValueError before the start where the GPUs do not suffice, and
    RuntimeError at the end, naming the failed ones and their last lines.
    """
    command = [*WORKER, *_without(argv, "--data-parallel")]
    gpus = visible_gpus()
    if gpus and len(gpus) < count * gpus_each:
        raise ValueError(
            f"--data-parallel {count} with --tensor-parallel-size {gpus_each} needs "
            f"{count * gpus_each} GPUs, this machine shows {len(gpus)}"
        )
    processes, threads, last = [], [], [""] * count
    try:
        for index in range(count):
            mine = gpus[index * gpus_each : (index + 1) * gpus_each]
            place = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else _cores(index, count)
            process = subprocess.Popen(
                [*command, "--shard", f"{index}/{count}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **place},
                preexec_fn=DIE_WITH_PARENT,
            )
            processes.append(process)
            assert process.stdout is not None
            thread = threading.Thread(target=_relay, args=(process.stdout, index, last))
            thread.start()
            threads.append(thread)
        codes = [process.wait() for process in processes]
    finally:  # interrupted: the threads end when the processes have
        for process in processes:
            process.kill()
    for thread in threads:
        thread.join()
    failed = [f"shard {i} (exit code {c}: {last[i]})" for i, c in enumerate(codes) if c]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {count} shards failed: {'; '.join(failed)}. The others are done; "
            "the same command samples only what is left"
        )


def visible_gpus() -> list[str]:
    """Names of the GPUs that CUDA would show to a new process; empty without any."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = (name.strip() for name in named.split(","))
        return list(takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _cores(index: int, count: int) -> dict[str, str]:
    """The cores of one of `count` processes, in vLLM's variable; nothing where they do not go."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < count or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return {}
    share = len(cores) // count
    mine = cores[index * share : (index + 1) * share]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, mine))}


def _relay(stream: BinaryIO, index: int, last: list[str]) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip()
        last[index] = text or last[index]
        print(f"[{index}] {text}", file=sys.stderr, flush=True)


def _without(argv: Sequence[str], option: str) -> list[str]:
    """`argv` without an option and its value, written as two words or as OPTION=VALUE."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != option and not word.startswith(option + "="):
            kept.append(word)
        skip = word == option
    return kept
