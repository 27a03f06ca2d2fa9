"""Exported folders in transformers.js on Node: they open as they are, and give the numbers of PyTorch."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dropping_models import nano, native
from stock_architectures import build

from hf_dropkey.export import export_graph


pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

VERSION = "4.3.1"
SIDE = 64
# arguments: the folder of models, and for each its name, the class of transformers.js, and the type of its weights
PROGRAM = """
import * as js from '@huggingface/transformers';
import { readFileSync } from 'node:fs';
const [folder, ...cases] = process.argv.slice(2);
js.env.allowRemoteModels = false;
js.env.localModelPath = folder + '/';
const found = {};
for (const one of cases) {
  const [name, kind, dtype] = one.split(':');
  try {
    const model = await js[kind].from_pretrained(name, { dtype });
    const processor = await js.AutoProcessor.from_pretrained(name);
    const side = JSON.parse(readFileSync(`${folder}/${name}/preprocessor_config.json`)).size.height;
    const bytes = new Uint8ClampedArray(readFileSync(`${folder}/${name}/image.bin`));
    const { pixel_values } = await processor(new js.RawImage(bytes, side, side, 3));
    found[one] = Array.from((await model({ pixel_values })).logits.data);
  } catch (error) {
    found[one] = String(error);
  }
}
console.log(JSON.stringify(found));
"""
PROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
    "resample": 2,
}


@pytest.fixture(scope="module")
def modules() -> Path:
    """A folder in which Node finds transformers.js, which npm fetches once on this machine."""
    for program in ("npm", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey" / f"transformers.js-{VERSION}"
    )
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "complete").is_file():
        command = [
            "npm",
            "install",
            "--prefix",
            str(cache),
            "--ignore-scripts",
            f"@huggingface/transformers@{VERSION}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"npm cannot fetch transformers.js: {done.stderr[-300:]}")
        (cache / "complete").touch()
    return cache


def write(model: Any, folder: Path, processor: str, *, int8: bool = False) -> np.ndarray:
    """Exports a model with an image beside it; returns its logits of that image."""
    saved = folder.parent / "saved" / folder.name
    model.save_pretrained(saved)
    side = getattr(model.config, "image_size", SIDE)
    size = {"height": side, "width": side}
    (saved / "preprocessor_config.json").write_text(
        json.dumps(PROCESSOR | {"image_processor_type": processor, "size": size})
    )
    export_graph(saved, folder, int8=int8)
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)
    (folder / "image.bin").write_bytes(pixels.numpy().tobytes())
    images = (pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits.numpy()


@pytest.mark.slow
def test_exported_folders_open_in_transformers_js(modules: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    classifier, detector = "AutoModelForImageClassification", "AutoModelForObjectDetection"
    expected = {
        f"native:{classifier}:fp32": write(native(), folder / "native", "ViTImageProcessor", int8=True),
        f"detr:{detector}:fp32": write(build("detr"), folder / "detr", "DetrImageProcessor"),
        "segformer:AutoModelForSemanticSegmentation:fp32": write(
            build("segformer"), folder / "segformer", "SegformerImageProcessor"
        ),
    }
    write(nano("volo"), folder / "volo", "ViTImageProcessor")
    eight_bits, unknown = f"native:{classifier}:q8", f"volo:{classifier}:fp32"
    program = modules / "program.mjs"
    program.write_text(PROGRAM)
    command = ["node", str(program), str(folder), *expected, eight_bits, unknown]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, logits in expected.items():
        np.testing.assert_allclose(np.array(found[name]), logits.ravel(), atol=1e-5, err_msg=name)
    in_full = expected[f"native:{classifier}:fp32"].ravel()
    np.testing.assert_allclose(found[eight_bits], in_full, atol=0.02)
    # transformers.js knows the architectures of Transformers, not this package's own; docs/export.md says so
    assert "Unsupported model type: dropkey_volo" in found[unknown]
