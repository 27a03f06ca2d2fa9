"""The page about a run is whole in itself, shows the run's numbers, and can be made again from the folder."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_runs import RECIPE

from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.cli import main
from hf_dropkey.evaluate_modules.calibration.scores import expected_calibration_error
from hf_dropkey.hub.push_plan import plan_push
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.pages.observed import Observed, Predictions, save_mistakes
from hf_dropkey.pages.run import curves_of, write_report


CHANGES = {"max_steps": 6, "per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_steps": 2}
SECTIONS = ["Results", "Curves", "Confusion", "Calibration", "Worst mistakes", "DropKey", "Settings"]


class Reader(HTMLParser):
    """Collects tags, links and headings of a page, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe: dict[str, Any] = {**RECIPE, **CHANGES, "max_eval_samples": 40, "output_dir": str(folder / "run")}
    assert "logging_steps" not in recipe
    (folder / "recipe.json").write_text(json.dumps({**recipe, "save_strategy": "no"}))
    ClassificationJob.main([str(folder / "recipe.json")])
    return folder / "run"


def test_a_run_leaves_its_page(trained: Path) -> None:
    text = (trained / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    assert page.headings == SECTIONS and not page.open
    # nothing is loaded, and nothing runs
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert "script" not in page.tags and "@import" not in text and "url(" not in text
    assert '<meta name="viewport" content="width=device-width' in text and "default-src &#x27;none" not in text
    results = json.loads((trained / "all_results.json").read_text())
    assert f"<b>{results['eval_accuracy']:.4f}</b>" in text
    assert "hf-dropkey push does not upload it" in text and str(trained) not in text
    # a loss of six steps is a curve: it is logged without --logging_steps
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    titles = {title: series for title, _, series in curves_of(log)}
    assert len(titles["loss"]["training"]) == 6 and len(titles["loss"]["evaluation"]) == 3


def test_what_it_shows_is_kept_beside_it(trained: Path) -> None:
    with (trained / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((trained / "all_results.json").read_text())
    right = [row["class"] == row["predicted"] for row in rows]
    assert len(rows) == 40 and np.mean(right) == pytest.approx(results["eval_accuracy"])
    observed = Observed.load(trained)
    assert observed is not None
    wrong = sorted((float(row["confidence"]) for row in rows if row["class"] != row["predicted"]), reverse=True)
    assert [one.confidence for one in observed.mistakes] == pytest.approx(wrong[:12], abs=1e-5)
    for one in observed.mistakes:
        with Image.open(trained / one.file) as image:
            assert max(image.size) == one.side == 8
    assert [layer.ratio for layer in observed.drops] == pytest.approx([0.4, 0.0])
    assert np.mean(observed.drops[0].fractions) == pytest.approx(0.4, abs=0.03)
    assert "Measured on 8 images in 4 training passes" in observed.drops_note


def test_the_command_makes_it_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    images = re.compile(r"data:image/png;base64,[^\"]+")
    assert images.sub("", (tmp_path / "run" / "report.html").read_text()) == images.sub("", before)


def test_without_the_jobs_own_files_it_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        shutil.copy(trained / name, tmp_path)
    text = write_report(tmp_path).read_text()
    assert Reader(text).headings == ["Results", "Curves", "DropKey", "Settings"]
    assert "Measured on random images, 4 passes." in text and "<td>global_step</td>" in text
    (tmp_path / "trainer_state.json").unlink()
    text = write_report(tmp_path).read_text()
    assert "The run logged too few values for a curve" in text and "No file records the settings." in text


def test_it_stays_on_this_machine(trained: Path) -> None:
    plan = plan_push(trained, include=["*.html", "mistakes/*.txt"])
    sent = {file.name for file in plan.files}
    assert not {"report.html", "report_data.json", "predictions.csv"} & sent
    assert not any(name.startswith("mistakes/") for name in sent)
    # files of a run are one problem of `check`, not one each
    assert sum("report.html" in problem for problem in check_release(trained).problems) <= 1


def test_names_of_classes_are_text(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    evil = "<img src=x onerror=alert(1)>"
    data = json.loads((tmp_path / "run" / "report_data.json").read_text())
    for one in data["mistakes"]:
        one["label"] = evil
    (tmp_path / "run" / "report_data.json").write_text(json.dumps(data))
    text = write_report(tmp_path / "run").read_text()
    assert evil not in text and "&lt;img src=x onerror" in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("report_data.json", '{"drops": []}', r"report_data.json is damaged \('drops_note'\); delete it"),
        ("predictions.csv", "row,class,predicted,confidence\n1,cat,0,1\n", "does not fit report_data.json beside it"),
        ("trainer_state.json", "[", "trainer_state.json is damaged"),
    ],
)
def test_damaged_files_are_named(trained: Path, tmp_path: Path, name: str, content: str, told: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=told):
        write_report(tmp_path / "run")


def test_a_folder_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "so it is not the output folder of a run; give --output_dir" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "gone")]) == 2


def test_a_run_without_mistakes_has_no_pictures(tmp_path: Path) -> None:
    right = np.array([0, 1])
    predictions = Predictions(["a", "b"], ["cat", "dog"], right, right, np.array([0.9, 0.8]))
    assert predictions.worst(3) == [] and save_mistakes(tmp_path, predictions, {}) == []
    predictions.save(tmp_path)
    again = Predictions.load(tmp_path, ["cat", "dog"])
    assert again is not None and again.rows == ["a", "b"] and np.array_equal(again.labels, right)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert expected_calibration_error(probabilities, right) == pytest.approx(0.15)


def test_a_run_may_go_without(tmp_path: Path) -> None:
    recipe = {**RECIPE, "max_steps": 1, "max_eval_samples": 8, "do_eval": False, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "save_strategy": "no"}))
    ClassificationJob.main([str(tmp_path / "recipe.json"), "--report", "False"])
    assert not (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "README.md").is_file()
