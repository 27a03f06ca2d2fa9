"""The modules for `evaluate` load by path and by name, join, and compute what scikit-learn and loops compute."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score, top_k_accuracy_score

import hf_dropkey
from hf_dropkey.evaluate_modules import FOLDER, METRIC_MODULES, metric_path
from hf_dropkey.evaluate_modules.calibration.scores import brier_score, expected_calibration_error
from hf_dropkey.evaluate_modules.monte_carlo_uncertainty.scores import error_auroc
from hf_dropkey.evaluate_modules.top_k_accuracy.scores import top_k_accuracy


def drawn(classes: int = 7, images: int = 300, passes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[images, passes, classes]` that are right more often than not, and class numbers."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, classes, size=images)
    logits = draws.normal(size=(images, passes, classes)) + 2 * np.eye(classes)[labels][:, None]
    powers = np.exp(logits)
    return powers / powers.sum(axis=-1, keepdims=True), labels


def load(name: str) -> Any:
    return evaluate.load(metric_path(name))


def test_probabilities_are_measured_as_scikit_learn_measures_them() -> None:
    passes, labels = drawn()
    probabilities = passes[:, 0]
    found = load("top_k_accuracy").compute(probabilities=probabilities, references=labels, k=[1, 3])
    assert found == {
        "accuracy": accuracy_score(labels, probabilities.argmax(axis=1)),
        "top3_accuracy": top_k_accuracy_score(labels, probabilities, k=3),
    }
    assert 0.4 < found["accuracy"] < found["top3_accuracy"] < 1
    measured = load("calibration").compute(probabilities=probabilities, references=labels)
    assert measured["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    assert measured["brier"] == pytest.approx(brier_score_loss(labels, probabilities, scale_by_half=False), rel=1e-12)
    assert measured["ece"] == pytest.approx(looped_calibration_error(probabilities, labels), rel=1e-12)


def looped_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for number in range(bins):
        confidences, hits = [], []
        for row, label in zip(probabilities, labels, strict=True):
            if number / bins < row.max() <= (number + 1) / bins:
                confidences.append(row.max())
                hits.append(row.argmax() == label)
        if hits:
            total += abs(np.mean(hits) - np.mean(confidences)) * len(hits) / len(labels)
    return float(total)


def test_monte_carlo_passes_are_averaged_and_measured() -> None:
    passes, labels = drawn()
    mean = passes.mean(axis=1)
    for name in ("top_k_accuracy", "calibration"):
        expected = load(name).compute(probabilities=mean, references=labels)
        assert load(name).compute(probabilities=passes, references=labels) == pytest.approx(expected, rel=1e-12)
    found = load("monte_carlo_uncertainty").compute(probabilities=passes, references=labels)
    entropies = [-sum(p * np.log(p) for p in row) for row in mean]
    within = [np.mean([-sum(p * np.log(p) for p in one) for one in image]) for image in passes]
    information = np.array(entropies) - np.array(within)
    wrong = mean.argmax(axis=1) != labels
    assert found["entropy"] == pytest.approx(np.mean(entropies)) and found["passes"] == 5
    assert found["mutual_information"] == pytest.approx(information.mean())
    assert found["entropy_auroc"] == pytest.approx(roc_auc_score(wrong, entropies))
    assert found["mutual_information_auroc"] == pytest.approx(roc_auc_score(wrong, information))
    spread = [image[:, row.argmax()].std(ddof=1) for image, row in zip(passes, mean, strict=True)]
    assert found["standard_deviation"] == pytest.approx(np.mean(spread))
    assert 0.5 < found["entropy_auroc"] < 1


def test_the_entropies_are_those_of_monte_carlo_predict() -> None:
    import torch

    from hf_dropkey.inference import MonteCarloMoments

    passes, labels = drawn()
    moments = MonteCarloMoments(-1)
    for number in range(passes.shape[1]):
        moments.add(torch.tensor(np.log(passes[:, number])))
    prediction = moments.prediction()
    found = load("monte_carlo_uncertainty").compute(probabilities=passes, references=labels)
    assert found["entropy"] == pytest.approx(prediction.entropy.mean().item(), rel=1e-6)
    assert found["mutual_information"] == pytest.approx(prediction.mutual_information.mean().item(), rel=1e-5)


def test_ties_in_uncertainty_count_half() -> None:
    uncertainty, wrong = np.array([0.0, 0.0, 1.0, 1.0, 2.0]), np.array([False, True, False, True, False])
    assert error_auroc(uncertainty, wrong) == pytest.approx(roc_auc_score(wrong, uncertainty))
    assert np.isnan(error_auroc(uncertainty, np.zeros(5, dtype=bool)))


def test_modules_join_and_take_batches() -> None:
    passes, labels = drawn()
    joined = evaluate.combine([metric_path(name) for name in METRIC_MODULES])
    for place in range(0, len(labels), 64):
        joined.add_batch(probabilities=passes[place : place + 64], references=labels[place : place + 64])
    alone = [load(name).compute(probabilities=passes, references=labels) for name in METRIC_MODULES]
    assert joined.compute() == pytest.approx({name: value for found in alone for name, value in found.items()})
    # of one pass, those that take it
    two = evaluate.combine([metric_path("top_k_accuracy"), metric_path("calibration")])
    found = two.compute(probabilities=passes[:, 0], references=labels)
    assert set(found) == {"accuracy", "top5_accuracy", "ece", "nll", "brier"}


@pytest.mark.parametrize(
    ("name", "probabilities", "references", "told"),
    [
        ("calibration", [[2.0, -1.0]], [0], "those of an image sum to 1; found a smallest of -1 and sums from 1 to 1"),
        ("top_k_accuracy", [[3.0, 5.0]], [0], "Of logits, take the softmax first"),
        ("calibration", [[0.5, 0.5]], [2], "the references have class 2, and the probabilities are of classes 0 to 1"),
        ("calibration", [[0.5, 0.5]], [-1], "the references have class -1"),
        ("top_k_accuracy", [[0.5, 0.5], [0.2, 0.3, 0.5]], [0, 1], "different numbers of classes or passes"),
        ("calibration", [[float("nan"), 0.5]], [0], "sum to 1"),
        ("monte_carlo_uncertainty", [[0.5, 0.5]], [0], "give the probabilities of several passes"),
    ],
)
def test_what_is_no_probability_is_refused(name: str, probabilities: Any, references: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        load(name).compute(probabilities=probabilities, references=references)


def test_a_reference_without_probability_has_no_finite_likelihood() -> None:
    assert load("calibration").compute(probabilities=[[1.0, 0.0]], references=[1])["nll"] == np.inf


@pytest.mark.parametrize(("right_of_ten", "error"), [(9, 0.0), (5, 0.4), (10, 0.1)])
def test_calibration_error_of_a_constant_confidence_of_nine_tenths(right_of_ten: int, error: float) -> None:
    probabilities, labels = np.tile([0.9, 0.1], (10, 1)), np.array([0] * right_of_ten + [1] * (10 - right_of_ten))
    assert expected_calibration_error(probabilities, labels) == pytest.approx(error, abs=1e-9)
    with pytest.raises(ValueError, match="bins=0 is below 1"):
        expected_calibration_error(probabilities, labels, bins=0)


def test_the_brier_score_of_known_cases() -> None:
    assert brier_score(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert brier_score(np.array([[1.0, 0.0]]), np.array([1])) == 2
    assert brier_score(np.full((1, 4), 0.25), np.array([3])) == pytest.approx(0.75)


def test_a_model_that_cannot_decide_is_not_right() -> None:
    scores, labels = np.zeros((4, 6)), np.zeros(4, dtype=int)
    assert top_k_accuracy(scores, labels, k=1) == 0
    assert top_k_accuracy(scores, labels, k=5) == 0
    assert top_k_accuracy(scores, labels, k=6) == 1


@pytest.mark.parametrize("k", [0, 8])
def test_k_must_be_possible(k: int) -> None:
    passes, labels = drawn()
    with pytest.raises(ValueError, match=rf"k={k} is outside 1\.\.7"):
        load("top_k_accuracy").compute(probabilities=passes, references=labels, k=k)


def test_a_path_is_public_and_an_unknown_name_an_error() -> None:
    assert hf_dropkey.metric_path is metric_path
    assert {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        METRIC_MODULES
    )
    with pytest.raises(ValueError, match="there is no metric 'f1'; choose from calibration, "):
        metric_path("f1")


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_a_folder_can_be_a_space(name: str) -> None:
    folder = Path(metric_path(name))
    text = (folder / "README.md").read_text(encoding="utf-8")
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["sdk"] == "static" and {"evaluate", "metric"} <= set(about["tags"]) and about["title"]
    # the example of the page, and of the module's own description, compute what they say
    call = re.search(r"metric\.compute\((.+)\)", text)
    shown = re.search(r"`(\{.+\})`", text)
    assert call and shown
    found = load(name).compute(**eval(f"dict({call[1]})"))
    assert {key: round(value, 4) for key, value in found.items()} == json.loads(shown[1])
    described = re.search(r">>> \w+\.compute\((.+?)\)(\[.+\])?\n\s+(.+)", load(name).inputs_description)
    assert described
    value = load(name).compute(**eval(f"dict({described[1]})"))
    expected = eval(described[3])
    assert (value[described[2].strip('["]')] if described[2] else value) == pytest.approx(expected)
    # what `evaluate` has to find: one package on a line, none but those of requirements.txt
    needed = {line.split(">")[0] for line in (folder / "requirements.txt").read_text().split()}
    for file in folder.glob("*.py"):
        lines = re.findall(r"^(?:import|from) (.+)$", file.read_text(), re.MULTILINE)
        assert not any("," in line for line in lines if " import " not in line)
        packages = {re.split(r"[ .]", line)[0] for line in lines} - {""}
        assert packages <= needed | sys.stdlib_module_names


def test_a_space_is_loaded_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "spaces" / "someone" / "calibration" / "resolve").mkdir(parents=True)
    shutil.copytree(metric_path("calibration"), tmp_path / "spaces" / "someone" / "calibration" / "resolve" / "main")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    code = """
    import evaluate
    found = evaluate.load("someone/calibration", revision="main")
    print(found.compute(probabilities=[[0.9, 0.1]], references=[0])["ece"])
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_OFFLINE": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", re.sub(r"^    ", "", code, flags=re.MULTILINE)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        thread.join(10)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(0.1)
