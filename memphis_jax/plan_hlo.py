"""A compiled step's optimized HLO, what runs in it and how often, and the memory traffic of that.

XLA's own cost analysis counts the body of a loop once. Here each computation is walked as often as
it runs: the body of `while` as many times as its condition says. `plan_traffic` reads collectives
from it. Imports nothing of ours, no jax.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0}

ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    name: str
    shape: str  # "f32[8,128]{1,0:T(8,128)S(1)}", or a tuple of such
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computation = dict[str, Instruction]


class Module(NamedTuple):
    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """The computations of an HLO module's text."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif re.match(r"\}(,|\s|$)", line):  # a kernel's own text may begin a line with }}
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return Module(entry, computations)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside.strip(),)
    return Instruction(
        match[2], shape, rest[:opening], operands, rest[closing + 1 :], bool(match[1])
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def size(shape: str, *, memory: bool = False) -> float:
    """Bytes of a shape, of all elements of a tuple; memory=True counts only what is in HBM.

    A layout that ends in S(n) names another memory space, such as VMEM.
    """
    total = 0.0
    for kind, dims, layout in ARRAY.findall(shape):
        if memory and "S(" in layout:
            continue
        total += BYTES.get(kind, 1 if kind.startswith("f8") else 0) * math.prod(
            int(n) for n in dims.split(",") if n
        )
    return total


def called(instruction: Instruction, name: str) -> str:
    """The computation that attribute `name` (calls, body, condition) of an instruction names."""
    match = re.search(rf"\b{name}=\{{?%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def trip_count(module: Module, instruction: Instruction) -> int:
    """How often a `while` runs: its condition is `counter < constant`, the counter starts at 0.

    Raises ValueError where the condition has another form.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes):
        return int(known[1])
    condition = module.computations[called(instruction, "condition")]
    root = next(one for one in condition.values() if one.root)
    if root.opcode == "fusion":
        inner = module.computations[called(root, "calls")]
        constants = [condition[name] for name in root.operands if name in condition]
        root = next(one for one in inner.values() if one.root)
    else:
        constants = [condition[name] for name in root.operands if name in condition]
    bounds = [int(one.operands[0]) for one in constants if one.opcode == "constant"]
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(bounds) != 1:
        raise ValueError(f"while {instruction.name}: no constant bound in {root}")
    return bounds[0]


def executed(module: Module) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, times it runs) of all that runs; fused ones come as one."""

    def walk(name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in module.computations[name].values():
            if instruction.opcode == "while":
                yield from walk(
                    called(instruction, "body"), times * trip_count(module, instruction)
                )
            elif instruction.opcode == "call":
                yield from walk(called(instruction, "to_apply"), times)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from walk(branch, times)
            else:
                yield name, instruction, times

    return walk(module.entry, 1)


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [called(instruction, "true_computation"), called(instruction, "false_computation")]


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency", "async-update"}
SLICES = ("dynamic-slice", "slice", "gather")


def memory_traffic(module: Module) -> float:
    """HBM bytes that a step reads and writes on a device: operands and results of all that runs.

    A fused computation counts as one; of an array that it only slices or updates in place, the
    part. A kernel (custom call) counts each operand once, however often it reads it, so this is
    what has to move at least, as compiled.
    """
    total = 0.0
    for computation, instruction, times in executed(module):
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        total += times * _moved(module, module.computations[computation], instruction)
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    operands = [computation[name] for name in instruction.operands if name in computation]
    inner = module.computations.get(called(instruction, "calls"))
    if instruction.opcode in ("fusion", "async-start") and inner:
        return _read(inner) + _written(inner)
    if instruction.opcode == "send":  # to the host; what its result holds is the same buffer
        return size(operands[0].shape, memory=True)
    if instruction.opcode.endswith("-start"):  # (source, destination, ...): copied once
        arrays = ARRAY.findall(instruction.shape)[:2]
        return sum(size(f"{kind}[{dims}]{layout}", memory=True) for kind, dims, layout in arrays)
    if instruction.opcode in SLICES:
        return 2 * size(instruction.shape, memory=True)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(operands[1].shape, memory=True)
    return size(instruction.shape, memory=True) + sum(
        size(one.shape, memory=True) for one in operands
    )


def _read(fused: Computation) -> float:
    """HBM bytes of parameters that a fused computation reads."""
    total = 0.0
    for parameter in fused.values():
        if parameter.opcode != "parameter":
            continue
        whole, parts = size(parameter.shape, memory=True), 0.0
        for user, position in _users(fused, parameter.name):
            if user.opcode in SLICES and position == 0:
                parts += min(whole, size(user.shape))
            elif not (user.opcode == "dynamic-update-slice" and position == 0) and not (
                user.root and user.opcode == "tuple"
            ):
                parts = math.inf
        total += min(whole, parts)
    return total


def _users(fused: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    for user in fused.values():
        for position, operand in enumerate(user.operands):
            if operand == name:
                if user.opcode == "bitcast" and not user.root:
                    yield from _users(fused, user.name)
                else:
                    yield user, position


def _written(fused: Computation) -> float:
    """HBM bytes that the root of a fused computation writes."""
    root = next(one for one in fused.values() if one.root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for result in results:
        where = result.shape
        while result.opcode == "bitcast" and result.operands[0] in fused:
            result = fused[result.operands[0]]
        if result.opcode == "parameter":  # passed through
            continue
        if result.opcode == "dynamic-update-slice" and size(where, memory=True):
            total += size(fused[result.operands[1]].shape)
        else:
            total += size(where, memory=True)
    return total
