"""What cannot be shown or served is said in one sentence."""

import json
import socket
import sys
from pathlib import Path

import pytest
from small_demos import noise, save_classifier
from transformers import BertConfig, BertForSequenceClassification

from hf_dropkey.cli import main
from hf_dropkey.demo.examples import find_examples
from hf_dropkey.demo.opening import distinct_names, kind_of, open_page
from hf_dropkey.demo.server import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "saved")


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["demo", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-dropkey demo: ") and said.count("\n") == 1
    return said


def test_a_port_in_use_is_named_with_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="needs gradio, which the extra 'demo' installs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refusal(capsys, folder, "--port", str(port))
    assert f"--port {port} cannot be used" in said and "such as --port " in said


def test_a_free_port_and_impossible_ones() -> None:
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ValueError, match="--port 70000 is not a port"):
        free_port("127.0.0.1", 70000)
    # of the block for documentation, on no machine
    with pytest.raises(OSError, match="--host 192.0.2.1 cannot be listened on"):
        free_port("192.0.2.1", 0)


def test_a_text_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' without preprocessor_config.json.*the demo shows models of images"):
        kind_of(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a BertForSequenceClassification; the demo shows image classifiers"):
        kind_of(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"lacks .*model.safetensors"):
        open_page([tmp_path], None)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_page([tmp_path / "nothing"], None)
    with pytest.raises(ValueError, match="3 models were given; give one, or two"):
        open_page([folder] * 3, None)


@pytest.mark.usefixtures("auto_image_processor")
def test_a_damaged_file_of_uncertainties_is_said(folder: Path, tmp_path: Path) -> None:
    copied = save_classifier(tmp_path / "saved")
    (copied / "uncertainty_results.json").write_text(json.dumps({"split": "test"}))
    with pytest.raises(
        ValueError, match="uncertainty_results.json is damaged .* delete it, hf-dropkey evaluate --uncertainty writes"
    ):
        open_page([copied], None)


def test_gradio_missing_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "run pip install 'hf_dropkey[demo]'" in refusal(capsys, folder)


def test_examples_come_from_where_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="--images .*pictures has no image file"):
        find_examples([folder], tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match="--images .* is not a folder"):
        find_examples([folder], tmp_path / "none")
    noise().save(tmp_path / "pictures" / "mine.png")
    assert [one.name for one in find_examples([folder], tmp_path / "pictures")] == ["mine"]
    digits = find_examples([folder], None)
    assert len(digits) == 12 and digits[0].image.size == (8, 8)
    plain = save_classifier(tmp_path / "saved")
    (plain / "run_facts.json").unlink()
    assert [one.name for one in find_examples([plain], None)] == ["temple", "flower"]


def test_folders_of_one_name_are_told_by_the_one_above(tmp_path: Path) -> None:
    assert distinct_names([tmp_path / "a" / "best", tmp_path / "b" / "best"]) == ["a/best", "b/best"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_arguments_of_a_space_need_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--package is of a Space" in refusal(capsys, folder, "--package", "hf_dropkey[demo]==1.0")
