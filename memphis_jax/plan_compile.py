"""One training step compiled for a TPU slice, in a process of its own: what it needs and moves.

`compile_step` starts that process (1-2 GB of memory, minutes for a 3B model) and `main` is it. A
result is cached by what decides it: the lowered program, the slice, and the compiler.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memphis_jax import config as configs
from memphis_jax import plan_hlo, plan_traffic
from memphis_jax.config import ConfigError, RunConfig
from memphis_jax.plan_chips import parse_slice, slice_devices
from memphis_jax.plan_cost import jaxpr_flops

GIB = 2**30
CANDIDATES = 2  # chosen and rejected: R of a pair


@dataclass(frozen=True)
class Request:
    """A step to compile: phase and slice; the rest is in the config."""

    phase: str  # "sft" or "rank"
    topology: str
    num_slices: int
    rows: int  # of seq_len tokens in a micro-batch
    groups: int = 0  # rank: pairs in a micro-batch


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step; sizes in bytes on each device."""

    parameters: int
    optimizer: int
    gradients: int  # of the trainable parameters, float32
    peak: float  # at once; where it does not fit: what it would need
    limit: float  # what the compiler may use
    flops: float  # of all devices
    moved: float = 0.0  # HBM bytes
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # that it took to compile
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # the compiler's own account

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def wire(self) -> float:
        return self._sum("wire")

    @property
    def ici(self) -> float:
        """Bytes into each chip over the links of its slice."""
        return self._sum("ici")

    @property
    def dcn(self) -> float:
        """Bytes into each chip from other slices."""
        return self._sum("dcn")

    def _sum(self, name: str) -> float:
        return sum(one[name] for one in self.collectives.values())

    @property
    def activations(self) -> float:
        """All but parameters, optimizer state and gradients: activations and working space."""
        return self.peak - self.parameters - self.optimizer - self.gradients


class CompileFailed(RuntimeError):
    """The compiler's process ended without a result."""


def cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "memphis_jax" / "plan"


def compile_step(config: RunConfig, request: Request) -> Compiled:
    """`request` compiled for its slice in a new process, or what the cache holds of it.

    Raises ConfigError where the config does not fit the slice, CompileFailed for anything else.
    """
    asked = {"config": dataclasses.asdict(config), "request": dataclasses.asdict(request)}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "memphis_jax.plan_compile"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise CompileFailed(
            f"{request.topology}: the compiler's process ended with {done.returncode}:\n{last}"
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ConfigError(answer["error"])
    return Compiled(**answer)


def main() -> None:
    """Reads {config, request} as JSON from standard input, prints the Compiled as JSON."""
    asked = json.load(sys.stdin)
    config = configs.build(RunConfig, asked["config"])
    try:
        answer = dataclasses.asdict(_compile(config, Request(**asked["request"])))
    except ConfigError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


def _compile(config: RunConfig, request: Request) -> Compiled:
    import jax

    from memphis_jax import train_step
    from memphis_jax.sharding import make_mesh

    # Kernels carry the file and line that they come from: a checkout elsewhere, or a comment more,
    # would be another program to the cache.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if config.compute.dtype == "float32":  # as `runtime.start_jax` does on the TPU
        jax.config.update("jax_default_matmul_precision", "highest")
    where = parse_slice(request.topology)
    devices = slice_devices(where, request.num_slices)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    settings = config.sft if request.phase == "sft" else config.rank
    state = train_step.abstract_state(config.model, settings, mesh)
    batch = abstract_batch(settings, request, mesh)
    # The schedule is part of the program, its length is not known here: any number does.
    step = train_step.make_step(request.phase, settings, config.compute, 1000, mesh)
    traced = step.trace(state, batch)
    lowered = traced.lower(lowering_platforms=("tpu",))
    on_each: dict[str, Any] = {
        "parameters": _bytes_on_each(state.model),
        "optimizer": _bytes_on_each(state.opt_state),
        "gradients": _bytes_on_each(_trainable(state.model, settings)),
        "flops": jaxpr_flops(traced.jaxpr.jaxpr),
    }
    key = _key(lowered.as_text(), [device.id for device in mesh.devices.flat], request)
    saved = cache_folder() / f"{key}.json"
    hlo = saved.with_suffix(".hlo.gz")
    if saved.exists():
        said = json.loads(saved.read_text())
    else:
        start = time.perf_counter()
        said, text = _ask_compiler(lowered)
        said |= {"limit": _limit(devices[0], jax), "seconds": time.perf_counter() - start}
        saved.parent.mkdir(parents=True, exist_ok=True)
        _publish(hlo, gzip.compress(text.encode()))
        _publish(saved, json.dumps(said).encode())
    if text := gzip.decompress(hlo.read_bytes()).decode():
        module = plan_hlo.parse(text)
        chips = _chips(mesh, where.num_devices)
        found = plan_traffic.collectives(module, chips, request.num_slices)
        said["moved"] = plan_hlo.memory_traffic(module)
        said["collectives"] = {kind: dataclasses.asdict(one) for kind, one in found.items()}
    return Compiled(**on_each, **said)


def abstract_batch(settings: Any, request: Request, mesh: Any) -> dict[str, Any]:
    """The arrays of the phase's loader (`data.packing`), [A, B, T] and [A, G, R], as shapes."""
    import jax
    import numpy as np

    from memphis_jax.sharding import batch_sharding

    sharding = batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((settings.accumulation, *shape), dtype, sharding=sharding)

    rows = (request.rows, settings.seq_len)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: array(np.int32, *rows) for name in names}
    batch["loss_mask"] = array(np.bool_, *rows)
    if request.phase == "rank":
        groups = (request.groups, CANDIDATES)
        batch["rank_mask"] = array(np.bool_, *rows)
        for name in ("candidate_rows", "candidate_segments", "ranks"):
            batch[name] = array(np.int32, *groups)
    return batch


def _chips(mesh: Any, count: int) -> list[int]:
    """The chip of each of the first slice's `count` devices, in the mesh's order."""
    coords = [tuple(device.coords) for device in mesh.devices.flat][:count]
    return [coords.index(one) for one in coords]


def _bytes_on_each(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one device, by their shardings."""
    import math

    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _trainable(model: Any, settings: Any) -> Any:
    from memphis_jax.optimizer import is_embedding, partition

    freeze = is_embedding if settings.optimizer.freeze_embeddings else lambda _: False
    return partition(model, freeze)[0]


def _ask_compiler(lowered: Any) -> tuple[dict[str, Any], str]:
    """({peak, sizes}, the optimized program); {peak} and "" for a program that does not fit.

    The program is taken from the compiler's dump: jaxlib's `as_text` refuses what newer compilers
    write for v5p (asynchronous work of the SparseCore).
    """
    from jax.errors import JaxRuntimeError

    with tempfile.TemporaryDirectory(prefix="memphis-plan-") as dump:
        try:
            compiled = lowered.compile(
                compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            )
        except JaxRuntimeError as error:
            needed, _ = _out_of_memory(error)
            return {"peak": needed}, ""
        (text,) = (path.read_text() for path in Path(dump).glob("*.after_optimizations.txt"))
    memory = compiled.memory_analysis()
    names = ("argument_size", "output_size", "alias_size", "temp_size", "generated_code_size")
    sizes = {name: getattr(memory, f"{name}_in_bytes") for name in names}
    sizes["peak_memory"] = memory.peak_memory_in_bytes
    allocated = sum(sizes[name] for name in names) - 2 * sizes["alias_size"]
    return {"peak": max(allocated, sizes["peak_memory"]), "sizes": sizes}, text


def _out_of_memory(error: Exception) -> tuple[float, float]:
    """(bytes needed, bytes there) of the compiler's error; raises it again where it is another."""
    text = str(error)
    found = re.search(r"\(([\d.]+)([MGT])\) exceeds available HBM \(([\d.]+)G\)", text)
    found = found or re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)G hbm", text)
    if not found:
        raise error
    return float(found[1]) * {"M": 2**20, "G": GIB, "T": 2**40}[found[2]], float(found[3]) * GIB


def _limit(device: Any, jax: Any) -> float:
    """HBM bytes that the compiler may use on a device: it says so where a program needs more."""
    from jax.errors import JaxRuntimeError
    from jax.sharding import SingleDeviceSharding

    x = jax.ShapeDtypeStruct(
        (2**16, 2**12, 2**12), "float32", sharding=SingleDeviceSharding(device)
    )
    try:
        jax.jit(lambda x: 2 * x).trace(x).lower(lowering_platforms=("tpu",)).compile()
    except JaxRuntimeError as error:
        return _out_of_memory(error)[1]
    raise CompileFailed(f"4 TB fit into {device}: the compiler's limit is not known")


def _key(program: str, device_ids: list[int], request: Request) -> str:
    from memphis_jax.train_step import COMPILER_OPTIONS
    from memphis_jax.versions import versions

    decides = {
        "options": COMPILER_OPTIONS["tpu"],
        "program": hashlib.sha256(program.encode()).hexdigest(),
        "devices": device_ids,
        "topology": [request.topology, request.num_slices],
        "versions": versions(("jax", "jaxlib", "libtpu")),
        "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def _publish(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


if __name__ == "__main__":
    main()
