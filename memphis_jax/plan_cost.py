"""How much a step computes, and how fast a slice could do it at best.

FLOPs are counted in the step's jaxpr, where a scan says its length; the optimized program's own
count takes a loop's body once. Imports `config` and `plan_chips`.

Axis letters: B row, T position, D model, F mlp, V vocabulary, L layer, N heads, K kv-heads.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from memphis_jax.config import ModelConfig
from memphis_jax.plan_chips import Slice


def jaxpr_flops(jaxpr: Any, devices: int = 1) -> float:
    """FLOPs of all matrix products of a jaxpr, over all devices: 2 M N K each, as often as it runs.

    A shard_map's inner part runs on each of its mesh's devices. A Pallas kernel counts the products
    of its body by its grid; a grid [..., n, n] of splash visits the (n + 1) / 2n on and below the
    diagonal. Of a conditional's branches the dearest counts. Raises ValueError for matrix products
    in a `while`, whose length is unknown.
    """
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        inner = math.prod(left[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
    parts = [jaxpr_flops(inner) for inner in _inner(params)]
    if name == "cond":
        return max(parts)
    if name == "while" and sum(parts):
        raise ValueError(f"matrix products in a while loop: {equation.source_info}")
    times = 1.0
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = params["mesh"].size
    elif name == "pallas_call":
        times = _grid_points(params)
    return times * sum(parts)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters, closed ones opened; no rule of a gradient."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                yield one
            elif hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr


def _grid_points(params: dict[str, Any]) -> float:
    grid = params["grid_mapping"].grid
    points = float(math.prod(grid))
    if "splash" in str(params.get("name_and_src_info", params.get("name", ""))):
        points *= (grid[-1] + 1) / (2 * grid[-1])
    return points


def matmul_parameters(model: ModelConfig) -> tuple[int, int]:
    """(in all layers, in the output head): parameters that a token is multiplied with."""
    dim, inner = model.hidden_size, model.intermediate_size
    kv_dim = model.num_key_value_heads * model.head_dim
    layer = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * inner
    return model.num_hidden_layers * layer, dim * model.vocab_size


def model_flops(model: ModelConfig, seq_len: int, *, frozen_head: bool) -> float:
    """FLOPs per token that training needs, nothing recomputed: what MFU counts.

      6 P_layers + (4 if frozen_head else 6) P_head + 6 L T D

    2 P forward, 2 P for the inputs' and 2 P for the weights' gradient; causal attention 2 T D
    forward and twice that backward per layer (half of a full square; segments that end earlier are
    not deducted). PaLM (arXiv 2204.02311, appendix B) counts the whole square.
    """
    layers, head = matmul_parameters(model)
    attention = 6.0 * model.num_hidden_layers * seq_len * model.hidden_size
    return 6.0 * layers + (4.0 if frozen_head else 6.0) * head + attention


class Bounds(NamedTuple):
    """Least seconds of a step, each as if the others took none."""

    compute: float
    memory: float
    network: float  # between the chips of a slice
    dcn: float = 0.0  # between slices

    @property
    def seconds(self) -> float:
        """Least: all overlap without a gap."""
        return max(self)

    @property
    def name(self) -> str:
        return ("compute", "memory", "network", "DCN")[self.index(self.seconds)]

    @property
    def exposed(self) -> float:
        """Least where the networks hide behind nothing."""
        return max(self.compute, self.memory) + self.network + self.dcn


def bounds(
    flops: float, moved: float, ici: float, where: Slice, num_slices: int = 1, dcn: float = 0.0
) -> Bounds:
    """Bounds of a step of `flops` on all devices and `moved` HBM bytes on each.

    `ici` and `dcn` are bytes into each chip, over the slice's links and from other slices.
    """
    chips, chip = where.num_chips * num_slices, where.chip
    return Bounds(
        compute=flops / (chips * chip.flops),
        memory=moved * chip.devices / chip.hbm_bandwidth,
        network=ici / where.ici if where.ici else 0.0,
        dcn=dcn / chip.dcn,
    )
