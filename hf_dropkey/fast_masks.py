"""DropKey's masks on a CPU by a C++ function of this package's own: the same bits as the plain code, in a tenth of the time.

Opt-in, because a compiler must be there: `enable_fast_masks` builds `fast_masks.cpp` with PyTorch's extension loader, once
for a machine, into its folder of extensions (`TORCH_EXTENSIONS_DIR`, by default below the user's cache). It serves the
patterns "score" and "key" on the backends `sdpa` and `eager` outside of compiled code, in float32 and half precision; all
else is drawn as ever.

It stays at home: code in a checkpoint has a copy of `models/` only, which cannot switch it on.
"""

import ctypes
import functools
import platform
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .models import counter_hash
from .models.counter_hash import RowState, byte_thresholds, drop_bias_of_rows, row_keys, row_state


SOURCE = Path(__file__).with_name("fast_masks.cpp")
INSTEAD = "Without them masks are drawn by PyTorch's operations: the same bits, more slowly."


class FastMasks(NamedTuple):
    """The C++ functions as `counter_hash` takes them."""

    # as `counter_hash.FAST_KEYS`
    keys: Callable[[torch.Tensor, int, int, int], tuple[torch.Tensor, torch.Tensor]]
    # as `counter_hash.FAST_ROWS`
    rows: Callable[[RowState, float, torch.Tensor, int], None]


def enable_fast_masks() -> None:
    """Draws masks on a CPU by compiled C++ from now on, in this process, with the same bits.

    The first call on a machine compiles for some seconds, and the first one in a process compares the bits.

    Raises:
        RuntimeError: There is no C++ compiler or no ninja, the build fails, or the result draws other bits. Masks are
            then drawn as before.
    """
    counter_hash.FAST_KEYS, counter_hash.FAST_ROWS = _checked()


def disable_fast_masks() -> None:
    """Draws masks by PyTorch's operations again, which is the default."""
    counter_hash.FAST_KEYS = counter_hash.FAST_ROWS = None


def fast_masks_enabled() -> bool:
    """Whether `enable_fast_masks` is in force in this process."""
    return counter_hash.FAST_ROWS is not None


@functools.cache
def _checked() -> FastMasks:
    """The C++ functions, once they were found to draw what the plain code draws.

    Raises:
        RuntimeError: They cannot be built, or draw other bits.
    """
    found = _loaded()
    _check_bits(found)
    return found


def _loaded() -> FastMasks:
    """The C++ functions.

    Raises:
        RuntimeError: They cannot be built.
    """
    library = ctypes.CDLL(str(_built()))
    size, pointer, word = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    hash_rows, fill_masks = library.hf_dropkey_row_keys, library.hf_dropkey_fill_masks
    hash_rows.argtypes = [pointer, pointer, pointer, word, size, size, size]
    fill_masks.argtypes = [pointer, size, ctypes.c_uint32, size, size, pointer, pointer, word, word, word, size]
    hash_rows.restype = fill_masks.restype = None

    def keys(seed: torch.Tensor, images: int, heads: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        by_image = seed.ndim == 2
        shape = (len(seed) if by_image else images, heads, queries)
        # held until the call is over, because it may be a copy
        seeds = seed.to(torch.int32).contiguous()
        k1, k2 = (torch.empty(*shape, 1, dtype=torch.int32, device="cpu") for _ in range(2))
        hash_rows(k1.data_ptr(), k2.data_ptr(), seeds.data_ptr(), by_image, *shape)
        return k1, k2

    def rows(state: RowState, ratio: float, out: torch.Tensor, infinity: int) -> None:
        # held until the call is over, because a part of a batch may be copied
        k1, k2 = state.k1.flatten().contiguous(), state.k2.flatten().contiguous()
        if not (out.is_contiguous() and len(out) == len(k1) == len(k2)):
            raise ValueError(f"Masks of {len(k1)} rows do not fit {tuple(out.shape)}, strides {out.stride()}.")
        fill_masks(
            out.data_ptr(),
            out.element_size(),
            infinity & 0xFFFFFFFF,
            *out.shape,
            k1.data_ptr(),
            k2.data_ptr(),
            *byte_thresholds(ratio),
            torch.get_num_threads(),
        )

    return FastMasks(keys, rows)


def _built() -> Path:
    """The compiled library, from PyTorch's folder of extensions or made there now.

    Raises:
        RuntimeError: It cannot be built.
    """
    # slow to import, and of no use to others
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"Fast masks need a C++ compiler, and there is no {compiler!r}. Install one (Debian and Ubuntu: `apt install g++`; "
            f"conda: `conda install cxx-compiler`), or name it in the environment variable CXX. {INSTEAD}"
        )
    if not cpp_extension.is_ninja_available():
        raise RuntimeError(f"Fast masks need ninja to build: run `pip install ninja`. {INSTEAD}")
    windows = platform.system() == "Windows"
    native = ["-march=native"] if platform.machine().lower() in ("x86_64", "amd64") else []
    # the OpenMP library is PyTorch's own, which is loaded already
    flags = ["/O2", "/openmp"] if windows else ["-O3", *native, *_openmp(compiler)]
    try:
        found = cpp_extension.load(
            f"hf_dropkey_fast_masks_{_machine():08x}", [str(SOURCE)], extra_cflags=flags, is_python_module=False
        )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"Fast masks could not be built by {compiler}: {error}. {INSTEAD}") from error
    return Path(found)


def _openmp(compiler: str) -> list[str]:
    """The flag for several threads, where the compiler knows it; Apple's does not."""
    if platform.system() == "Darwin":
        return []
    empty = subprocess.run(
        [compiler, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"], input="", text=True, capture_output=True, timeout=60
    )
    return ["-fopenmp"] if empty.returncode == 0 else []


def _machine() -> int:
    """A checksum of the source and of the processor it is compiled for: homes are shared between machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return zlib.crc32(f"{SOURCE.read_text()}{platform.machine()}{flags}{torch.__version__}".encode())


def _check_bits(found: FastMasks) -> None:
    """Raises RuntimeError unless `found` draws what the plain code draws."""
    wrong = f"Fast masks draw other bits than they should here ({{}}). {INSTEAD}"
    seeds = torch.tensor([[12345, -67890], [-5, 2**31 - 1]], dtype=torch.int32)
    # the plain code, whatever was enabled before
    disable_fast_masks()
    for seed in (seeds[0], seeds):
        wanted = row_keys(seed, 2, 3, 7)
        if not all(torch.equal(one, other) for one, other in zip(found.keys(seed, 2, 3, 7), wanted, strict=True)):
            raise RuntimeError(wrong.format("in the pairs of rows"))
    for dtype, (integers, infinity) in counter_hash.BITS.items():
        for keys, ratio in ((1, 0.5), (63, 0.9), (197, 0.1), (777, 0.3)):
            state = row_state(*wanted, keys, ratio)
            drawn = torch.empty(2 * 3 * 7, keys, dtype=integers)
            found.rows(state, ratio, drawn, infinity)
            if not torch.equal(drawn.view(dtype), drop_bias_of_rows(state, keys, ratio, dtype).view(-1, keys)):
                raise RuntimeError(wrong.format(f"in {dtype}"))
