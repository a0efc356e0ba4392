"""TPU slices that can be planned for: published figures of a chip, names of slices, their devices.

Imports `config` only; JAX and libtpu are reached in `slice_devices` alone.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from memphis_jax.config import ConfigError


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    flops: float  # bfloat16 FLOP/s at peak
    hbm: float  # bytes of memory, as published; the compiler's own limit is a little lower
    hbm_bandwidth: float  # bytes/s
    link: float  # bytes/s of one interconnect link in one direction
    dcn: float  # bytes/s of a chip's share of its host's network between slices, in one direction
    dims: int  # of the torus; a chip has two links per dimension
    most: int  # chips in a pod
    ring: int  # a dimension of this size (or a multiple, in 3D) closes to a ring
    devices: int  # that JAX sees per chip: FLOP/s, memory and links are the whole chip's
    kind: str  # JAX's device_kind of them
    source: str


# Published is the bandwidth of all links of a chip in both directions: per link and direction that
# is 1 / (2 * links) of it. v4's page has none: its all-reduce bandwidth of a pod, 1.1 PB/s, by 4096
# chips and 6 links gives 45 GB/s, as in https://jax-ml.github.io/scaling-book/tpus/, which says too
# where a dimension closes to a ring.
#
# tpu7x: its page gives all figures per chip (1200 GB/s of links, both ways), and a chip's two
# chiplets as two devices, each with half of the HBM; they reach each other over a die-to-die link,
# six times as fast as a link of the torus, that is not counted.
#
# Between slices: v5p, v6e and tpu7x as tpu7x's page compares them, 50, 100 and 100 Gbit/s per chip.
# v5e's gives 6.4 Tbit/s for a pod of 256; of v4 the scaling book says 25 GB/s for a host of four.
CHIPS = {
    "v4": Chip(
        275e12,
        32 * 2**30,
        1200e9,
        45e9,
        6.25e9,
        3,
        4096,
        4,
        1,
        "TPU v4",
        "https://docs.cloud.google.com/tpu/docs/v4",
    ),
    "v5e": Chip(
        197e12,
        16 * 2**30,
        819e9,
        50e9,
        3.125e9,
        2,
        256,
        16,
        1,
        "TPU v5 lite",
        "https://docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        459e12,
        95 * 2**30,
        2765e9,
        100e9,
        6.25e9,
        3,
        8960,
        4,
        1,
        "TPU v5",
        "https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        918e12,
        32 * 2**30,
        1638e9,
        100e9,
        12.5e9,
        2,
        256,
        16,
        1,
        "TPU v6 lite",
        "https://docs.cloud.google.com/tpu/docs/v6e",
    ),
    "tpu7x": Chip(
        2307e12,
        192 * 2**30,
        7380e9,
        100e9,
        12.5e9,
        3,
        9216,
        4,
        2,
        "TPU7x",
        "https://docs.cloud.google.com/tpu/docs/tpu7x",
    ),
}
EXAMPLES = "v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x1"


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device, as JAX counts them; None for what is no TPU known here."""
    kinds = {chip.kind: chip.flops / chip.devices for chip in CHIPS.values()}
    return kinds.get(device_kind)


@dataclass(frozen=True)
class Slice:
    """A TPU slice, "v5e:4x4": generation and chips along each dimension."""

    generation: str
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.dims))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices

    @property
    def ici(self) -> float:
        """Bytes/s that the chip with the fewest links takes in: without a ring, a corner's."""
        chip = self.chip
        closed = [n % chip.ring == 0 if chip.dims == 3 else n == chip.ring for n in self.dims]
        links = sum((2 if ring else 1) for n, ring in zip(self.dims, closed, strict=True) if n > 1)
        return links * chip.link


def parse_slice(name: str) -> Slice:
    """Slice of "GENERATION:AxB" or "GENERATION:AxBxC". Raises ConfigError naming what is known."""
    generation, _, shape = name.partition(":")
    if generation in ("v2", "v3"):
        raise ConfigError(
            f"--topology {name}: the attention kernel (splash) does not compile for {generation}; "
            f"use one of {', '.join(CHIPS)}"
        )
    if generation not in CHIPS:
        raise ConfigError(
            f"--topology {name}: {generation!r} is not one of {', '.join(CHIPS)}; e.g. {EXAMPLES}"
        )
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != chip.dims - 1:
        form = "x".join("ABC"[: chip.dims])
        raise ConfigError(
            f"--topology {name}: a {generation} slice has {chip.dims} dimensions, "
            f"{generation}:{form}; e.g. {EXAMPLES}"
        )
    parsed = Slice(generation, tuple(map(int, shape.split("x"))))
    if parsed.num_chips > chip.most:
        raise ConfigError(
            f"--topology {name} has {parsed.num_chips} chips; a {generation} pod has {chip.most}"
        )
    return parsed


def slice_devices(parsed: Slice, num_slices: int = 1) -> list[Any]:
    """Devices of a slice that is only compiled for: no TPU is needed, libtpu is.

    Raises ConfigError where libtpu is missing or knows no slice of this shape. Sets environment
    variables of libtpu, which must not have been loaded before.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "the TPU compiler is not installed: pip install -e '.[tpu]' in the checkout (no TPU is "
            "needed)"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no cloud machine to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes compile at once
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if parsed.generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=parsed.name, **options
        ).devices
    except JaxRuntimeError as error:
        raise ConfigError(
            f"--topology {parsed.name}: {str(error).splitlines()[0]}; e.g. {EXAMPLES}"
        ) from None
