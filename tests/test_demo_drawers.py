"""Detectors, interactions and meshes open with the drawing of their task."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hoi_models import tiny_model as tiny_hoi
from mesh_models import tiny_model as tiny_mesh
from small_demos import bad_files, noise, save_classifier
from small_pages import client_of, served
from transformers import (
    DetrImageProcessorPil,
    ViTImageProcessorPil,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from hf_dropkey.demo.drawers import Bodies, Detector, Interactions, counted
from hf_dropkey.demo.opening import kind_of, open_page


pytestmark = pytest.mark.usefixtures("auto_image_processor")


def save_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=[32, 32], patch_size=8,
        num_detection_tokens=5, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_interactions(folder: Path) -> Path:
    tiny_hoi().save_pretrained(folder)
    DetrImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def save_bodies(folder: Path) -> Path:
    tiny_mesh().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


SAVED: dict[str, Callable[[Path], Path]] = {"detection": save_detector, "hoi": save_interactions, "mesh": save_bodies}


@pytest.mark.parametrize("kind", SAVED)
def test_the_task_is_known_from_the_class(kind: str, tmp_path: Path) -> None:
    assert kind_of(SAVED[kind](tmp_path)) == kind


def test_a_detector_shows_its_boxes(tmp_path: Path) -> None:
    detector = Detector(save_detector(tmp_path))
    everything = detector.draw(noise(), 0.0)
    assert len(everything.found) == 5 and everything.sentence.startswith("5 found: ")
    scores = [one["score"] for one in everything.found]
    assert scores == sorted(scores, reverse=True) and {one["label"] for one in everything.found} <= {"cat", "dog"}
    nothing = detector.draw(noise(), 1.0)
    assert nothing.found == () and "Nothing with a score of 1 or more; the surest is" in nothing.sentence
    with_boxes, without = (np.asarray(one.pictures[0][0]) for one in (everything, nothing))
    assert with_boxes.shape == without.shape and (with_boxes != without).any()
    # a picture has the shape of the image
    assert without.shape[1] / without.shape[0] == pytest.approx(40 / 30, abs=0.02)


def test_interactions_show_their_pairs(tmp_path: Path) -> None:
    model = Interactions(save_interactions(tmp_path))
    drawn = model.draw(noise(), 0.0)
    assert drawn.found and set(drawn.found[0]["verbs"]) <= {"hold", "kick"} and "pair" in drawn.sentence
    assert model.draw(noise(), 1.0).sentence == "No verb with a score of 1 or more"
    assert len(model.examples()) == 6 and model.examples()[0].image.size == (320, 320)


def test_a_mesh_is_drawn_three_times(tmp_path: Path) -> None:
    model = Bodies(save_bodies(tmp_path))
    drawn = model.draw(noise(), 0.5)
    assert [words for _, words in drawn.pictures] == [
        "mesh over the image",
        "mesh from the side",
        "joints: right red, left blue",
    ]
    assert "40 vertices" in drawn.sentence and len(drawn.found[0]["joints_2d"]) == 14
    assert model.threshold is None


def test_a_mesh_that_is_not_finite_is_said(tmp_path: Path) -> None:
    model = Bodies(save_bodies(tmp_path))
    with torch.no_grad():
        for weight in model._pipeline.model.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.draw(noise(), 0.5)


@pytest.mark.parametrize("kind", SAVED)
def test_its_page_answers(kind: str, tmp_path: Path) -> None:
    folder = SAVED[kind](tmp_path / "saved")
    noise(seed=3).save(tmp_path / "a.png")
    with served([folder]) as url:
        from gradio_client import handle_file

        client = client_of(url)
        _, seen, numbers = client.predict(handle_file(str(tmp_path / "a.png")), 0.1, api_name="/picture")
        assert "<img src=" in seen and numbers["sentence"] in seen
        remark, *_ = client.predict(
            handle_file(str(bad_files(tmp_path / "bad")["not an image file"])), 0.1, api_name="/picture"
        )
        assert "not an image file" in remark


def test_only_classifiers_are_compared(tmp_path: Path) -> None:
    one, other = save_classifier(tmp_path / "one"), save_detector(tmp_path / "other")
    with pytest.raises(ValueError, match="both are image classifiers; these are classification and detection"):
        open_page([one, other], None)


def test_names_are_counted() -> None:
    assert counted(["cat", "dog", "cat"]) == "2 cat, dog" and counted([]) == ""
