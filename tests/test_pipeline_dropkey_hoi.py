"""The pipeline of human-object interaction detection: what it returns, also in a process without this package."""

import json
from pathlib import Path
from typing import Any

import pytest
from fresh_process import fresh
from hoi_models import tiny_model
from PIL import Image
from transformers import DetrImageProcessorPil, pipeline

from hf_dropkey import HoiPipeline


TASK = "human-object-interaction"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "hoi"
    tiny_model(missing_object=True).save_pretrained(path)
    DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 40}).save_pretrained(path)
    gradient = Image.linear_gradient("L").convert("RGB")
    gradient.resize((50, 40)).save(path.parent / "wide.png")
    gradient.rotate(90).resize((30, 60)).save(path.parent / "tall.png")
    return path


def made(folder: Path, **options: Any) -> HoiPipeline:
    return pipeline(TASK, model=str(folder), trust_remote_code=True, **options)


def test_pairs_of_one_image_and_of_several(folder: Path) -> None:
    found = made(folder, threshold=0.0)
    image = Image.open(folder.parent / "wide.png")
    pairs = found(image)
    assert len(pairs) == 6
    for pair in pairs:
        assert list(pair) == ["person_box", "object_box", "object", "object_score", "verbs"]
        assert pair["object"] in (None, "person", "ball")
        assert (pair["object"] is None) == (pair["object_box"] is None)
        assert list(pair["verbs"].values()) == sorted(pair["verbs"].values(), reverse=True)
        assert 0 <= pair["person_box"][0] <= 50
    several = found([str(folder.parent / "wide.png"), str(folder.parent / "tall.png")])
    assert several[0] == pairs
    assert json.loads(json.dumps(several)) == several


def test_options_of_a_call_and_of_the_pipeline(folder: Path) -> None:
    image = Image.open(folder.parent / "wide.png")
    assert len(made(folder)(image, threshold=0.0, top_k=2)) == 2
    assert len(made(folder, threshold=0.0, top_k=3)(image)) == 3
    assert made(folder)(image, threshold=1.0) == []
    # all queries of an untrained model find nearly the same boxes
    assert len(made(folder)(image, threshold=0.0, nms=0.0)) < 6
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\], got 1.5"):
        made(folder)(image, threshold=1.5)
    with pytest.raises(TypeError, match="does not take"):
        made(folder)(image, treshold=0.5)


def test_what_the_pipeline_needs(folder: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="without an image processor"):
        HoiPipeline(model=model)
    with pytest.raises(ValueError, match="finds no pairs"):
        HoiPipeline(model=model.model, image_processor=DetrImageProcessorPil())


def test_a_process_without_the_package(folder: Path, tmp_path: Path) -> None:
    printed = fresh(
        """
        import json, sys
        folder = sys.argv[1]
        from transformers import pipeline
        found = pipeline("human-object-interaction", model=folder, trust_remote_code=True)
        assert type(found).__module__.startswith("transformers_modules")
        print(json.dumps(found(folder + "/../wide.png", threshold=0.0)))
        # saved by such a process, it is whole again
        found.model.save_pretrained(sys.argv[2])
        found.image_processor.save_pretrained(sys.argv[2])
        """,
        folder,
        tmp_path / "again",
        cache=tmp_path / "cache",
    )
    expected = made(folder)(str(folder.parent / "wide.png"), threshold=0.0)
    found = json.loads(printed.splitlines()[-1])
    assert [pair["verbs"] for pair in found] == [pytest.approx(pair["verbs"], abs=1e-6) for pair in expected]
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["custom_pipelines"] == json.loads((folder / "config.json").read_text())["custom_pipelines"]
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {path.name for path in folder.glob("*.py")}


def test_a_pipeline_saves_a_whole_folder(folder: Path, tmp_path: Path) -> None:
    made(folder).save_pretrained(tmp_path)
    image = Image.open(folder.parent / "wide.png")
    assert made(tmp_path)(image, threshold=0.0) == made(folder)(image, threshold=0.0)
