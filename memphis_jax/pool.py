"""Which sequence has which row and pages of the sampler's cache: the host's side of decode.py.

Rows are given to sequences, and pages to rows, as they grow. Once nothing waits for the rows that
fall free, the batch is halved again and again; pages follow what is in use. Sizes are few, as each
is compiled, and below a floor that `floors` sets a smaller cache would save less than it costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np

from memphis_jax.decode import PAGE, Rows
from memphis_jax.model import StableLM

BLOCK = 8  # tokens decoded between two looks of the host, of a small model; divides PAGE
LEAST_PAGES = 2  # of a row on average, in use or not: fewer would be one more shape
# Multiplications of a step that takes a few milliseconds. On an accelerator a batch takes as long
# as one row until it is far larger than any here: there it is not halved.
FEW_MILLISECONDS = {"cpu": 2**28}
OF_AN_ACCELERATOR = 2**40


@dataclass
class Row:
    """A sequence that is being decoded."""

    index: int  # of its prompt
    prompt_length: int
    limit: int  # max_new_tokens
    place: int  # in the batch
    tokens: list[int] = field(default_factory=list)
    drawn: int = 0
    pages: list[int] = field(default_factory=list)  # of its device

    def pages_needed(self, block: int) -> int:
        """With the next block."""
        return num_pages(self.prompt_length, self.drawn + block, block)


def num_pages(prompt_length: int, new: int, block: int) -> int:
    """What is drawn begins at the next multiple of `block`, in blocks."""
    slots = -(-prompt_length // block) * block + -(-new // block) * block
    return -(-slots // PAGE)


def least_rows(model: StableLM) -> int:
    """Below which a step of this model takes little time anyway."""
    work = FEW_MILLISECONDS.get(jax.default_backend(), OF_AN_ACCELERATOR)
    return work // sum(leaf.size for leaf in jax.tree.leaves(model))


def block_size(batch_size: int, least_rows: int) -> int:
    """Tokens decoded between two looks of the host.

    A row that ends in the middle of a block costs until its end: fewer, where the looks take
    little beside the steps.
    """
    return BLOCK if batch_size <= least_rows else BLOCK // 2


class Change(NamedTuple):
    """Another size of the cache: which rows and pages it keeps, [devices, number] each."""

    rows: np.ndarray
    pages: np.ndarray


class Pool:
    """The rows of a batch and the pages of every device. Row i is on device i * devices // size.

    most_pages: of the longest sequence. least_rows: of a device; the batch is not halved to fewer.
    block: tokens that are decoded at once.
    """

    def __init__(self, batch_size: int, devices: int, most_pages: int, least_rows: int, block: int):
        self.size, self.devices, self.most_pages = batch_size, devices, most_pages
        self.block = block
        self.least_rows = max(least_rows, 1)
        self.rows: list[Row] = []
        self.num_pages = self._least_pages(batch_size // devices)

    def free(self) -> list[int]:
        """Places without a row."""
        return sorted(set(range(self.size)) - {row.place for row in self.rows})

    def fit(self) -> Change | None:
        """Gives all rows the pages for their next block; how the cache must change before that."""
        devices = self._by_device()
        needed = [[row.pages_needed(self.block) for row in some] for some in devices]
        rows = self._rows_for(max(map(len, devices)))
        pages = self._pages_for(rows, max(map(sum, needed)))
        fits = (rows * self.devices, pages) == (self.size, self.num_pages)
        change = None if fits else self._change(devices, rows, pages)
        for some, numbers in zip(devices, needed, strict=True):
            taken = {page for row in some for page in row.pages}
            free = (page for page in range(pages) if page not in taken)
            for row, number in zip(some, numbers, strict=True):
                row.pages += islice(free, number - len(row.pages))
        return change

    def arrays(self, keys: np.ndarray) -> Rows:
        """What the device is told; keys [number of prompts, 2] uint32."""
        size, each, width = self.size, self.size // self.devices, _size(self.most_pages)
        arrays = Rows(
            length=np.zeros(size, np.int32),
            drawn=np.zeros(size, np.int32),
            keys=np.zeros((size, 2), np.uint32),
            done=np.ones(size, bool),
            pages=np.full((size, width), self.num_pages, np.int32),
            owner=np.zeros((self.devices, self.num_pages), np.int32),
            rank=np.zeros((self.devices, self.num_pages), np.int32),
        )
        places = [row.place for row in self.rows]
        arrays.length[places] = [row.prompt_length + row.drawn for row in self.rows]
        arrays.drawn[places] = [row.drawn for row in self.rows]
        arrays.keys[places] = keys[[row.index for row in self.rows]]
        arrays.done[places] = False
        for row in self.rows:
            arrays.pages[row.place, : len(row.pages)] = row.pages
        place, rank = np.nonzero(arrays.pages < self.num_pages)
        page = place // each, arrays.pages[place, rank]
        arrays.owner[page], arrays.rank[page] = place % each, rank
        return arrays

    def _by_device(self) -> list[list[Row]]:
        devices: list[list[Row]] = [[] for _ in range(self.devices)]
        for row in self.rows:
            devices[row.place * self.devices // self.size].append(row)
        return devices

    def _least_pages(self, rows: int) -> int:
        return _size(rows * min(LEAST_PAGES, self.most_pages))

    def _rows_for(self, used: int) -> int:
        """Of a device."""
        rows = self.size // self.devices
        while rows > self.least_rows and used <= -(-rows // 2):
            rows = -(-rows // 2)
        return rows

    def _pages_for(self, rows: int, used: int) -> int:
        """Enough, and fewer than before only where a quarter of them stays free: not to waver."""
        if used > self.num_pages:
            return _size(used)
        return min(self.num_pages, max(_size(used + used // 4), self._least_pages(rows)))

    def _change(self, devices: Sequence[Sequence[Row]], rows: int, pages: int) -> Change:
        """Rows and pages move to the front of their device."""
        change = Change(*(np.zeros((self.devices, n), np.int32) for n in (rows, pages)))
        for device, some in enumerate(devices):
            old = [page for row in some for page in row.pages]
            new = iter(range(len(old)))
            change.pages[device, : len(old)] = old
            for place, row in enumerate(some):
                change.rows[device, place] = row.place % (self.size // self.devices)
                row.place = device * rows + place
                row.pages = [next(new) for _ in row.pages]
        self.size, self.num_pages = rows * self.devices, pages
        return change


def _size(pages: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, ... that holds `pages`."""
    size = 1
    while size < pages:
        size *= 2
    return size * 3 // 4 if pages <= size * 3 // 4 and size > 2 else size
