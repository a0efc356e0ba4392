"""`python -m convert` (installed: `memphis-convert`): the three commands; see each one's --help.

Exit codes: 0 done (verify: equal), 1 verify found differences, 2 refused, the reason on one line.
"""

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.hosts import Hosts

EPILOG = """examples:
  python -m convert from-hf stablelm-3b-4e1t runs/base     HF folder -> checkpoint
  python -m convert to-hf runs/base exported               checkpoint -> HF folder
  python -m convert verify exported runs/base              the same weights, bit for bit?

HF is a local folder: config.json, *.safetensors (.bin: a pickle, never loaded), tokenizer.json.
CKPT is a folder with checkpoints/STEP/ and tokenizer/: what from-hf writes, or a training workdir.

several hosts: the same to-hf command on each, with JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0,
JAX_NUM_PROCESSES and JAX_PROCESS_ID set as for jax.distributed, divides the tensors among them.
CKPT and HF must be in a folder that all hosts see. A process that is missing, dead or silent for
MEMPHIS_BARRIER_SECONDS (default 300) ends all, named, and nothing is published.
"""
SIZE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # take no accelerator from a running training
    from convert.hf_folder import ConvertError
    from convert.hosts import Hosts
    from memphis_jax.checkpoint import CheckpointError

    try:
        hosts = Hosts.of(os.environ)
        if args.command == "to-hf":
            return _to_hf(args, hosts)
        if hosts.process:
            print(f"{hosts.name(hosts.process)}: process 0 alone runs {args.command}")
            return 0
        return {"from-hf": _from_hf, "verify": _verify}[args.command](args)
    except (
        ConvertError,
        CheckpointError,
        OSError,
        ValueError,
    ) as error:  # ConfigError is a ValueError
        print(
            f"memphis-convert {args.command}: error: {' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 2


def size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" (decimal units, binary with an i). Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * SIZE_UNITS[(match[2] or "") + "B"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memphis-convert",
        description="Converts StableLM weights between Hugging Face folders and checkpoints.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, detail: str, **folders: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=f"{summary}. {detail}")
        for folder, meaning in folders.items():
            command.add_argument(folder, metavar=folder.upper(), help=meaning)
        return command

    add(
        "from-hf",
        "Reads an HF folder and writes a checkpoint",
        "Headers are checked first: every missing, unknown or repeated tensor and every wrong "
        "shape is named, and nothing is written. Bits and dtype stay as they are.",
        hf="HF folder to read",
        ckpt="folder to write; an earlier conversion is replaced, anything else refused",
    )
    to_hf = add(
        "to-hf",
        "Writes the latest step of a checkpoint as an HF folder",
        "The folder appears by rename when it is complete, with conversion.json: the hash of every "
        "tensor and file and of the checkpoint.",
        ckpt="checkpoint folder or training workdir to read",
        hf="HF folder to write; an earlier export is replaced, anything else refused",
    )
    to_hf.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="of the tensors written (default: keep, as saved; training saves float32)",
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=_size_argument,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, such as 500MB or 2GiB (default: %(default)s)",
    )
    add(
        "verify",
        "Compares an HF folder with a checkpoint, bit by bit",
        "Checks the hashes in conversion.json too, where there is one. Exit code 0: equal, "
        "1: differences, which are listed.",
        hf="HF folder",
        ckpt="checkpoint folder",
    )
    return parser


def _size_argument(text: str) -> int:
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _from_hf(args: argparse.Namespace) -> int:
    from convert.from_hf import from_hf

    with _bar("from-hf") as progress:
        done = from_hf(args.hf, args.ckpt, progress)
    print(
        f"{args.ckpt}: step 0, {done['tensors']} tensors in {done['leaves']} leaves, "
        f"{done['dtype']}, {done['bytes'] / 1e6:,.1f} MB"
    )
    if not done["tokenizer"]:
        print(f"note: {args.hf} has no tokenizer.json, so no tokenizer was copied")
    return 0


def _to_hf(args: argparse.Namespace, hosts: "Hosts") -> int:
    from convert.to_hf import to_hf

    _return_freed_blocks()
    with _bar("to-hf") as progress:
        done = to_hf(args.ckpt, args.hf, args.dtype, args.max_shard_size, progress, hosts)
    if hosts.process:
        return 0  # process 0 reports
    shards = [name for name in done["files"] if name.endswith(".safetensors")]
    print(
        f"{args.hf}: step {done['source']['step']}, {len(done['tensors'])} tensors in "
        f"{len(shards)} safetensors file(s), hashes in conversion.json"
    )
    if "tokenizer.json" not in done["files"]:
        print(f"note: {args.ckpt} has no tokenizer/tokenizer.json, so no tokenizer was copied")
    return 0


def _return_freed_blocks() -> None:
    """Lets glibc give freed blocks of 1 MiB and more back to the system at once.

    By itself it raises that threshold to 32 MiB a thread, and decoded chunks pile up in the heap.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _verify(args: argparse.Namespace) -> int:
    from convert.verify import verify

    with _bar("verify") as progress:
        verdict = verify(args.hf, args.ckpt, progress)
    for note in verdict.notes:
        print(f"note: {note}")
    for line in verdict.differences:
        print(f"differs: {line}")
    if verdict.differences:
        print(f"{len(verdict.differences)} differences, {verdict.compared} tensors compared")
        return 1
    print(f"equal: {verdict.compared} tensors, bit for bit")
    return 0


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback (done, total), drawn on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
