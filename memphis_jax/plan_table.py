"""What `memphis plan` prints: tables for a terminal or for Markdown. Text only."""

from collections.abc import Sequence
from typing import Any

from memphis_jax.plan_compile import GIB, Compiled
from memphis_jax.plan_search import Candidate, Job, Search

MEMORY: tuple[str, ...] = (
    *("slice", "phase", "data x fsdp x model", "micro-batches x rows per chip", "remat"),
    *("parameters", "optimizer", "gradients", "activations", "peak", "limit", "fits"),
)
SPEED: tuple[str, ...] = (
    *("slice", "phase", "model PFLOP", "computed", "collectives", "received", "compute s"),
    *("HBM s", "network s", "bound by", "tokens/s <=", "MFU <=", "network exposed"),
)
SPEED_BETWEEN: tuple[str, ...] = (*SPEED[:9], "DCN s", *SPEED[9:])  # of several slices
TIME: tuple[str, ...] = (
    "slice",
    "chips",
    "SFT h >=",
    "rank h >=",
    "recipe h >=",
    "recipe h at MFU",
)


def render(
    searches: Sequence[Search],
    best: Sequence[Candidate | None],
    *,
    work: Any,
    mfu: float,
    price: float | None,
    markdown: bool,
) -> str:
    """All tables, and a line per phase that does not fit."""
    table = _markdown if markdown else _aligned
    memory, speed, traffic, others, refused = [], [], [], [], []
    for search, chosen in zip(searches, best, strict=True):
        job = search.job
        if chosen is None:
            refused.append(_refusal(search))
            smallest = min(search.found, key=lambda one: search.found[one].peak)
            memory.append(_memory_row(job, smallest, search.found[smallest]))
            continue
        found = search.found[chosen]
        memory.append(_memory_row(job, chosen, found))
        speed.append(_speed_row(job, chosen, found))
        traffic += [
            [
                job.name,
                job.phase,
                kind,
                f"{one['count']:,.0f}",
                f"{one['payload'] / 1e9:.2f}",
                f"{one['wire'] / 1e9:.2f}",
            ]
            for kind, one in sorted(found.collectives.items())
        ]
        others += [_other_row(search, one) for one in search.ranking() if one != chosen]
    parts: list[tuple[str, tuple[str, ...], list[list[str]]]] = [
        ("Memory of a device, GB (GiB), as the compiler accounts for it", MEMORY, memory)
    ]
    if speed:
        head = SPEED if searches[0].job.num_slices == 1 else SPEED_BETWEEN
        parts.append(("An optimizer step at best, by the chip's published figures", head, speed))
        names = ("slice", "phase", "collective", "times", "payload GB", "received GB")
        parts.append(("Collectives of a step, on each device", names, traffic))
    if others:
        names = ("slice", "phase", "instead", "peak GB", "step s", "compiled")
        parts.append(("What else fits, fastest first", names, others))
    if times := _times(searches, best, work, mfu, price):
        head = (*TIME, f"cost at MFU {mfu:.0%}") if price else TIME
        parts.append((f"The recipe: {work.told}; MFU {mfu:.0%} is assumed", head, times))
    text = "\n\n".join(f"{title}\n\n{table(head, rows)}" for title, head, rows in parts)
    return "\n\n".join([text, *refused])


def _refusal(search: Search) -> str:
    job = search.job
    smallest = min(search.found, key=lambda one: search.found[one].peak)
    said = search.found[smallest]
    other = next(iter(search.ranking(1)), None)
    fix = (
        f"{other} should fit: leave out --as-configured, or give more --compiles"
        if other
        else "take a larger slice"
    )
    return (
        f"NO: {job.name} cannot hold {job.phase}: the smallest way tried ({smallest}) needs "
        f"{said.peak / GIB:.2f} GB on a device, {(said.peak - said.limit) / GIB:.2f} GB more than "
        f"the {said.limit / GIB:.2f} GB that the compiler may use; {fix}"
    )


def _memory_row(job: Job, candidate: Candidate, found: Compiled) -> list[str]:
    sizes = [found.parameters, found.optimizer, found.gradients, found.activations]
    return [
        job.name,
        job.phase,
        " x ".join(map(str, candidate.mesh)),
        f"{candidate.accumulation} x {candidate.rows}",
        candidate.remat,
        *(f"{size / GIB:.2f}" for size in (*sizes, found.peak, found.limit)),
        "yes" if found.fits else "NO",
    ]


def _speed_row(job: Job, candidate: Candidate, found: Compiled) -> list[str]:
    bound, needed = job.bounds(found), job.model_flops(candidate)
    peak = job.where.num_chips * job.num_slices * job.where.chip.flops
    tokens = job.tokens(candidate)
    count = sum(one["count"] for one in found.collectives.values())
    return [
        job.name,
        job.phase,
        f"{needed / 1e15:.2f}",
        f"{found.flops / needed:.2f}x",
        f"{count:,.0f}",
        f"{found.wire / 1e9:.1f} GB",
        *(f"{seconds:.3f}" for seconds in (bound if job.num_slices > 1 else bound[:3])),
        bound.name,
        f"{tokens / bound.seconds:,.0f}",
        f"{needed / bound.seconds / peak:.0%}",
        f"{tokens / bound.exposed:,.0f}, {needed / bound.exposed / peak:.0%}",
    ]


def _other_row(search: Search, candidate: Candidate) -> list[str]:
    job, said = search.job, search.found.get(candidate)
    about = "" if said else "~"
    return [
        job.name,
        job.phase,
        str(candidate),
        f"{about}{search.memory(candidate) / GIB:.1f}",
        f"{about}{search.seconds(candidate):.2f}",
        "yes" if said else "predicted",
    ]


def _times(
    searches: Sequence[Search],
    best: Sequence[Candidate | None],
    work: Any,
    mfu: float,
    price: float | None,
) -> list[list[str]]:
    """Hours of SFT and of all rounds' training, on slices where both phases fit."""
    steps = {"sft": work.sft_steps, "rank": work.rank_steps}
    by_slice: dict[str, dict[str, tuple[Job, Candidate, Compiled]]] = {}
    for search, chosen in zip(searches, best, strict=True):
        if chosen is not None:
            phases = by_slice.setdefault(search.job.name, {})
            phases[search.job.phase] = (search.job, chosen, search.found[chosen])
    rows = []
    for name, phases in by_slice.items():
        if len(phases) < 2:
            continue
        job = phases["sft"][0]
        chips = job.where.num_chips * job.num_slices
        least = {
            phase: steps[phase] * job.bounds(found).seconds / 3600
            for phase, (job, _, found) in phases.items()
        }
        real = sum(
            steps[phase] * job.model_flops(chosen) / (mfu * chips * job.where.chip.flops) / 3600
            for phase, (job, chosen, _) in phases.items()
        )
        total = sum(least.values())
        row = [name, str(chips), *(f"{h:.2f}" for h in (least["sft"], least["rank"], total, real))]
        rows.append([*row, f"{real * chips * price:,.2f}"] if price else row)
    return rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
