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

import torch

from .models import counter_hash
from .models.counter_hash import RowState, byte_thresholds, drop_bias_of_rows, row_keys, row_state


SOURCE = Path(__file__).with_name("fast_masks.cpp")
INSTEAD = "Without them masks are drawn by PyTorch's operations: the same bits, more slowly."


def enable_fast_masks() -> None:
    """Draws masks on a CPU by compiled C++ from now on, in this process, with the same bits.

    The first call on a machine compiles for some seconds.

    Raises:
        RuntimeError: There is no C++ compiler or no ninja, the build fails, or the result draws other bits. Masks are
            then drawn as before.
    """
    if fast_masks_enabled():
        return
    fill = _filler()
    _check_bits(fill)
    counter_hash.FAST_ROWS = fill


def disable_fast_masks() -> None:
    """Draws masks by PyTorch's operations again, which is the default."""
    counter_hash.FAST_ROWS = None


def fast_masks_enabled() -> bool:
    """Whether `enable_fast_masks` is in force in this process."""
    return counter_hash.FAST_ROWS is not None


@functools.cache
def _filler() -> Callable[[RowState, float, torch.Tensor, int], None]:
    """The C++ function as `counter_hash.FAST_ROWS` takes it.

    Raises:
        RuntimeError: It cannot be built.
    """
    function = ctypes.CDLL(str(_built())).hf_dropkey_fill_masks
    size, pointer, word = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, size, ctypes.c_uint32, size, size, pointer, pointer, word, word, word, size]
    function.restype = None

    def fill(state: RowState, ratio: float, out: torch.Tensor, infinity: int) -> None:
        # held until the call is over, because a part of a batch may be copied
        k1, k2 = state.k1.flatten().contiguous(), state.k2.flatten().contiguous()
        if not (out.is_contiguous() and len(out) == len(k1) == len(k2)):
            raise ValueError(f"Masks of {len(k1)} rows do not fit {tuple(out.shape)}, strides {out.stride()}.")
        function(
            out.data_ptr(),
            out.element_size(),
            infinity & 0xFFFFFFFF,
            *out.shape,
            k1.data_ptr(),
            k2.data_ptr(),
            *byte_thresholds(ratio),
            torch.get_num_threads(),
        )

    return fill


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


def _check_bits(fill: Callable[[RowState, float, torch.Tensor, int], None]) -> None:
    """Raises RuntimeError unless `fill` draws what the plain code draws."""
    rows = row_keys(torch.tensor([12345, -67890], dtype=torch.int32), 2, 3, 7)
    for dtype, (integers, infinity) in counter_hash.BITS.items():
        for keys, ratio in ((1, 0.5), (63, 0.9), (197, 0.1), (777, 0.3)):
            state = row_state(*rows, keys, ratio)
            found = torch.empty(2 * 3 * 7, keys, dtype=integers)
            fill(state, ratio, found, infinity)
            if not torch.equal(found.view(dtype), drop_bias_of_rows(state, keys, ratio, dtype).view(-1, keys)):
                raise RuntimeError(f"Fast masks draw other bits than they should here (in {dtype}). {INSTEAD}")
