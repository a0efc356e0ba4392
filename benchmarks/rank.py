"""The ranking step with answers packed side by side, beside one padded row for each answer.

The same groups, the same model, the same step: only the batch differs. Lengths are realistic for
answers with a chain of thought: log-normal, mean about 200 tokens, at most 1024.
"""

import argparse
import sys
import time

import numpy as np

from benchmarks import harness, workload
from benchmarks.train import our_step
from benchmarks.workload import Size
from memphis_jax.data.packing import pack_rows

SIZE = Size(workload.shape(256, 688, 4, 4, 4096), 1, 1024, 8, 200, True, 1)


def main(argv: list[str]) -> None:
    parser = harness.parser("rank", __doc__, repeats=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve)
        return
    before = harness.machine()
    words = [sys.executable, "-m", "benchmarks.rank", "--serve"]
    commands = {one: ([*words, one], {"JAX_PLATFORMS": "cpu"}) for one in ("packed", "padded")}
    served, speeds = harness.served_turns(commands, args.repeats)
    rows = [
        (
            layout,
            " x ".join(map(str, served[layout].ready["shape"])),
            f"{served[layout].ready['useful_share']:.0%}",
            harness.spread(found),
            harness.ratio(found, speeds["padded"]),
        )
        for layout, found in speeds.items()
    ]
    columns = ("batch", "rows x tokens", "useful tokens", "useful tokens/s", "x padded")
    title = f"rank step of {SIZE.groups} groups of three answers, hidden 256 x 4 layers, float32"
    table = harness.table(title, columns, rows)
    harness.finish(args, "rank", "Ranking: packed and padded", before, [table])


def serve(layout: str) -> None:
    batch = workload.rank_batch(SIZE) if layout == "packed" else padded_batch()
    useful = batch["segment_ids"] > 0
    step = our_step(SIZE, "rank", batch)
    for _ in range(2):
        step(1)

    def measure() -> float:
        begun = time.perf_counter()
        step(SIZE.steps)
        return int(useful.sum()) * SIZE.steps / (time.perf_counter() - begun)

    shape = list(useful.shape)
    harness.serve(measure, {"shape": shape, "useful_share": float(useful.mean())})


def padded_batch() -> dict[str, np.ndarray]:
    """The arrays of `pack_groups` where every answer has a row to itself."""
    made = workload.groups(SIZE)
    members = [member for group in made for member in (*group.candidates, group.gold)]
    batch = pack_rows([[member] for member in members], SIZE.seq_len)
    is_gold = np.arange(len(members)) % 3 == 2
    first = 3 * np.arange(len(made))[:, None]
    return batch | {
        "loss_mask": batch["loss_mask"] & is_gold[:, None],
        "rank_mask": batch["loss_mask"] & ~is_gold[:, None],
        "candidate_rows": (first + np.arange(2)).astype(np.int32),  # [G, R]
        "candidate_segments": np.ones((len(made), 2), np.int32),
        "ranks": np.tile(np.arange(2, dtype=np.int32), (len(made), 1)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
