"""What a compiled step moves over the networks: between the chips of a slice, and between slices.

Read from the optimized HLO. A program of several slices is one of each slice: its collectives stay
inside, what crosses is sent and received through the hosts. Imports `plan_hlo` only.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from memphis_jax.plan_hlo import Computation, Instruction, Module, called, executed, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN = " between slices"  # after the kind of what crosses


@dataclass
class Traffic:
    """Of one kind of collective in one step."""

    count: int = 0  # times one runs
    payload: float = 0.0  # bytes of the whole array: gathered, or before it is reduced
    wire: float = 0.0  # bytes that a device takes in, at least
    ici: float = 0.0  # bytes that a chip takes in over its links, at least
    dcn: float = 0.0  # bytes that a chip takes in from other slices, at least


def collectives(
    module: Module, chips: Sequence[int] | None = None, num_slices: int = 1
) -> dict[str, Traffic]:
    """Traffic of each kind of collective that runs in a step; " between slices" apart.

    `chips` is the chip of each device of a slice, in the mesh's order; without it each is a chip.
    A chain of asynchronous fusions repeats its collective in every link: only the first counts.
    Least bytes into a device, for groups of n and b bytes of payload: all-gather, reduce-scatter
    and all-to-all b (n - 1) / n, all-reduce twice that, collective-permute b.
    """
    found: dict[str, Traffic] = {}
    places = tuple(chips) if chips else None
    cores = max(map(places.count, places)) if places else 1
    for computation, instruction, times in executed(module):
        if sent := _between_slices(module.computations[computation], instruction):
            kind, payload = sent
            payload *= num_slices if kind == "all-gather" else 1
            wire = payload * _share(kind, (num_slices - 1) / num_slices)
            _add(found, kind + BETWEEN, times, payload, wire, dcn=wire * cores)
            continue
        for where, one in _collectives_in(module, computation, instruction):
            if _continues(where, module.computations[where]):
                continue
            kind = one.opcode.removesuffix("-start")
            if where.startswith("all-reduce-scatter"):  # how a TPU fuses a reduce-scatter
                kind = "reduce-scatter"
            group = group_size(one.attributes)
            given = sum(size(module.computations[where][name].shape) for name in one.operands)
            payload = given * group if kind == "all-gather" else given
            wire = payload * _share(kind, (group - 1) / group)
            links = payload * _chip_share(kind, one.attributes, places) if places else wire
            _add(found, kind, times, payload, wire, ici=links)
    return found


def _add(
    found: dict[str, Traffic],
    kind: str,
    times: int,
    payload: float,
    wire: float,
    *,
    ici: float = 0.0,
    dcn: float = 0.0,
) -> None:
    traffic = found.setdefault(kind, Traffic())
    traffic.count += times
    traffic.payload += times * payload
    traffic.wire += times * wire
    traffic.ici += times * ici
    traffic.dcn += times * dcn


def _share(kind: str, outside: float) -> float:
    """Of the payload, what one of a group takes in, of which `outside` lies with the others."""
    return {"collective-permute": 1.0, "all-reduce": 2 * outside}.get(kind, outside)


def _chip_share(kind: str, attributes: str, chips: tuple[int, ...]) -> float:
    """Of the payload, what the chip that takes in most has to get over its links.

    Devices of a chip reach each other without them. Of what is gathered or reduced a group's
    devices on a chip need one copy; of what is exchanged each its own.
    """
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes.partition("source_target_pairs=")[2])
        into = [chips[int(b)] for a, b in pairs if chips[int(a)] != chips[int(b)]]
        return float(max(map(into.count, into), default=0))
    taken = dict.fromkeys(chips, 0.0)
    for group in groups(attributes, len(chips)):
        on = [chips[device] for device in group]
        for chip in set(on):
            here = on.count(chip)
            copies = here if kind == "all-to-all" else 1
            taken[chip] += copies * _share(kind, (len(on) - here) / len(on))
    return max(taken.values())


def _between_slices(computation: Computation, instruction: Instruction) -> tuple[str, float] | None:
    """(kind, bytes that a device sends) of a transfer to other slices, through the host."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or not found:
        return None
    kind = found[1].lower().replace("_", "-")
    kind = kind if kind in KINDS else "collective-permute"  # one to one
    return kind, size(computation[instruction.operands[0]].shape)


def _collectives_in(
    module: Module, computation: str, instruction: Instruction
) -> Iterator[tuple[str, Instruction]]:
    if instruction.opcode.removesuffix("-start") in KINDS:
        yield computation, instruction
    # What the SparseCore does for the chip is in `called_computations`.
    for name in ("calls", "called_computation", "called_computations"):
        if inner := called(instruction, name):
            for one in module.computations[inner].values():
                yield from _collectives_in(module, inner, one)


def _continues(name: str, computation: Computation) -> bool:
    """Whether a fused computation only goes on with a collective that an earlier one started."""
    return name.startswith("async_collective_fusion") or any(
        '"AsyncCollectiveDone"' in one.attributes for one in computation.values()
    )


def group_size(attributes: str) -> int:
    """Devices in a group, 1 where an instruction has none."""
    return len(groups(attributes, 1)[0])


def groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """All groups of {{0,1},{2,3}}, [groups,size]<=[...]T(...), or mesh['x'=8,'y'=2] {'x'}.

    Each of `devices` alone where an instruction has none.
    """
    text = attributes.partition("replica_groups=")[2]
    found = re.match(r"mesh\[[^\]]*\]\s*\{[^}]*\}|\[[^ ]*|\{\{[\d,{}]*\}\}", text)
    return _expand(found[0]) if found else tuple((one,) for one in range(devices))


@lru_cache
def _expand(text: str) -> tuple[tuple[int, ...], ...]:
    if text.startswith("{"):
        rows = [list(map(int, row.split(","))) for row in re.findall(r"[\d,]*\d", text)]
        return tuple(map(tuple, rows))
    if text.startswith("["):
        count, each = map(int, re.findall(r"\d+", text.partition("<=")[0]))
        dims, _, order = text.partition("<=")[2].partition("T")
        shape = list(map(int, re.findall(r"\d+", dims)))
        axes = list(map(int, re.findall(r"\d+", order))) or list(range(len(shape)))
        grid = np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(count, each)
    else:
        mesh, _, inside = text.partition("]")
        sizes = {name: int(n) for name, n in re.findall(r"'([\w.]+)'=(\d+)", mesh)}
        along = re.findall(r"'([\w.]+)'", inside)
        names = list(sizes)
        order_of = [names.index(name) for name in names if name not in along]
        order_of += [names.index(name) for name in along]
        each = math.prod(sizes[name] for name in along)
        grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        grid = grid.transpose(order_of).reshape(-1, each)
    return tuple(tuple(int(one) for one in row) for row in grid)
