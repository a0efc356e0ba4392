"""Which micro-batch, remat policy and mesh a phase should run with on a slice: few compiles.

Memory and time of every candidate are predicted from formulas; the best that should fit is compiled
for the slice. What the compiler says corrects the predictions, and so on until the best is one that
was compiled. Imports `config`, `plan_chips`, `plan_cost` and `plan_compile`.

Axis letters: T position, D model, F mlp, L layer, N heads.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from memphis_jax.config import REMAT, ConfigError, MeshConfig, RunConfig, check_mesh
from memphis_jax.plan_chips import Slice
from memphis_jax.plan_compile import Compiled, Request
from memphis_jax.plan_cost import Bounds, bounds, matmul_parameters, model_flops

MARGIN = 0.97  # of the memory, that a prediction may fill
# Bytes per token and (D + F) that a layer's backward pass works with, beside what was kept: fitted
# to a 3B model with full remat, 8 rows of 4096 tokens on v5e:4x4 (docs/plan.md).
WORKING = 18.5


@dataclass(frozen=True)
class Candidate:
    """One way to run a phase: `rows` of seq_len tokens at once on a device, accumulated."""

    mesh: tuple[int, int, int]  # data, fsdp, model
    rows: int  # of a micro-batch on each device that has rows of its own
    groups: int  # rank: pairs of a micro-batch on each such device
    accumulation: int
    remat: str

    @property
    def shards(self) -> int:
        return self.mesh[0] * self.mesh[1]

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        return f"mesh {mesh}, {self.accumulation} x {self.rows} rows, remat {self.remat}"


@dataclass(frozen=True)
class Job:
    """A phase of a config on a slice."""

    config: RunConfig
    phase: str
    where: Slice
    num_slices: int
    tokens_per_pair: int

    @property
    def name(self) -> str:
        return f"{self.num_slices} x {self.where.name}" if self.num_slices > 1 else self.where.name

    @property
    def settings(self) -> Any:
        return self.config.sft if self.phase == "sft" else self.config.rank

    @property
    def num_devices(self) -> int:
        return self.where.num_devices * self.num_slices

    def tokens(self, candidate: Candidate) -> int:
        """Positions of an optimizer step, padding too."""
        rows = candidate.rows * candidate.shards * candidate.accumulation
        return rows * self.settings.seq_len

    def candidate(self, mesh: MeshConfig, accumulation: int, remat: str) -> Candidate:
        """Raises ConfigError where model or batch do not divide over the mesh."""
        sizes = mesh.sizes(self.num_devices)
        settings = dataclasses.replace(self.settings, accumulation=accumulation)
        check_mesh(self.config.model, sizes, {self.phase: settings})
        share = settings.batch_size // accumulation // (sizes["data"] * sizes["fsdp"])
        rows, groups = share, 0
        if self.phase == "rank":
            rows, groups = -(-share * self.tokens_per_pair // settings.seq_len), share
        return Candidate(
            (sizes["data"], sizes["fsdp"], sizes["model"]), rows, groups, accumulation, remat
        )

    def request(self, candidate: Candidate) -> tuple[RunConfig, Request]:
        """What `plan_compile.compile_step` takes."""
        config = dataclasses.replace(
            self.config,
            mesh=MeshConfig(*candidate.mesh),
            compute=dataclasses.replace(self.config.compute, remat=candidate.remat),
            **{self.phase: dataclasses.replace(self.settings, accumulation=candidate.accumulation)},
        )
        rows, groups = candidate.rows * candidate.shards, candidate.groups * candidate.shards
        return config, Request(self.phase, self.where.name, self.num_slices, rows, groups)

    def bounds(self, found: Compiled) -> Bounds:
        """Of an optimizer step that was compiled."""
        flops = found.flops * self.passes
        return bounds(flops, found.moved, found.ici, self.where, self.num_slices, found.dcn)

    @property
    def passes(self) -> int:
        """Products of bfloat16 that a product of compute.dtype takes: JAX's bfloat16_6x."""
        return 6 if self.config.compute.dtype == "float32" else 1

    def model_flops(self, candidate: Candidate) -> float:
        frozen = self.settings.optimizer.freeze_embeddings
        per_token = model_flops(self.config.model, self.settings.seq_len, frozen_head=frozen)
        return self.tokens(candidate) * per_token


def candidates(job: Job) -> Iterator[Candidate]:
    """All ways that divide: `data` runs over slices, the rest of them over `fsdp` and `model`."""
    batch, devices = job.settings.batch_size, job.where.num_devices
    for model in (1, 2, 4, 8):
        if devices % model:
            continue
        mesh = MeshConfig(job.num_slices, devices // model, model)
        for accumulation in (n for n in range(1, batch + 1) if batch % n == 0):
            for remat in REMAT:
                try:
                    yield job.candidate(mesh, accumulation, remat)
                except ConfigError:
                    continue


def predicted_memory(job: Job, candidate: Candidate) -> float:
    """Bytes on a device: float32 parameters and gradients, what is kept, what is worked with."""
    model, length = job.config.model, job.settings.seq_len
    layers, head = matmul_parameters(model)
    dim, inner, parts = model.hidden_size, model.intermediate_size, candidate.mesh[2]
    divided = candidate.mesh[1] * parts
    embeddings = head * (1 if model.tie_word_embeddings else 2)
    copies = 2 if candidate.accumulation > 1 else 1  # of the gradients
    state = 4.0 * (layers * (1 + copies) + embeddings) / divided
    width = 2 if job.config.compute.dtype == "bfloat16" else 4
    kv_dim = model.num_key_value_heads * model.head_dim
    products = dim + 2 * kv_dim + 2 * inner + 2 * dim  # q, k, v, gate, up, o_proj, down_proj
    attended = dim + 2 * model.num_attention_heads  # and row sums
    kept = {
        "full": dim,
        "attention": dim + attended,
        "dots": dim + products + attended,
        "none": 26 * dim + products,  # fitted: norms and rotary keep float32
    }[candidate.remat]
    tokens = candidate.rows * length / parts
    # Two layers' weights, gathered, in the compute dtype, and their gradients.
    gathered = 3.0 * width * layers / model.num_hidden_layers / parts
    logits = 3.0 * 4 * min(job.config.compute.logprob_chunk, candidate.rows * length)
    return (
        state
        + gathered
        + logits * model.vocab_size / parts
        + tokens * (width * kept * model.num_hidden_layers + WORKING * (dim + inner))
    )


def predicted_seconds(job: Job, candidate: Candidate) -> float:
    """Of an optimizer step at full speed, without the memory's part and the networks' beside it."""
    model, tokens = job.config.model, job.tokens(candidate)
    layers, head = matmul_parameters(model)
    attention = 2.0 * model.num_hidden_layers * job.settings.seq_len * model.hidden_size
    again = {
        "full": 2.0 * layers * 0.78 + attention,  # all but down_proj's product
        "attention": 2.0 * layers * 0.78,
        "dots": 0.0,
        "none": 0.0,
    }[candidate.remat]
    if not job.settings.optimizer.freeze_embeddings:
        again += 2.0 * head  # the logits
    flops = job.model_flops(candidate) + tokens * again
    ici, dcn = predicted_traffic(job, candidate)
    bound = bounds(flops * job.passes, 0.0, ici, job.where, job.num_slices, dcn)
    # On a tie the plain mesh: what `model` costs beside bytes is not in here.
    return bound.exposed * (1.05 if candidate.mesh[2] > 1 else 1.0)


def predicted_traffic(job: Job, candidate: Candidate) -> tuple[float, float]:
    """Bytes into a chip in an optimizer step: over its slice's links, and from other slices."""
    model, cores = job.config.model, job.where.chip.devices
    layers, head = matmul_parameters(model)
    data, fsdp, parts = candidate.mesh
    # Weights are gathered in bfloat16 forward and backward, gradients are reduced in float32, of
    # every micro-batch.
    weights = candidate.accumulation * (4.0 * (layers + head) + 4.0 * layers) / parts
    ici = weights * _into_chip(fsdp, cores // parts, cores)
    if parts > 1:  # a layer's input and output, twice forward, again, and backward
        inputs = job.tokens(candidate) / candidate.shards * model.hidden_size * 2.0
        ici += inputs * 12 * model.num_hidden_layers * _into_chip(parts, cores, cores)
    gradients = candidate.accumulation * 8.0 * layers / (fsdp * parts)
    ici += gradients * _into_chip(data // job.num_slices, 1, cores)
    return ici, gradients * cores * (job.num_slices - 1) / job.num_slices


def _into_chip(group: int, here: int, cores: int) -> float:
    """Of what each group of devices gathers, all that a chip takes in: `here` of a group are on it.

    `model`, the last axis of the mesh, lies over a chip's devices first.
    """
    here = min(max(here, 1), group)
    return cores / here * (group - here) / group


class Search:
    """What was compiled for a job, and what that says of the rest."""

    def __init__(self, job: Job, compile_one: Callable[[Job, Candidate], Compiled]):
        self.job = job
        self.found: dict[Candidate, Compiled] = {}
        self._compile = compile_one
        self._all = sorted(
            candidates(job), key=lambda one: (predicted_seconds(job, one), one.accumulation)
        )
        if not self._all:
            sizes = f"{job.num_devices} devices of {job.name}"
            raise ConfigError(
                f"{job.phase}.batch_size = {job.settings.batch_size} does not divide over the "
                f"{sizes}, with mesh.model up to 8; make it a multiple, or take a smaller slice"
            )

    def memory(self, candidate: Candidate) -> float:
        """Bytes on a device: said by the compiler, or predicted and corrected by what it said.

        With two compiled of the same mesh and policy memory is a line in the rows, with one the
        prediction is moved to go through it; with none it is moved by what was off elsewhere.
        """
        if candidate in self.found:
            return self.found[candidate].peak
        predicted = predicted_memory(self.job, candidate)
        like = {
            one.rows: said.peak
            for one, said in self.found.items()
            if (one.mesh, one.remat) == (candidate.mesh, candidate.remat)
        }
        if len(like) >= 2:
            (x0, y0), *_, (x1, y1) = sorted(like.items())
            return y0 + (y1 - y0) * (candidate.rows - x0) / (x1 - x0)
        near = self._nearest(candidate, self.found)
        if near is None:
            return predicted
        return predicted * self.found[near].peak / predicted_memory(self.job, near)

    def run(self, most: int) -> Candidate | None:
        """The best that fits, compiled; None if nothing does, then the smallest was compiled."""
        limit = self.job.where.chip.hbm / self.job.where.chip.devices
        for _ in range(most):
            limit = next((said.limit for said in self.found.values()), limit)
            fitting = [one for one in self._all if self.memory(one) <= self._room(one, limit)]
            best = min(fitting, key=self.seconds) if fitting else min(self._all, key=self.memory)
            if best in self.found:
                break
            self.found[best] = self._compile(self.job, best)
        kept = [one for one, said in self.found.items() if said.fits]
        return min(kept, key=self.seconds, default=None)

    def _room(self, candidate: Candidate, limit: float) -> float:
        return limit if candidate in self.found else MARGIN * limit

    def seconds(self, candidate: Candidate) -> float:
        """Of a step, its networks hidden behind nothing: as compiled, or predicted and corrected.

        The correction is by what was off where a step like it was compiled and fits: the prediction
        knows nothing of the memory's part.
        """
        if candidate in self.found:
            return self.job.bounds(self.found[candidate]).exposed
        predicted = predicted_seconds(self.job, candidate)
        if near := self._nearest(candidate, [one for one, said in self.found.items() if said.fits]):
            predicted *= self.seconds(near) / predicted_seconds(self.job, near)
        return predicted

    @staticmethod
    def _nearest(candidate: Candidate, among: Iterable[Candidate]) -> Candidate | None:
        def distance(one: Candidate) -> tuple[bool, bool, int]:
            other = one.remat != candidate.remat, one.mesh != candidate.mesh
            return *other, abs(one.rows - candidate.rows)

        return min(among, key=distance, default=None)

    def ranking(self, most: int = 5) -> list[Candidate]:
        """What should fit, fastest first: of each mesh and policy the best micro-batch."""
        limit = next(iter(self.found.values())).limit
        rows: dict[Any, Candidate] = {}
        for one in sorted(self._all, key=lambda one: (self.seconds(one), one.accumulation)):
            if self.memory(one) <= self._room(one, limit):
                rows.setdefault((one.mesh, one.remat), one)
        return list(rows.values())[:most]
