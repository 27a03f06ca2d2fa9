"""Writes a page that computes in the browser alone: `hf-dropkey demo MODEL --static_page OUT`."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..classification.uncertainty import SAMPLES
from ..export.graphs import MONTE_CARLO_FILE
from ..extras import needed
from ..hub.cards import README, RunFacts
from ..hub.space_folder import EXAMPLES, check_new
from ..hub.static_folder import GRAPH, SETTINGS_FILE, page_contents, static_card
from ..hub.web_runtime import LICENSE, LICENSE_FILE, PACKAGE, VERSION, runtime_files
from ..version import __version__
from .answers import Classifier
from .examples import example_files, find_examples, origin_text
from .image_numbers import image_numbers
from .opening import kind_of


def static_page_of(
    model: Path, out: Path, *, images: Path | None = None, runtime: Path | None = None
) -> dict[str, float]:
    """Writes the folder of a page that shows a classifier; returns the size of each file in bytes, by name.

    Args:
        model: A saved model.
        out: New or empty.
        images: Folder of example images, which will be public with the page; default: as for `hf-dropkey demo`.
        runtime: As for `runtime_files`.

    Raises:
        FileExistsError: `out` has files.
        FileNotFoundError, ValueError, OSError: As `kind_of`, `find_examples`, `image_numbers`, `runtime_files` and
            `export_graph`; or it is not a classifier.
        ImportError: The extra `onnx` is missing.
    """
    check_new(out)
    kind = kind_of(model)
    if kind != "classification":
        raise ValueError(
            f"{model} is a model for {kind}; a page that computes in the browser shows image classifiers. Serve this one "
            "with hf-dropkey demo"
        )
    with needed("onnx"):
        import onnxscript  # noqa: F401  # now, not after the runtime has been fetched
    contents = {**page_contents(), **runtime_files(runtime), LICENSE_FILE: LICENSE.encode()}
    examples = find_examples([model], images)
    pictures = example_files(examples)
    contents |= {f"{EXAMPLES}/{name}": content for name, content in pictures.items()}
    origin = origin_text([model], images)
    shown = [
        {"file": f"{EXAMPLES}/{name}", "name": example.name} for name, example in zip(pictures, examples, strict=True)
    ]
    settings, graph = _graph(Classifier(model))
    settings |= {"examples": shown, "examples_origin": origin}
    contents[GRAPH] = graph
    contents[SETTINGS_FILE] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    title = f"{model.resolve().name}, in the browser"
    contents[README] = static_card(title, origin, RunFacts.load(model).license).encode()
    for name, content in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: len(content) for name, content in contents.items()}


def _graph(classifier: Classifier) -> tuple[dict[str, Any], bytes]:
    """The settings of a model's page, and its graph that drops keys."""
    numbers = image_numbers(classifier.processor, classifier.channels)
    with TemporaryDirectory(prefix="hf_dropkey_graph_") as folder:
        exported = classifier.export(Path(folder, "graph"), (numbers.height, numbers.width))
        graph = Path(folder, "graph", MONTE_CARLO_FILE).read_bytes()
    own, measured = classifier.settings, classifier.measured_with_own_settings
    settings = {
        "name": classifier.name,
        "classes": list(classifier.names),
        "dropkey": {"ratio": own.ratio, "pattern": own.pattern, "trained": classifier.has_dropkey},
        "masks": SAMPLES,
        "graph": {
            "file": GRAPH,
            "bytes": len(graph),
            "sha256": hashlib.sha256(graph).hexdigest(),
            "difference": exported.monte_carlo_difference,
        },
        "images": numbers.settings(),
        "uncertainty": None
        if measured is None
        else {"split": measured.split, "mutual_information_nats": measured.mutual_information_nats},
        "runtime": (
            f"The graph runs in {PACKAGE} {VERSION} (MIT, Microsoft Corporation); the page is of hf_dropkey {__version__} "
            "(Apache-2.0)."
        ),
    }
    return settings, graph
