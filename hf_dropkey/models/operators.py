"""What PyTorch's operators need: a name of their own, and memory laid out as kernels read it.

This file travels with checkpoints: it imports torch and the standard library only.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def register_operator(
    name: str, files: Iterable[str], schema: str, function: Callable, fake: Callable, **autograd: Callable
) -> Any:
    """The operator `hf_dropkey::<name>_<checksum>`, registered unless it is.

    An operator is opaque to torch.compile, which takes its fake implementation for its shapes. Torch knows operators by
    name, and a second registration pulls the first from under its users. So the name carries the contents of the `files`
    behind it: the same code in a package and in a checkpoint shares one operator, another release has its own.

    Args:
        name: What it does.
        files: Paths of the source files that its code lies in.
        schema: Its arguments and results, in PyTorch's notation.
        function: The implementation.
        fake: The same without data: shapes, strides and dtypes of the results.
        autograd: `backward` and `setup_context` of `torch.library.register_autograd`, or nothing.
    """
    checksum = 0
    for file in files:
        checksum = zlib.crc32(Path(file).read_bytes(), checksum)
    full_name = f"{name}_{checksum:08x}"
    if not hasattr(torch.ops.hf_dropkey, full_name):
        operator = torch.library.custom_op(f"hf_dropkey::{full_name}", function, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        if autograd:
            operator.register_autograd(autograd["backward"], setup_context=autograd["setup_context"])
    return getattr(torch.ops.hf_dropkey, full_name).default


# the seed again, as something that only the backward pass can know: opaque to compilers
seed_in_backward = register_operator(
    "seed_in_backward",
    [__file__],
    "(Tensor seed, Tensor gradient) -> Tensor",
    lambda seed, gradient: seed.clone(),
    lambda seed, gradient: torch.empty_like(seed),
)


def unit_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy if its last dimension is not dense; kernels take any other stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
