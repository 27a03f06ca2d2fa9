"""The fused kernels compiled for three generations of GPUs by each supported Triton, with no GPU: none spills registers.

A fresh process compiles each set of kernels, because Triton cannot compile where its interpreter is in use, and because
each release lies in a folder of its own: `~/.cache/hf_dropkey/triton/<release>`, put there by `pip install --target`. What
was compiled is noted beside it, by the contents of all that it depends on, and not compiled again: this file, the kernels,
and of the launches those that are compiled.

`python tests/test_triton_compile.py 90 64` prints the same for compute capability 9.0 and head width 64, by the Triton that is
installed. At that width the loops' instructions are counted too, for docs/speed.md.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "hf_dropkey" / "models"
SUPPORT = ROOT / "tests" / "support"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey"
# the last one of each supported minor release
RELEASES = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# what one program may use of the smallest device of each generation: 8.6, 9.0 and 10.0
SHARED_MEMORY_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}
# the kernels of docs/speed.md whose loops are counted, and how often a round draws words: those of 256 keys serve four
LOOPS = {
    "long": ("forward, more than 256 keys", 0.25),
    "query": ("backward, queries", 0.25),
    "key_value": ("backward, keys and values", 1.0),
}
# arguments that change with the batch
DATA = {"heads", "N", "M"}


def without_the_packages_own_imports() -> None:
    """Makes `hf_dropkey.models` importable file by file, without what importing the package brings (Transformers)."""
    for name, folder in (("hf_dropkey", MODELS.parent), ("hf_dropkey.models", MODELS)):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def compile_kernel(
    name: str, architecture: int, width: int, keys: int, padded: bool, shared: bool, columns: int | None = None
) -> dict[str, Any]:
    """What a kernel of the fused attention needs, as `triton_attention` would launch it."""
    import torch

    from hf_dropkey.models.triton_attention import KERNELS, RELEASE, _key_blocks, launch_configuration

    capability, narrow = divmod(architecture, 10), columns is not None
    name, launch = launch_configuration(
        name, width, torch.bfloat16, 1025, capability, padded=padded or narrow, release=RELEASE
    )
    kernel = KERNELS[name]
    blocks, tail = _key_blocks(keys)
    constants: dict[str, Any] = {
        "SHARED": shared,
        "HAS_PADDING": padded,
        "WIDTH": (columns or width, width),
        "VALUE_WIDTH": (columns or width, width),
        "TILE": launch.tile,
        "BLOCKS": blocks,
        "TAIL": tail,
        "UPCAST": False,
    }
    if not padded:
        constants["p_padding"] = None
    if shared:
        constants["p_bits"] = None
    about = f"{name} {columns or width} of {width}, {keys} keys, {padded=}, {shared=}, {launch}"
    found = resources(about, architecture, kernel, constants, warps=launch.warps, stages=launch.stages)
    if name in LOOPS and width == 64 and not padded and not shared:
        from machine_code import loop_instructions

        issued, words = loop_instructions(output_of("cuobjdump", "-sass", cubin()))
        # a tile is of 64 keys; what is jumped over in three rounds of four counts a quarter
        scores = 64 * launch.tile / (32 * launch.warps)
        found["loop"] = name, round((issued - (1 - LOOPS[name][1]) * words) / scores, 1)
    return found


def compile_mask(architecture: int, padded: bool) -> dict[str, Any]:
    """What the kernel that draws a mask alone needs, as `triton_mask` would launch it."""
    from hf_dropkey.models.triton_kernels import draw_mask_kernel
    from hf_dropkey.models.triton_mask import ROWS

    constants: dict[str, Any] = {"HAS_PADDING": padded, "PROTECT": padded, "TILE": ROWS}
    constants |= {} if padded else {"p_padding": None}
    return resources(f"mask, {padded=}", architecture, draw_mask_kernel, constants, warps=4, stages=1)


def resources(
    about: str, architecture: int, kernel: Any, constants: dict[str, Any], *, warps: int, stages: int
) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a kernel, compiled with these constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        "p_lse": "*fp32",
        "p_rows": "*fp32",
        "p_undone": "*i8",
        "p_padding": "*i1",
        "p_bits": "*i64" if "p_dk" in kernel.arg_names else "*i32",
    }
    types |= {"p_limits": "*i32", "scale": "fp32", "scaling": "fp32"}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "p_seed":
            signature[argument] = ("*i32", "i32")
            attributes[place, 0] = [["tt.divisibility", 16]]
        elif argument.startswith("strides"):
            signature[argument] = ("i32", "i32", "i32")
            attributes |= {(place, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif argument.startswith("p_"):
            signature[argument] = types.get(argument, "*bf16")
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = types.get(argument, "i32")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={
            (place,): constants[argument]
            for place, argument in enumerate(kernel.arg_names)
            if signature[argument] == "constexpr"
        },
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin().write_bytes(binary.asm["cubin"])
    usage = output_of("cuobjdump", "-res-usage", cubin())
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {
        "case": f"sm_{architecture} {about}",
        "triton": triton.__version__,
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_memory_bytes": binary.metadata.shared,
        "specialised": sorted(
            parameter.name for parameter in kernel.params if parameter.name in DATA and not parameter.do_not_specialize
        ),
    }


def cubin() -> Path:
    """Where the kernel lies that was compiled last."""
    return Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"


def output_of(tool: str, *arguments: str | Path) -> str:
    """What a tool of CUDA prints that Triton brings."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


# kernel, keys, whether padded, whether all queries share a mask, head width where it is not the padded one
Case = tuple[str, int, bool, bool, int | None]


def cases_of(width: int) -> list[Case]:
    """What is compiled for a padded head width."""
    cases: list[Case] = []
    # pattern "score", pattern "key", and at the largest width the head width of ViT-H, filled up
    for shared, columns in ((False, None), (True, None), *([(False, 80)] if width == 128 else [])):
        cases.append(("short", 197, False, shared, columns))
        cases += [(name, 1025, False, shared, columns) for name in ("long", "query", "key_value")]
        if not shared:
            cases += [(name, 1025, True, shared, columns) for name in ("long", "query", "key_value")]
            cases.append(("short_full", 255, True, shared, columns))
    cases += [("short_full", keys, padded, False, None) for keys, padded in ((256, False), (255, False), (9, True))]
    return cases


def launches_of(release: str, architecture: int, width: int) -> list[Any]:
    """How the cases of a head width are launched."""
    import torch

    from hf_dropkey.models.triton_launches import launch_configuration

    numbers = tuple(map(int, release.split(".")[:2]))
    return [
        (
            case,
            launch_configuration(
                case[0],
                width,
                torch.bfloat16,
                1025,
                divmod(architecture, 10),
                padded=case[2] or case[4] is not None,
                release=(numbers[0], numbers[1]),
            ),
        )
        for case in cases_of(width)
    ]


def main(architecture: int, width: int) -> None:
    """Compiles every kernel for one architecture and head width, and prints one line of JSON for each."""
    without_the_packages_own_imports()
    for name, keys, padded, shared, columns in cases_of(width):
        print(json.dumps(compile_kernel(name, architecture, width, keys, padded, shared, columns)), flush=True)
    # masks have no head width
    for padded in (False, True) if width == 64 else ():
        print(json.dumps(compile_mask(architecture, padded)), flush=True)


def folder_of(release: str) -> Path:
    """The folder with a Triton release, installed there unless it is."""
    folder = CACHE / "triton" / release
    if not (folder / "triton" / "__init__.py").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--target", str(folder), f"triton=={release}"], capture_output=True, text=True, timeout=600
        )
        if done.returncode != 0:
            pytest.skip(f"triton {release} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def compiled(release: str, architecture: int, width: int, scratch: Path) -> list[dict[str, Any]]:
    """What `main` prints under a Triton release, from the note of an earlier run if nothing has changed since."""
    inputs = (release, architecture, width, sys.version_info[:2], launches_of(release, architecture, width))
    digest = hashlib.sha256(repr(inputs).encode())
    for file in (Path(__file__), SUPPORT / "machine_code.py", MODELS / "triton_kernels.py"):
        digest.update(file.read_bytes())
    note = CACHE / "compiled" / f"{digest.hexdigest()[:32]}.json"
    if not note.is_file():
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        path = os.pathsep.join(
            [*([] if release == installed() else [str(folder_of(release))]), str(ROOT), str(SUPPORT)]
        )
        environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(scratch)}
        process = subprocess.run(
            [sys.executable, __file__, str(architecture), str(width)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=900,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        note.parent.mkdir(parents=True, exist_ok=True)
        # in one step, because other runs may read it
        unfinished = note.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps([json.loads(line) for line in process.stdout.splitlines()]))
        unfinished.replace(note)
    rows: list[dict[str, Any]] = json.loads(note.read_text())
    return rows


def installed() -> str:
    """The Triton release of this environment."""
    return version("triton")


@pytest.mark.slow
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton's releases are for Linux on x86-64"
)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_no_kernel_spills_registers(release: str, architecture: int, width: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton, which is not installed")
    results = compiled(release, architecture, width, tmp_path)
    assert len(results) == {32: 15, 64: 17, 128: 23}[width]
    for result in results:
        assert result["triton"] == release, result
        assert result["spilled_bytes"] == 0, result
        assert result["shared_memory_bytes"] <= SHARED_MEMORY_BYTES[architecture], result
        assert not result["specialised"], result


def test_a_loop_is_counted_with_what_it_may_jump_over() -> None:
    from machine_code import loop_instructions

    lines = [
        "MOV R1, RZ",
        "LDG R2, [R1]",
        "@P0 BRA 0x50",
        "IMAD R3, R3, R3, RZ",
        "IMAD R3, R3, R3, RZ",
        "HMMA R4, R3, R2, R4",
        "NOP",
        "@!P1 BRA 0x10",
        "EXIT",
        "BRA 0x90",
    ]
    listing = "".join(f"        /*{16 * place:04x}*/    {line} ;    /* 0x0 */\n" for place, line in enumerate(lines))
    assert loop_instructions(listing) == (6, 2)


@pytest.mark.slow
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton's releases are for Linux on x86-64"
)
@pytest.mark.parametrize(("place", "architecture"), [(0, 80), (1, 90), (2, 100)])
def test_the_page_has_the_instructions_of_the_loops(place: int, architecture: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton, which is not installed")
    page = (ROOT / "docs" / "speed.md").read_text()
    named = re.search(r"counted in machine code \(Triton\s([\d.]+),", page)
    assert named is not None and named[1] in RELEASES
    counted = dict(row["loop"] for row in compiled(named[1], architecture, 64, tmp_path) if "loop" in row)
    assert counted.keys() == LOOPS.keys()
    for name, (title, _) in LOOPS.items():
        row = re.search(rf"^\| {title} \|(.*)\|$", page, re.MULTILINE)
        assert row is not None and float(row[1].split("|")[place]) == counted[name], (title, counted)


def test_every_supported_release_is_compiled_for() -> None:
    from hf_dropkey.models.triton_launches import MINIMUM_TRITON, NEXT_TRITON

    minors = sorted(tuple(map(int, release.split(".")[:2])) for release in RELEASES)
    assert minors[0] == MINIMUM_TRITON and minors[-1] == (NEXT_TRITON[0], NEXT_TRITON[1] - 1)
    assert minors == [(3, minor) for minor in range(minors[0][1], NEXT_TRITON[1])]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(SUPPORT)]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("TRITON_CACHE_DIR", scratch)
        main(int(sys.argv[1]), int(sys.argv[2]))
