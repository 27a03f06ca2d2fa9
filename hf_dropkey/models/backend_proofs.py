"""Where measurements prove the fused kernel faster than the default path on a GPU: data, which `default_backend` reads.

The table is made by `python scripts/write_backend_proofs.py` from the rows of the benchmarks in `model_cards/`, never by
hand; a test compares them. It is empty until the kernel has run on a GPU.

This file travels with checkpoints: it imports the standard library only.
"""

from typing import NamedTuple


class Proof(NamedTuple):
    """One kind of GPU, dtype and range of shapes in which the fused kernel takes less time than `sdpa`."""

    # as torch.cuda.get_device_name and get_device_capability
    device: str
    capability: tuple[int, int]
    # a dtype's name in torch
    dtype: str
    head_width: int
    # fewest and most, both measured
    tokens: tuple[int, int]
    # time of the fused kernel over that of `sdpa`, of the measured shape where it gains least: median, first and third
    # quartile of the rounds
    ratio: float
    first_quartile: float
    third_quartile: float

    def covers(self, device: str, capability: tuple[int, int], dtype: str, head_width: int, tokens: int) -> bool:
        """Whether this is a proof for attention of one shape on one device."""
        here = (self.device, self.capability, self.dtype, self.head_width) == (device, capability, dtype, head_width)
        return here and self.tokens[0] <= tokens <= self.tokens[1]


PROOFS: tuple[Proof, ...] = ()
