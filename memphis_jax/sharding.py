"""How arrays lie on devices: one mesh, one table of path regexes, batches that hosts assemble.

Mesh axes: `data` (whole copies; several slices lie along it, over the data-centre network), `fsdp`
(parameters and optimizer state are divided, and so is the batch), `model` (heads, the MLP and the
vocabulary are divided, and between layers the positions of a row). Sharding only says where an
array lies: a step computes the same on every mesh. Imports `memphis_jax.config` only.

Axis letters: A micro-batch, B row, T position, N heads, H head dim, D model, F mlp, V vocabulary,
L layer, G group.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memphis_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "model")
ROWS = ("data", "fsdp")  # the axes that divide a batch

# Leaf path -> its dimensions on the mesh. The first match counts; what no rule names is whole on
# every device. The same paths, under opt_state/, name moments of the same shape; Adalite's second
# moment keeps one number per output feature.
RULES: tuple[tuple[str, P], ...] = (
    (r"second_moment/.*/(q|k|v|gate|up)_proj/kernel$", P(None, "model")),  # [L, out]
    (r"second_moment/.*/(o|down)_proj/kernel$", P(None, "fsdp")),  # [L, out]
    (r"second_moment/", P()),
    (r"(^|/)embed_tokens$", P("model", "fsdp")),  # [V, D]
    (r"(^|/)lm_head/kernel$", P("fsdp", "model")),  # [D, V]
    (r"/(q|k|v|gate|up)_proj/kernel$", P(None, "fsdp", "model")),  # [L, in, out]
    (r"/(o|down)_proj/kernel$", P(None, "model", "fsdp")),  # [L, in, out]
    (r"/(q|k|v)_proj/bias$", P(None, "model")),  # [L, out]
    (r"/(q|k)_layernorm/scale$", P(None, "model", None)),  # [L, N, H]
)
# Kind of an activation -> its dimensions on the mesh.
ACTIVATIONS: dict[str, P] = {
    "residual": P(ROWS, "model", None),  # [B, T, D], between and around the layers
    "whole": P(ROWS, None, None),  # [B, T, D], every position, for the vocabulary's matmul
    "heads": P(ROWS, None, "model", None),  # [B, T, N, H]
    "mlp": P(ROWS, None, "model"),  # [B, T, F]
    "head": P(None, "model"),  # [D, V], gathered once for all chunks of the logprobs
}


def make_mesh(
    data: int = 1, fsdp: int = -1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh of all `devices` (default: all that JAX has, of every host), axes `AXES`.

    One size may be -1, the devices left over. On several TPU slices `data` is a multiple of their
    number and runs over them first. Raises ConfigError where the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = MeshConfig(data, fsdp, model).sizes(len(devices))
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"} or {0}
    if sizes["data"] % len(slices):
        raise ConfigError(
            f"mesh.data = {sizes['data']} is not a multiple of the {len(slices)} slices: only "
            f"data runs over the network between slices; set mesh.data = {len(slices)}"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    split = {"allow_split_physical_axes": True}  # 2 x 8 of a 4 x 4 torus needs it
    if len(slices) > 1:
        inner, outer = (shape[0] // len(slices), *shape[1:]), (len(slices), 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def leaf_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """PartitionSpec of a leaf by its path, "layers/self_attn/q_proj/kernel", also under opt_state/.

    A vocabulary that its axis does not divide stays whole; all else was checked before.
    """
    if not shape:
        return P()
    spec = next((spec for pattern, spec in RULES if re.search(pattern, path)), P())
    axes = [
        axis if axis is None or dim % sizes[axis] == 0 else None
        for dim, axis in zip(shape, spec, strict=False)
    ]
    return P(*axes)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedSharding of any tree of (abstract) arrays: parameters, a whole TrainState.

    Parameters, optimizer state, RNG and counters all go through the one table `RULES`.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, leaf_spec(name, leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch, [A, B, T] or [A, G, R]: the second axis over data and fsdp."""
    return NamedSharding(mesh, P(None, ROWS))


def num_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, kind: str, *, mesh: Mesh) -> jax.Array:
    """`x` laid out as an activation of this kind (`ACTIVATIONS`); its values do not change."""
    spec = ACTIVATIONS[kind]
    if kind == "head":  # a vocabulary that `model` does not divide is whole
        spec = P(None, leaf_spec("lm_head/kernel", x.shape, dict(mesh.shape))[1])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


# --- batches that several hosts assemble


def row_shards(mesh: Mesh) -> list[list[int]]:
    """Which of the `num_shards` parts of a batch each process has on its devices, by process index.

    Raises ConfigError where two processes share some of their parts but not all: then they could
    not load disjoint data.
    """
    parts: dict[int, set[int]] = {}
    for at, device in np.ndenumerate(mesh.devices):
        part = at[0] * mesh.shape["fsdp"] + at[1]
        parts.setdefault(device.process_index, set()).add(part)
    sets = [sorted(parts[process]) for process in sorted(parts)]
    distinct = {tuple(own) for own in sets}
    if sum(map(len, distinct)) != num_shards(mesh) or len({len(own) for own in distinct}) != 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: its {len(sets)} hosts share rows of the batch unevenly; "
            "choose mesh.model so that it divides the devices of a host, or is a multiple of them"
        )
    return sets


def host_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """(index, count) of this process's share of every batch, as the loaders take them.

    Processes with the same rows (where `model` runs over hosts) have the same share.
    """
    sets = row_shards(mesh)
    distinct = sorted({tuple(own) for own in sets})
    return distinct.index(tuple(sets[process])), len(distinct)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, process: int) -> dict[str, jax.Array]:
    """The arrays of all hosts from this host's share [A, rows, ...], laid out by `batch_sharding`.

    `candidate_rows`, which count within this host's rows, then count within all of them.
    """
    own = row_shards(mesh)[process]
    at = {part: position for position, part in enumerate(own)}
    rows = batch["tokens"].shape[1] // len(own)  # of a device
    sharding = batch_sharding(mesh)

    def assemble(name: str, local: np.ndarray) -> jax.Array:
        size, rest = divmod(local.shape[1], len(own))
        if rest:
            raise ValueError(f"{name} {local.shape} does not divide over {len(own)} devices")
        if name == "candidate_rows":
            local = np.asarray(own, local.dtype)[local // rows] * rows + local % rows

        def part(where: Any) -> np.ndarray:  # the slices of one device
            start = at[(where[1].start or 0) // size] * size
            return local[:, start : start + size]

        shape = (local.shape[0], size * num_shards(mesh), *local.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: assemble(name, local) for name, local in batch.items()}
