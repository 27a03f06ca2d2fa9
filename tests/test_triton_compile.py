"""The fused kernels compiled for three generations of GPUs, with no GPU: none of them may spill registers.

A fresh process compiles each set of kernels, because Triton cannot compile where its interpreter is in use.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[1]
# what one program may use of the smallest device of each generation: 8.6, 9.0 and 10.0
SHARED_MEMORY_BYTES = {80: 101_376, 90: 232_448, 100: 232_448}
# arguments that change with the step, the layer or the batch
DATA = {"lower", "upper", "fraction", "heads", "N", "M"}


def compile_kernel(
    name: str, architecture: int, width: int, keys: int, padded: bool, shared: bool, columns: int | None = None
) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel as `triton_attention` would launch it."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_dropkey.models.triton_attention import KERNELS, _key_blocks, launch_configuration

    capability, narrow = divmod(architecture, 10), columns is not None
    name, launch = launch_configuration(name, width, torch.bfloat16, 1025, capability, padded=padded or narrow)
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
    types = {"p_lse": "*fp32", "p_delta": "*fp32", "p_undone": "*i8", "p_padding": "*i1", "p_seed": "*i32"}
    types |= {"scale": "fp32", "scaling": "fp32"}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
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
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {
        "case": f"{name} sm_{architecture} {columns or width} of {width}, {keys} keys, {padded=}, {shared=}, {launch}",
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_memory_bytes": binary.metadata.shared,
        "specialised": sorted(
            parameter.name for parameter in kernel.params if parameter.name in DATA and not parameter.do_not_specialize
        ),
    }


def main(architecture: int, width: int) -> None:
    """Compiles every kernel for one architecture and head width, and prints one line of JSON for each."""
    cases: list[tuple[str, int, bool, bool, int | None]] = []
    # pattern "score", pattern "key", and at the largest width the head width of ViT-H, filled up
    for shared, columns in ((False, None), (True, None), *([(False, 80)] if width == 128 else [])):
        cases.append(("short", 197, False, shared, columns))
        cases += [(name, 1025, False, shared, columns) for name in ("long", "query", "key_value")]
        if not shared:
            cases += [(name, 1025, True, shared, columns) for name in ("long", "query", "key_value")]
            cases.append(("short_full", 255, True, shared, columns))
    cases += [("short_full", keys, padded, False, None) for keys, padded in ((256, False), (255, False), (9, True))]
    for name, keys, padded, shared, columns in cases:
        print(json.dumps(compile_kernel(name, architecture, width, keys, padded, shared, columns)), flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_kernel_spills_registers(architecture: int, width: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton, which is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, __file__, str(architecture), str(width)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == (23 if width == 128 else 15)
    for result in results:
        assert result["spilled_bytes"] == 0, result
        assert result["shared_memory_bytes"] <= SHARED_MEMORY_BYTES[architecture], result
        assert not result["specialised"], result


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
