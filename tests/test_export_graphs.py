"""Graphs of models in eval mode: the numbers of the model at every batch size, or an error and nothing written."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dropping_models import nano, native, patched
from hoi_models import tiny_model as tiny_hoi
from mesh_models import tiny_model as tiny_mesh
from stock_architectures import build
from torch import nn
from transformers import PreTrainedModel

from hf_dropkey import DropKeyONNX, apply_dropkey, dropkey_active, dropkey_seed
from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.cli import main
from hf_dropkey.export import export_graph, graphs


onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")


def run(folder: Path, images: torch.Tensor, file: str = "onnx/model.onnx") -> list[Any]:
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": images.numpy()})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_for_any_batch(family: str) -> None:
    model = nano(family).eval()
    images = torch.randn(2, 3, 64, 64)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False).module()
    for batch in (1, 2, 5):
        more = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(program(more).logits, model(more).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_onnx(family: str, tmp_path: Path) -> None:
    model = nano(family).eval()
    export_graph(model, tmp_path / "out")
    images = torch.randn(5, 3, 64, 64)
    np.testing.assert_allclose(run(tmp_path / "out", images)[0], model(images).logits.detach().numpy(), atol=1e-5)


def test_a_saved_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    native().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    command = ["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--format", "onnx", "--int8"]
    assert main(command) == 0
    assert "outputs logits; at most" in capsys.readouterr().out
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert names == {"config.json", "preprocessor_config.json", "onnx/model.onnx", "onnx/model_quantized.onnx"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "vit" and "auto_map" not in config
    images = torch.randn(5, 3, 32, 32)
    expected = native().eval()(images).logits.detach().numpy()
    np.testing.assert_allclose(run(tmp_path / "out", images)[0], expected, atol=1e-6)
    np.testing.assert_allclose(run(tmp_path / "out", images, "onnx/model_quantized.onnx")[0], expected, atol=0.02)
    # what is there stays without a word to replace it
    assert main(command) == 2


@pytest.mark.parametrize("training", [True, False])
def test_a_patched_model_is_left_as_it_was(training: bool, tmp_path: Path) -> None:
    model = patched().train(training)
    written = export_graph(model, tmp_path / "out", file_format="pt2")
    assert model.training == training and written.difference < 1e-5
    images = torch.randn(7, 3, 32, 32)
    loaded = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(loaded(pixel_values=images)[0], model.eval()(images).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda: tiny_hoi(), "verb_logits"),
        (lambda: tiny_mesh("metro"), "vertices"),
        (lambda: tiny_mesh("graphormer"), "vertices"),
        (lambda: build("detr"), "pred_boxes"),
        (lambda: build("swin"), "logits"),
        (lambda: build("dinov2_with_registers"), "pooler_output"),
        (lambda: build("segformer"), "logits"),
    ],
    ids=["hoi", "metro", "graphormer", "detr", "swin", "dinov2", "segformer"],
)
def test_other_models(make: Any, outputs: str, tmp_path: Path) -> None:
    model = make().eval()
    side = getattr(model.config, "image_size", 64)
    written = export_graph(model, tmp_path / "out", image_size=side)
    images = torch.randn(3, 3, side, side)
    found = dict(zip(written.outputs, run(tmp_path / "out", images), strict=True))
    np.testing.assert_allclose(found[outputs], model(images)[outputs].detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])
def test_detectors_that_ask_for_the_length_of_a_tensor(name: str, tmp_path: Path) -> None:
    model = build(name).eval()
    with torch.no_grad():
        # of a new model all scores are equal, and which of them are the highest is nobody's choice
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    apply_dropkey(model, ratio=0.3)
    backends = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    written = export_graph(model, tmp_path / "onnx", image_size=64)
    assert written.difference < 1e-4
    images = torch.randn(5, 3, 64, 64)
    found = dict(zip(written.outputs, run(tmp_path / "onnx", images), strict=True))
    np.testing.assert_allclose(found["pred_boxes"], model(images).pred_boxes.detach().numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="fixes the number of images .* without --monte_carlo"):
        export_graph(model, tmp_path / "random", file_format="pt2", image_size=64, monte_carlo=True)
    after = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert after == backends and len(set(backends)) == 2


def test_the_size_of_the_images_is_the_processors(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    for processor, size in [
        ({"size": {"height": 48, "width": 64}}, (48, 64)),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 16, "width": 24}}, (16, 24)),
        ({"size": {"shortest_edge": 40}}, (32, 32)),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        assert graphs._size_of(native(), tmp_path, None) == size
    assert graphs._size_of(native(), tmp_path, 96) == (96, 96)


class Guesses(nn.Module):
    """Puts out other numbers each time."""

    def __init__(self, model: Any):
        super().__init__()
        self.config, self.main_input_name = model.config, "pixel_values"
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": torch.rand_like(pixel_values[:, 0, 0, :3]) + self.weight}


def test_a_graph_with_other_numbers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"the graph's logits differs from the model's by .* nothing was written"):
        export_graph(Guesses(native()), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: build("bert"), {}, "takes no images"),
        (lambda: build("detr"), {}, "pass --image_size"),
        (native, {"file_format": "tflite"}, "choose one of onnx, pt2"),
        (native, {"file_format": "pt2", "int8": True}, "int8 graphs are written as onnx"),
        (native, {"image_size": 33}, "takes no images of"),
    ],
)
def test_bad_input(model: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_graph(model(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_bad_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    native().save_pretrained(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--int8"]) == 2
    assert "belong to --format onnx or pt2" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out"), "--format", "onnx"]) == 2


def test_what_onnx_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_dropkey\[onnx\]'"):
        export_graph(native(), tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (patched, "score"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((native, "score"), (native, "key"), (patched, "key"))
        ),
    ],
)
def test_a_seed_drops_the_same_keys_in_onnxruntime(make: Any, pattern: str, tmp_path: Path) -> None:
    model = make(dropkey_pattern=pattern) if make is native else make(pattern)
    model.eval()
    before = model.config._attn_implementation
    written = export_graph(model, tmp_path / "out", monte_carlo=True)
    assert written.files == ("onnx/model.onnx", "onnx/model_monte_carlo.onnx")
    assert model.config._attn_implementation == before
    exported = DropKeyONNX(tmp_path / "out")
    images = torch.randn(5, 3, 32, 32)
    for seed in (0, 3, 2**40 + 1):
        with torch.no_grad(), dropkey_active(model), dropkey_seed(model, seed):
            expected = model(images).logits
        np.testing.assert_allclose(exported(images.numpy(), seed=seed), expected.numpy(), atol=1e-5)
        assert not np.allclose(exported(images.numpy()), expected.numpy(), atol=1e-4)
    found = exported.monte_carlo_predict(images.numpy(), samples=4, seed=3)
    logits = [torch.from_numpy(exported(images.numpy(), 3 + (number << 32))) for number in range(4)]
    torch.testing.assert_close(found.probabilities, torch.stack(logits).softmax(-1).mean(0))
    assert found.samples == 4 and (found.mutual_information > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_a_seed_drops_the_same_keys_in_every_family(family: str, tmp_path: Path) -> None:
    model = nano(family).eval()
    written = export_graph(model, tmp_path / "out", monte_carlo=True)
    assert written.monte_carlo_difference is not None and written.monte_carlo_difference < 1e-5
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad(), dropkey_active(model), dropkey_seed(model, 9):
        expected = model(images).logits
    np.testing.assert_allclose(DropKeyONNX(tmp_path / "out")(images.numpy(), seed=9), expected.numpy(), atol=1e-5)


def test_a_saved_stock_model_drops_as_it_remembers(tmp_path: Path) -> None:
    model = patched().eval()
    model.save_pretrained(tmp_path / "saved")
    written = export_graph(tmp_path / "saved", tmp_path / "out", file_format="pt2", monte_carlo=True)
    assert written.files == ("model.pt2", "model_monte_carlo.pt2")
    images, seed = torch.randn(5, 3, 32, 32), torch.tensor([7, 0], dtype=torch.int32)
    loaded = torch.export.load(tmp_path / "out" / "model_monte_carlo.pt2").module()
    with torch.no_grad(), dropkey_active(model), dropkey_seed(model, 7):
        torch.testing.assert_close(loaded(pixel_values=images, seed=seed)[0], model(images).logits)


def test_what_drops_nothing_has_no_such_graph(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drops no keys"):
        export_graph(build("vit"), tmp_path / "out", monte_carlo=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="has no onnx/model.onnx"):
        DropKeyONNX(tmp_path)
    export_graph(native(), tmp_path / "out")
    exported, images = DropKeyONNX(tmp_path / "out"), np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(ValueError, match="export again with --monte_carlo"):
        exported(images, seed=1)
    with pytest.raises(ValueError, match="at least 2"):
        exported.monte_carlo_predict(images, samples=1)
    with pytest.raises(ValueError, match="must lie in"):
        exported.monte_carlo_predict(images, seed=-1)
