"""The page about a run, from the files in its folder: `write_report`.

Every number on it comes from a file of the run; what a run did not log or measure is said in its place.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hub.cards import SETTINGS, TIMINGS, RunFacts, measured
from ..hub.metric_names import METRICS, full_name
from ..inspection.analysis import LayerDrop, measured_drops
from ..inspection.saved import attention_report, empty_model
from ..patching import apply_dropkey
from ..patching.apply import dropkey_modules
from ..patching.report import DropKeyReport
from ..saved import load_config, read_json, saved_class
from ..version import __version__
from . import figures, page
from .observed import EVALUATION, ROBUSTNESS, Observed, Predictions


logger = logging.getLogger(__name__)

REPORT = "report.html"
STATE = "trainer_state.json"
# figures that tasks leave in the folder of a run
TASK_FIGURES = {
    "predictions.png": "Evaluation data with what the model predicts",
    "ground_truth.png": "Training data with its annotations",
}
CONFUSED_SHOWN = 10
PASSES = 4


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a run; returns its path.

    Raises:
        FileNotFoundError: The folder is not there, or holds neither a model nor the state of a run.
        ValueError: A file of the run is damaged.
        ImportError: matplotlib is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the output folder of a training run")
    if not any((folder / name).is_file() for name in (STATE, "config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{folder} has neither {STATE} nor config.json, so it is not the output folder of a run; give --output_dir "
            "of the training"
        )
    run = Run(folder)
    sections = [section for part in run.parts() for section in part]
    text = page.document(f"{folder.resolve().name}: training run", run.lead(), sections)
    file = folder / REPORT
    file.write_text(text, encoding="utf-8")
    return file


class Run:
    """The files of a run, and the sections of its page."""

    def __init__(self, folder: Path) -> None:
        """Reads the small files in `folder`."""
        self.folder = folder
        self.facts = RunFacts.load(folder)
        self.config = _json(folder / "config.json")
        self.state = _json(folder / STATE)
        self.results = _json(folder / "all_results.json")
        self.metrics = measured(folder)
        self.observed = Observed.load(folder)
        self.evaluation = _json(folder / EVALUATION)
        self.predictions = Predictions.load(folder, self.observed.classes if self.observed else [])

    def parts(self) -> Iterator[Iterator[page.Section]]:
        """The sections in their order; a part without anything to show has none."""
        yield self.result_sections()
        yield self.curve_sections()
        yield self.class_sections()
        yield self.robustness_sections()
        yield self.figure_sections()
        yield self.dropkey_sections()
        yield self.setting_sections()

    def lead(self) -> str:
        """What was trained on what, in a sentence."""
        kind = (self.config.get("architectures") or [self.config.get("model_type", "a model")])[0]
        source = f", from {self.facts.base_model}" if self.facts.base_model else ""
        data = f", on {self.facts.dataset}" if self.facts.dataset else ""
        where = self.facts.evaluation_dataset or self.facts.dataset
        split = f", split {self.facts.dataset_split}" if self.facts.dataset_split else ""
        evaluated = f" Evaluated on {where}{split}." if where and self.metrics else ""
        pictures = " It holds pictures of the data; hf-dropkey push does not upload it." if self.has_pictures else ""
        made = f"Written by hf_dropkey {__version__}.{pictures}"
        return page.paragraph(f"{kind}{source}{data}.{evaluated}") + page.paragraph(made, note=True)

    @property
    def has_pictures(self) -> bool:
        """Whether the page shows images of the data."""
        own = any((self.folder / name).is_file() for name in TASK_FIGURES)
        return own or bool(self.observed and self.observed.mistakes)

    def result_sections(self) -> Iterator[page.Section]:
        """The measured numbers, the first ones large."""
        if not self.metrics:
            yield page.Section(
                "Results", page.paragraph("Nothing was measured: the run did not evaluate (--do_eval).")
            )
            return
        shown = {name: value for name, value in self.metrics.items() if name != "loss"} or self.metrics
        first = [
            (_label(name), f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}")
            for name, value in list(shown.items())[:4]
        ]
        if "train_runtime" in self.results:
            first.append(("training time", _duration(self.results["train_runtime"])))
        if "parameters" in self.results:
            first.append(("parameters", f"{self.results['parameters']:,}"))
        rows = [(full_name(name), value) for name, value in self.metrics.items()]
        note = "One run; another seed gives other numbers."
        more = page.details("All numbers", page.table(("metric", "value"), rows)) if len(rows) > 4 else ""
        yield page.Section(
            "Results", page.tiles([(name, value) for name, value in first]) + more + page.paragraph(note, note=True)
        )

    def curve_sections(self) -> Iterator[page.Section]:
        """Losses, metrics, the learning rate and the drop ratio over the steps."""
        log: list[Mapping[str, float]] = self.state.get("log_history", [])
        drawn = [
            page.chart(figures.lines(series, ylabel=ylabel, title=title), f"{title} over the steps of training")
            for title, ylabel, series in curves_of(log)
        ]
        body = f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""
        missing = "The run logged too few values for a curve (--logging_steps, --eval_strategy)." if not drawn else ""
        yield page.Section("Curves", body + (page.paragraph(missing) if missing else ""))

    def class_sections(self) -> Iterator[page.Section]:
        """Confusion, calibration and the worst mistakes of a classifier."""
        found = self.predictions
        if found is None or not len(found.labels):
            return
        matrix = figures.confusion(found.labels, found.predicted, found.classes)
        right = found.predicted == found.labels
        accuracy = f"{int(right.sum()):,} of {len(right):,} images right ({right.mean():.1%})."
        yield page.Section(
            "Confusion",
            page.paragraph(accuracy)
            + f'<div class="figures">{page.chart(matrix, "confusion matrix")}{_most_confused(found)}</div>',
        )
        calibration = figures.calibration(found.confidence, right, ece=self.metrics.get("ece"))
        words = (
            f"Mean confidence {found.confidence.mean():.1%}, accuracy {right.mean():.1%}. Below the dotted line the model "
            "is more confident than right."
        )
        yield page.Section(
            "Calibration", page.paragraph(words) + page.chart(calibration, "accuracy against confidence")
        )
        yield page.Section("Worst mistakes", self._mistakes(int((~right).sum())))

    def _mistakes(self, wrong: int) -> str:
        mistakes = self.observed.mistakes if self.observed else []
        shown = [
            (
                self.folder / one.file,
                one.side,
                f"{one.label}, predicted {one.predicted} ({one.confidence:.0%}) · {one.row}",
            )
            for one in mistakes
            if (self.folder / one.file).is_file()
        ]
        if not shown:
            return page.paragraph("No image was classified wrongly." if not wrong else "Their pictures were not kept.")
        words = f"The {len(shown)} of {wrong:,} wrong predictions with the highest confidence: true class, predicted class."
        return page.paragraph(words) + page.pictures(shown)

    def robustness_sections(self) -> Iterator[page.Section]:
        """Accuracy on images made worse, if `hf-dropkey evaluate --robustness` measured it.

        Raises:
            ValueError: Its file is damaged.
        """
        if ROBUSTNESS not in self.evaluation:
            return
        try:
            found = {
                str(kind): [float(value) for value in values] for kind, values in self.evaluation[ROBUSTNESS].items()
            }
            clean, where = float(self.evaluation["accuracy"]), f"{self.evaluation['data']}, {self.evaluation['split']}"
            images = int(self.evaluation["images"])
            head = ("", *(f"strength {number}" for number in range(1, 1 + len(next(iter(found.values()))))))
            rows = [(kind, *(f"{value:.4f}" for value in values)) for kind, values in found.items()]
            drawn = figures.robustness(found, clean=clean)
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder / EVALUATION} is damaged ({error!r}); delete it, and measure again with hf-dropkey evaluate "
                "--robustness"
            ) from error
        mean = float(np.mean([value for values in found.values() for value in values]))
        words = f"Accuracy {clean:.4f} as they are, {mean:.4f} on average over kinds and strengths ({images:,} images of {where})."
        note = "Noise, blur, contrast and JPEG as in ImageNet-C, at the size that the model gets; the same for every model."
        body = page.paragraph(words) + page.chart(drawn, "accuracy on images made worse, by strength")
        yield page.Section(
            "Robustness", body + page.details("All numbers", page.table(head, rows)) + page.paragraph(note, note=True)
        )

    def figure_sections(self) -> Iterator[page.Section]:
        """Figures that the task drew."""
        found = [(self.folder / name, words) for name, words in TASK_FIGURES.items() if (self.folder / name).is_file()]
        if found:
            yield page.Section("Examples", "".join(page.picture_file(file, words) for file, words in found))

    def dropkey_sections(self) -> Iterator[page.Section]:
        """Settings, schedule, measured fractions, and the attentions that drop nothing."""
        rows = [(text, self.config[name]) for name, text in SETTINGS.items() if self.config.get(name) is not None]
        if self.config.get("dropkey_pattern") not in ("block", "cross"):
            rows = [(text, value) for text, value in rows if text != SETTINGS["dropkey_window"]]
        report = _attentions(self.folder)
        layers, note = self._drops(report)
        if not rows and not layers:
            yield page.Section("DropKey", page.paragraph("The model has no DropKey settings."))
            return
        body = page.table(("setting", "value"), rows) if rows else ""
        if layers:
            body += page.chart(
                figures.drops(layers), "configured drop ratio of each attention, and the measured fraction"
            )
            body += page.details(
                "Every attention", page.table(("attention", "ratio", "measured"), map(_drop_row, layers))
            )
        body += page.paragraph(note, note=True) if note else ""
        if report is not None and report.unreached:
            others = [(one.name, one.reason) for one in report.unreached]
            body += page.details(f"{len(others)} attentions drop nothing", page.table(("attention", "reason"), others))
        yield page.Section("DropKey", body)

    def _drops(self, report: DropKeyReport | None) -> tuple[list[LayerDrop], str]:
        if self.observed is not None:
            return self.observed.drops, self.observed.drops_note
        try:
            return drops_in(self.folder)
        except (ValueError, FileNotFoundError) as error:
            sites = report.sites if report is not None else ()
            return [
                LayerDrop(site.name, site.ratio, reason="not measured") for site in sites
            ], f"Not measured: {error}"

    def setting_sections(self) -> Iterator[page.Section]:
        """How the run was started, what determines it, and with which versions."""
        rows = [*self.facts.hyperparameters.items()]
        rows += [(name, self.state[name]) for name in ("global_step", "epoch") if self.state.get(name)]
        body = f"<pre>{escape(self.facts.command)}</pre>" if self.facts.command else ""
        body += page.table(("setting", "value"), rows) if rows else page.paragraph("No file records the settings.")
        if self.facts.versions:
            body += page.details("Versions", page.table(("package", "version"), self.facts.versions.items()))
        if self.config:
            plain = [(name, value) for name, value in self.config.items() if isinstance(value, str | int | float)]
            body += page.details("Configuration of the model", page.table(("field", "value"), plain))
        yield page.Section("Settings", body)


Curve = dict[str, list[tuple[float, float]]]


def curves_of(log: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str, Curve]]:
    """Title, label of the axis and series of each figure that a log has points for; a curve has two points at least."""
    losses = {"training": _points(log, "loss"), "evaluation": _points(log, "eval_loss")}
    yield from _if_any("loss", "loss", losses)
    names = list(dict.fromkeys(name for entry in log for name in entry if name.startswith("eval_")))
    names = [name.removeprefix("eval_") for name in names]
    scores = [name for name in names if name != "loss" and name not in TIMINGS and _is_score(name)]
    yield from _if_any(
        "scores on the evaluation data", "score", {_label(n): _points(log, f"eval_{n}") for n in scores[:4]}
    )
    for name in [
        name for name in names if name in METRICS and METRICS[name].larger_is_better is False and name != "loss"
    ][:3]:
        yield from _if_any(full_name(name), METRICS[name].label, {_label(name): _points(log, f"eval_{name}")})
    yield from _if_any("learning rate", "learning rate", {"learning rate": _points(log, "learning_rate")})
    ratios = list(dict.fromkeys(name for entry in log for name in entry if name.startswith("dropkey")))
    yield from _if_any("DropKey", "ratio", {name: _points(log, name) for name in ratios[:6]})


def _is_score(name: str) -> bool:
    """Whether larger is better: as the table of metrics has it, else by the words that COCO's scores have."""
    if name in METRICS:
        return METRICS[name].larger_is_better is True
    return name.startswith(("AP", "AR", "mAP", "map"))


def _points(log: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    # the last value at a step counts
    found = {entry["step"]: entry[name] for entry in log if name in entry and np.isfinite(entry[name])}
    return sorted(found.items())


def _if_any(title: str, ylabel: str, series: Curve) -> Iterator[tuple[str, str, Curve]]:
    drawn = {name: points for name, points in series.items() if len(points) > 1}
    if drawn:
        yield title, ylabel, drawn


def drops_in(folder: Path) -> tuple[list[LayerDrop], str]:
    """Measures the drops of a saved model on random images, whose content does not matter to DropKey.

    Raises:
        ValueError, FileNotFoundError: The model cannot be loaded, or its attention cannot be read.
    """
    config: Any = load_config(folder)
    if not getattr(config, "dropkey_ratio", None):
        return [], ""
    cls: Any = saved_class(config, folder)
    size = getattr(config, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2:
        raise ValueError("the configuration names no image size")
    model = cls.from_pretrained(folder, dtype=torch.float32)
    if not any(dropkey_modules(model)):
        apply_dropkey(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, getattr(config, "num_channels", 3), *sides, generator=generator)
    return measured_drops(
        model, {"pixel_values": pixels}, passes=PASSES
    ), f"Measured on random images, {PASSES} passes."


def _attentions(folder: Path) -> DropKeyReport | None:
    """Every attention of the saved model; None where the model is not known, or remembers no DropKey."""
    if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("dropkey_ratio") is None:
        return None
    try:
        return attention_report(empty_model(folder))
    except ValueError as error:
        logger.warning("report.html does not list the attentions: %s", error)
        return None


def _drop_row(layer: LayerDrop) -> tuple[str, float, Any]:
    return layer.name, layer.ratio, float(np.mean(layer.fractions)) if layer.fractions else layer.reason or ""


def _most_confused(found: Predictions) -> str:
    """The pairs of classes that are confused most."""
    counts = figures.confusion_counts(found.labels, found.predicted, len(found.classes))
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:CONFUSED_SHOWN]
    rows = [
        (found.classes[row], found.classes[column], int(counts[row, column]))
        for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)
        if counts[row, column]
    ]
    return page.table(("true class", "predicted as", "images"), rows) if rows else ""


def _label(name: str) -> str:
    return METRICS[name].label if name in METRICS else name


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
