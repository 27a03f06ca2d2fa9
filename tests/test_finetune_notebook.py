"""`docs/finetune.ipynb` runs from top to bottom: as it is, without a network, and with a model of the Hub."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
import transformers as hf
from hub_server import File, Repository, serving
from nbclient import NotebookClient


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
CHOICE = "MODEL = None"


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(book: Any, folder: Path, **environment: str) -> str:
    """Runs every cell in a folder, the choice of the model among them; returns what they print."""
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    # figures are drawn into the notebook, whatever is drawn into elsewhere
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client.execute(env={**kept, "PYTHONPATH": str(ROOT), **environment})
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(book: Any) -> int:
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def accuracy(printed: str) -> float:
    (line,) = [line for line in printed.splitlines() if line.startswith(("accuracy 0.", "accuracy 1."))]
    return float(line.split()[1].rstrip(","))


def test_the_notebook_is_whole_and_has_no_outputs() -> None:
    book = notebook()
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum(cell.source.count(CHOICE) for cell in code) == 1
    # one that uploads has to be a choice of the reader
    assert all("--dry_run" in line for cell in code for line in cell.source.splitlines() if " push " in line)


@pytest.mark.slow
def test_it_runs_without_a_network(tmp_path: Path) -> None:
    book = notebook()
    printed = run(book, tmp_path, HF_HUB_OFFLINE="1")
    assert "ViTForImageClassification" in printed and "4 attentions drop keys" in printed
    assert accuracy(printed) > 0.85
    assert "accuracy of the mean over 20 masks" in printed and "nothing was sent" in printed
    assert pictures(book) == 3
    assert (tmp_path / "runs" / "finetuned" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_it_runs_with_a_model_of_the_hub(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    hf.Dinov2Model(hf.Dinov2Config(**shape)).save_pretrained(source)
    hf.ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(source)
    book = notebook()
    for cell in book.cells:
        cell.source = cell.source.replace(CHOICE, 'MODEL = "tester/dinov2-tiny"')
    with serving() as hub:
        repository = hub.repositories["tester/dinov2-tiny"] = Repository(private=False)
        files = {file.name: File(file.read_bytes(), file.suffix == ".safetensors") for file in source.iterdir()}
        repository.add("main", "Upload", files)
        printed = run(book, tmp_path, **hub.environment(tmp_path / "home"))
        # a dry run sends nothing
        assert list(hub.repositories) == ["tester/dinov2-tiny"]
    assert "Dinov2ForImageClassification" in printed and "3 attentions drop keys" in printed
    # random weights at the rate of a pretrained model learn little: only that it trains and is evaluated
    assert "accuracy of the mean over 20 masks" in printed and pictures(book) == 3
    assert '"model_type": "dinov2"' in (tmp_path / "runs" / "finetuned" / "config.json").read_text()
