"""How the fused kernels are launched: tiles, warps and pipeline stages for each generation of GPUs, chosen without one.

This file travels with checkpoints: it imports torch and the standard library only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


# the releases of Triton, as (major, minor), that tests compile every launch below with, from the first to before the last
MINIMUM_TRITON, NEXT_TRITON = (3, 6), (3, 10)
# keys that a program of the backward pass owns
KEY_TILE = 64
# what one kernel of the backward pass leaves for the next has rows for whole tiles of queries, of this side at most
ROW_TILE = 128
# longest row of scores that is held on chip as a whole, and longest one that leaves room for the largest tiles
SHORT_ROW, SHORTER_ROW = 256, 208


class Launch(NamedTuple):
    """How a kernel is launched: queries per tile, warps per program, stages of the software pipeline."""

    tile: int
    warps: int
    stages: int


def _by_width(narrow: Launch | None, middle: Launch | None, wide: Launch | None) -> dict[int, Launch | None]:
    """The launches for padded head widths up to 32, of 64 and of 128."""
    return {16: narrow, 32: narrow, 64: middle, 128: wide}


# 16-bit tensors, by the first number of the compute capability; None: such rows do not fit on chip, "long" takes them
_LAUNCHES = {
    8: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), Launch(32, 8, 1)),
        "short_full": _by_width(Launch(64, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
        "long": _by_width(Launch(64, 4, 3), Launch(64, 8, 3), Launch(32, 8, 2)),
        "query": _by_width(Launch(64, 4, 3), Launch(32, 4, 3), Launch(16, 8, 2)),
        "key_value": _by_width(Launch(64, 4, 3), Launch(32, 4, 2), Launch(64, 8, 2)),
    },
    9: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), None),
        "short_full": _by_width(None, Launch(32, 8, 1), None),
        "long": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2)),
        "query": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(64, 4, 2)),
        "key_value": _by_width(Launch(64, 4, 2), Launch(64, 4, 2), Launch(32, 4, 2)),
    },
    10: {
        "short": _by_width(Launch(64, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1)),
        "short_full": _by_width(Launch(64, 8, 1), Launch(64, 8, 1), Launch(64, 8, 1)),
        "long": _by_width(Launch(64, 4, 2), Launch(128, 8, 2), Launch(64, 8, 2)),
        "query": _by_width(Launch(64, 4, 2), Launch(64, 8, 2), Launch(64, 4, 2)),
        "key_value": _by_width(Launch(64, 4, 2), Launch(64, 8, 2), Launch(64, 4, 2)),
    },
}
# where padded keys or columns need more registers: generation, kernel, padded head width
_LAUNCHES_PADDED = {
    (9, "long", 128): Launch(64, 8, 2),
    (9, "query", 128): Launch(64, 8, 2),
    (10, "short", 128): Launch(64, 8, 1),
    (10, "long", 32): Launch(64, 8, 2),
}
# where releases of Triton before 3.9 need more registers: generation, kernel, padded head width (16 as 32)
_LAUNCHES_BEFORE_3_9: dict[tuple[int, str, int], Launch | None] = {
    (8, "short", 64): Launch(32, 4, 1),
    (8, "short_full", 32): None,
    (8, "short_full", 128): None,
    (9, "query", 128): Launch(64, 8, 2),
    (10, "short_full", 32): Launch(64, 4, 1),
    (10, "short_full", 64): Launch(32, 8, 1),
    (10, "query", 128): Launch(64, 8, 2),
}
# where padded keys or columns need still more on releases before 3.8
_LAUNCHES_PADDED_BEFORE_3_8 = {(9, "query", 128): Launch(16, 8, 2)}
_LAUNCHES_FLOAT32 = {
    "short": _by_width(None, None, None),
    "short_full": _by_width(None, None, None),
    "long": _by_width(Launch(32, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    "query": _by_width(Launch(32, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    "key_value": _by_width(Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
}


def launch_configuration(
    kernel: str,
    width: int,
    dtype: torch.dtype,
    queries: int,
    capability: tuple[int, int],
    *,
    padded: bool,
    release: tuple[int, int],
) -> tuple[str, Launch]:
    """Tile, warps and stages of a kernel, all of them chosen without a GPU.

    The kernels have run in Triton's interpreter only, never on a device. Each entry is the largest of a few tiles that
    compiles for sm_80, sm_90 or sm_100 without spilling registers; tests compile them again. Float32 at width 128 does
    spill.

    Predictions, to be replaced by measurements: kernels are bound by instruction issue, not by memory, at every width
    up to 64, "query" the most, which hashes words and leaves the bits of its scores to "key_value". Rows in one pass
    save the rescaling of the output, about one multiplication per score at width 64. "short_full" on 9.x gives up the wider
    matrix instruction for tiles of 32 and may lose to "long". Float32 has no tensor cores to use, and is for tests.

    Args:
        kernel: "short" (rows up to 208 keys without padding), "short_full" (other rows up to 256), "long", "query" or
            "key_value".
        width: The larger padded head width: 16, 32, 64 or 128.
        dtype: Of query, key and value.
        queries: `N`; tiles are no larger than it needs.
        capability: Compute capability of the device.
        padded: Whether keys are padded, or the head width is.
        release: Of Triton, as (major, minor).

    Returns:
        The kernel's name and its launch; those of "long" where rows do not fit on chip.
    """
    # 12.x has the matrix instructions and the shared memory of 8.x, 11.x those of 10.x
    major = {11: 10, 12: 8}.get(capability[0], min(capability[0], 10))
    table = _LAUNCHES_FLOAT32 if dtype == torch.float32 else _LAUNCHES[major]
    launch = table[kernel][width]
    if padded and dtype != torch.float32:
        launch = _LAUNCHES_PADDED.get((major, kernel, width), launch)
    if release < (3, 9) and dtype != torch.float32:
        launch = _LAUNCHES_BEFORE_3_9.get((major, kernel, max(width, 32)), launch)
    if padded and release < (3, 8) and dtype != torch.float32:
        launch = _LAUNCHES_PADDED_BEFORE_3_8.get((major, kernel, width), launch)
    if launch is None:
        return launch_configuration("long", width, dtype, queries, capability, padded=padded, release=release)
    return kernel, launch._replace(tile=min(launch.tile, tile_side(queries)))


def tile_side(size: int) -> int:
    """The smallest side of a tile that holds `size`: a power of two, and at least 16 for tensor cores."""
    return max(16, 1 << (size - 1).bit_length())
