"""`hf-dropkey demo MODEL --static_page OUT` writes a whole page, or says in one line why not and writes nothing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mesh_models import tiny_model as tiny_mesh
from small_demos import RATIO, SIDE, noise, save_classifier
from transformers import ViTImageProcessorPil

from hf_dropkey.cli import main
from hf_dropkey.hub import static_folder, web_runtime
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.hub.static_folder import GRAPH


pytestmark = pytest.mark.usefixtures("auto_image_processor")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an npm package with small contents, which is pinned for the test."""
    known, digests = {}, {}
    for name, (target, _) in web_runtime.FILES.items():
        file = tmp_path / "node" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content of {name}")
        digests[target] = hashlib.sha256(file.read_bytes()).hexdigest()
        known[name] = (target, digests[target])
    monkeypatch.setattr(web_runtime, "FILES", known)
    monkeypatch.setattr(static_folder, "SHA256", digests)
    return tmp_path / "node"


@pytest.mark.slow
@pytest.mark.parametrize(("stock", "dropkey"), [(False, True), (True, True), (True, False)])
def test_a_page_is_written_with_the_graph_of_the_model(
    stock: bool, dropkey: bool, tmp_path: Path, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    (tmp_path / "mine").mkdir()
    noise(50, 40).save(tmp_path / "mine" / "a.jpg")
    model, out = save_classifier(tmp_path / "saved", stock=stock, dropkey=dropkey), tmp_path / "page"
    command = ["demo", str(model), "--static_page", str(out), "--onnxruntime_web", str(runtime)]
    assert main([*command, "--images", str(tmp_path / "mine")]) == 0
    assert "for any web server, such as python -m http.server" in capsys.readouterr().out
    assert check_release(out).trusted
    settings: dict[str, Any] = json.loads((out / "settings.json").read_text())
    assert settings["classes"] == ["cat", "dog", "<b>bird</b>"] and settings["masks"] == 20
    expected = (
        {"ratio": RATIO, "pattern": "score", "trained": True}
        if dropkey
        else {"ratio": 0.1, "pattern": "score", "trained": False}
    )
    assert settings["dropkey"] == expected
    assert settings["examples"] == [{"file": "examples/01.png", "name": "a"}]
    assert "chosen by whoever uploaded" in settings["examples_origin"] and settings["uncertainty"] is None
    session = onnxruntime.InferenceSession(out / GRAPH, providers=["CPUExecutionProvider"])
    pixels, seed = torch.randn(1, 3, SIDE, SIDE).numpy(), np.array([3, 0], np.int32)
    one, other = (session.run(None, {"pixel_values": pixels, "seed": seed + step})[0] for step in (0, 1))
    assert one.shape == (1, 3) and not np.allclose(one, other)
    # what is there stays
    assert main(command) == 2
    assert "is not an empty folder; choose a new one" in capsys.readouterr().err


def test_what_has_no_such_page_is_refused(tmp_path: Path, runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_classifier(tmp_path / "saved")
    tiny_mesh("metro").save_pretrained(tmp_path / "mesh")
    ViTImageProcessorPil().save_pretrained(tmp_path / "mesh")
    out = ["--static_page", str(tmp_path / "page")]
    given = ["--onnxruntime_web", str(runtime)]
    cases = [
        ([str(tmp_path / "mesh"), *out, *given], "shows image classifiers. Serve this one with hf-dropkey demo"),
        ([str(model), str(model), *out, *given], "--static_page shows one model, got 2; give one"),
        ([str(model), *out, "--onnxruntime_web", str(tmp_path)], "has no dist/ort.wasm.bundle.min.mjs"),
        ([str(model), *out, "--space_folder", str(tmp_path / "space")], "two kinds of folder; give one of them"),
        ([str(model), *out, "--package", "hf_dropkey[demo]==1.0"], "--package is of a Space"),
        ([str(model), *given], "--onnxruntime_web is of a page in the browser; pass --static_page, or leave it out"),
        (
            [str(model), *out, *given, "--images", str(tmp_path / "no")],
            "is not a folder; give a folder of image files",
        ),
    ]
    for words, message in cases:
        assert main(["demo", *words]) == 2, words
        assert message in capsys.readouterr().err
    ViTImageProcessorPil(size={"shortest_edge": 20}).save_pretrained(model)
    assert main(["demo", str(model), *out, *given]) == 2
    assert "makes images of several sizes" in capsys.readouterr().err
    assert not (tmp_path / "page").exists() and not (tmp_path / "space").exists()
