"""Model cards from a saved folder and the results files of its run, merged into a card that was edited by hand.

Every number comes from a file of the run. Only the sections between markers and the metadata are made anew; the rest
of an existing card stays.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

# huggingface_hub and Transformers require it
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its list of names

from ..models.configuration_dropkey_hoi import HOI_TASK
from ..patching.adapters import ADAPTER_CONFIG
from ..saved import base_of, config_file, is_adapter, processor_size
from .metric_names import full_name


RUN_FACTS = "run_facts.json"
README = "README.md"
SECTION = re.compile(r"<!-- hf_dropkey:(\w+) begin[^>]*-->\r?\n.*?<!-- hf_dropkey:\1 end -->", re.DOTALL)
MARKER = re.compile(r"<!-- hf_dropkey:(\w+) (begin|end)")
# of a run's results: how long it took, not how well it went
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")
# of results of detection: the package that counted, after `eval_`
COUNTED_BY = "counted_by"
# images that the Hub offers for its widget, those of its own documentation, by task
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
WIDGETS = {
    "image-classification": (
        {"src": f"{SAMPLES}/tiger.jpg", "example_title": "Tiger"},
        {"src": f"{SAMPLES}/teapot.jpg", "example_title": "Teapot"},
    ),
    "object-detection": (
        {"src": f"{SAMPLES}/savanna.jpg", "example_title": "Savanna"},
        {"src": f"{SAMPLES}/football-match.jpg", "example_title": "Football match"},
    ),
}
# end of a class name: the Hub's name of the task, the Auto class
TASKS = {
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForMaskedImageModeling": (None, "AutoModelForMaskedImageModeling"),
    "HoiForObjectDetection": (HOI_TASK, "AutoModelForObjectDetection"),
    "ForObjectDetection": ("object-detection", "AutoModelForObjectDetection"),
    "ForSemanticSegmentation": ("image-segmentation", "AutoModelForSemanticSegmentation"),
    "ForVideoClassification": ("video-classification", "AutoModelForVideoClassification"),
    "ForBodyMesh": ("image-to-3d", "AutoModel"),
    "Model": ("image-feature-extraction", "AutoModel"),
}
SETTINGS = {
    "dropkey_ratio": "largest drop ratio of a layer",
    "dropkey_final_ratio": "ratio at the other end of the schedule",
    "dropkey_schedule": "schedule over depth",
    "dropkey_pattern": "dropped together",
    "dropkey_window": "window, in patches",
    "dropkey_drop_path_rate": "drop path: largest rate of a layer",
    "dropkey_patch_dropout_rate": "patch dropout: fraction of the patches",
}
CITATION = """@inproceedings{li2023dropkey,
  title     = {DropKey for Vision Transformer},
  author    = {Li, Bonan and Hu, Yinhan and Nie, Xuecheng and Han, Congying and Jiang, Xiangjian and Guo, Tiande and Liu, Luoqi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023},
  pages     = {22700--22709}
}"""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run that no other saved file holds; kept beside the weights as `run_facts.json`, for later cards.

    Attributes:
        dataset: Name of the data.
        dataset_id: Its id on the Hub, if it has one.
        dataset_split: The split used for evaluation.
        evaluation_dataset: Name of the evaluation data, where it is not `dataset`.
        base_model: Hub id, or any name, of the model that training started from.
        from_scratch: Whether training started from random weights.
        license: The weights' licence, an identifier of the Hub such as "apache-2.0".
        language: Language of the data, for models that read text.
        pipeline_tag: The Hub's name of the task, where the class does not say it.
        command: The command that trained the model.
        hyperparameters: Settings of the run by name.
        versions: Version of each package by name.
        tags: More tags.
        results: Text of the results, where more than this one run was measured.
        limits: Further limits, one sentence each.
    """

    dataset: str | None = None
    dataset_id: str | None = None
    dataset_split: str | None = None
    evaluation_dataset: str | None = None
    base_model: str | None = None
    from_scratch: bool = False
    license: str | None = None
    language: str | None = None
    pipeline_tag: str | None = None
    command: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    results: str | None = None
    limits: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the file."""
        known = {name: value for name, value in asdict(self).items() if value}
        (folder / RUN_FACTS).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "RunFacts":
        """Reads the file; without one, no facts are known.

        Raises:
            ValueError: The file is not a JSON object, or has unknown fields.
        """
        found = _read_json(folder / RUN_FACTS)
        unknown = sorted(set(found) - {entry.name for entry in fields(cls)})
        if unknown:
            allowed = ", ".join(entry.name for entry in fields(cls))
            raise ValueError(f"{folder / RUN_FACTS} has unknown fields {unknown}; allowed are {allowed}")
        return cls(**found)


def model_card(
    folder: Path, *, repo_id: str | None = None, revision: str | None = None, existing: str | None = None
) -> ModelCard:
    """The card of a saved folder: an existing card with its marked sections and metadata made anew, or a new one.

    Existing metadata that the folder does not replace stays, as does the licence unless `run_facts.json` names one.

    Args:
        folder: A saved model with the results files of its run.
        repo_id: Where it is or will be on the Hub; default: the usage shows a local folder.
        revision: The commit or tag that the usage pins; default: a word to replace.
        existing: Text of the existing card; default: `README.md` in the folder, if any. "" for a new one.

    Raises:
        ValueError: The existing card's metadata cannot be read, or a section has lost one of its markers.
    """
    if existing is None:
        existing = read_readme(folder)
    facts = RunFacts.load(folder)
    config = _read_json(config_file(folder))
    name = (repo_id or str(folder.resolve())).replace("\\", "/").rstrip("/").split("/")[-1]
    sections = dict(_sections(folder, facts, config, repo_id=repo_id, revision=revision))
    card = _parse(existing, folder) if existing else ModelCard(f"---\n{{}}\n---\n\n# {name}\n")
    card.text = _merge_sections(card.text, sections)
    _merge_metadata(card, _metadata(folder, facts, config, name))
    return card


def read_readme(folder: Path) -> str | None:
    """The text of the card in a folder, with its own line ends; None without a card."""
    file = folder / README
    return file.read_bytes().decode("utf-8-sig") if file.is_file() else None


def write_card(
    folder: Path, *, repo_id: str | None = None, revision: str | None = None, facts: RunFacts | None = None
) -> Path:
    """Writes or updates `README.md` in a saved folder, and saves the facts if there are new ones; returns its path.

    Raises:
        FileNotFoundError: The folder has no configuration.
        ValueError: As `model_card`.
    """
    if not config_file(folder).is_file():
        raise FileNotFoundError(f"{folder} has no {config_file(folder).name}; give the folder of a saved model")
    if facts is not None:
        facts.save(folder)
    model_card(folder, repo_id=repo_id, revision=revision).save(folder / README)
    return folder / README


def hand_written(card: str) -> str:
    """The text of a card without its marked sections and metadata."""
    text = ModelCard(card, ignore_metadata_errors=True).text if card.lstrip().startswith("---") else card
    return SECTION.sub("", text).strip()


def measured(folder: Path) -> dict[str, float]:
    """Metrics of the saved weights by name: of `eval_results.json`, else of an evaluation at the saved step."""
    found = _read_json(folder / "eval_results.json") or _read_json(folder / "all_results.json")
    if not any(name.startswith("eval_") for name in found):
        state = _read_json(folder / "trainer_state.json")
        entries = [entry for entry in state.get("log_history", []) if entry.get("step") == state.get("global_step")]
        found = {name: value for entry in entries for name, value in entry.items()}
    metrics = {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if name not in TIMINGS and isinstance(value, int | float)}


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(folder: Path, facts: RunFacts, config: dict[str, Any], name: str) -> ModelCardData:
    task, _ = _task(config)
    task = facts.pipeline_tag or task
    metrics = measured(folder)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=facts.dataset_id or facts.evaluation_dataset or facts.dataset or "unknown",
            dataset_name=facts.evaluation_dataset or facts.dataset or facts.dataset_id or "unknown",
            dataset_split=facts.dataset_split,
            metric_type=metric,
            metric_name=full_name(metric),
            metric_value=value,
        )
        for metric, value in metrics.items()
        if metric != "loss"
    ]
    tags = ["dropkey", config.get("model_type"), task, *facts.tags]
    adapter = is_adapter(folder)
    source = facts.base_model or (base_of(folder) if adapter else "")
    base = source if source and is_hub_id(source) else None
    # the Hub runs no code of a checkpoint for its widget
    plain = not adapter and "auto_map" not in config
    return ModelCardData(
        base_model=base,
        # what the Hub shows in the tree of the base model
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        widget=[dict(one) for one in WIDGETS.get(task or "", ())] or None if plain else None,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        eval_results=results or None,
        model_name=name if results else None,
        language=facts.language,
        library_name="peft" if adapter else "transformers",
        license=facts.license,
        metrics=[metric for metric in metrics if metric == "accuracy"] or None,
        # the Hub knows tasks of its own only; others are tags
        pipeline_tag=None if task == HOI_TASK else task,
        tags=[tag for tag in tags if tag],
    )


def shown_command(words: Sequence[str]) -> str:
    """The command, with absolute paths cut to their last part so that no local path is published."""
    shown = []
    for word in words:
        option, equals, value = word.rpartition("=")
        path = PurePath(value)
        shown.append(shlex.quote(f"{option}{equals}{path.name if path.is_absolute() else value}"))
    return " ".join(shown)


def is_hub_id(name: str) -> bool:
    """Whether a name is a repository id on the Hub, "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _merge_metadata(card: ModelCard, made: ModelCardData) -> None:
    """Puts new metadata into a card; lists that may have been extended by hand are joined, a widget of one's own stays."""
    data: Any = card.data
    for name, value in vars(made).items():
        if value is None or name in ("eval_results", "model_name"):
            continue
        there = data.get(name)
        if name == "widget" and there:
            # images of one's own fit the classes better
            continue
        if name in ("tags", "datasets", "metrics") and there:
            there = [there] if isinstance(there, str) else there
            value = [*there, *(one for one in value if one not in there)]
        data[name] = value
    if made.eval_results:
        fresh = {result.unique_identifier for result in made.eval_results}
        kept = [result for result in data.get("eval_results", []) if result.unique_identifier not in fresh]
        data.eval_results = kept + made.eval_results
        data.model_name = data.get("model_name", made.model_name)


# --- sections --------------------------------------------------------------------------------------------------------


def _sections(
    folder: Path, facts: RunFacts, config: dict[str, Any], *, repo_id: str | None, revision: str | None
) -> Iterator[tuple[str, str]]:
    yield "summary", _summary(folder, facts, config)
    yield "usage", _usage(folder, config, repo_id, revision)
    yield "dropkey", _settings(config)
    yield "training", _training(folder, facts)
    yield "results", _results(folder, facts)
    yield "limits", _limits(folder, facts, config)
    yield "citation", f"## Citation\n\n```bibtex\n{CITATION}\n```"


def _merge_sections(text: str, sections: dict[str, str]) -> str:
    """A card's text with each section in its place, or at the end.

    Raises:
        ValueError: A section has lost one of its two markers, so that hand-written text cannot be distinguished.
    """
    alone = MARKER.search(SECTION.sub("", text))
    if alone:
        raise ValueError(
            f"the card's section {alone[1]!r} has lost one of its two markers: '<!-- hf_dropkey:{alone[1]} begin -->' "
            f"and '<!-- hf_dropkey:{alone[1]} end -->'; restore the missing one, or delete both"
        )
    line_end = "\r\n" if "\r\n" in text else "\n"
    blocks = {
        name: f"<!-- hf_dropkey:{name} begin, made anew on every push -->\n{body}\n<!-- hf_dropkey:{name} end -->"
        for name, body in sections.items()
    }
    blocks = {name: block.replace("\n", line_end) for name, block in blocks.items()}
    placed = {found[1] for found in SECTION.finditer(text)}
    text = SECTION.sub(lambda found: blocks.get(found[1], found[0]), text)
    for name, block in blocks.items():
        if name not in placed:
            text = text.rstrip() + 2 * line_end + block + line_end
    return text


def _image_size(folder: Path, config: dict[str, Any]) -> str:
    """A sentence on the size of the images: as the processor makes them, else as in the configuration."""
    processor = _read_json(folder / "preprocessor_config.json")
    processor = processor or _read_json(folder / "processor_config.json").get("image_processor") or {}
    size = processor_size(processor) or config.get("image_size")
    if isinstance(size, dict) and "shortest_edge" in size:
        longest = f", the longer at most {size['longest_edge']}" if size.get("longest_edge") else ""
        return f" Images whose shorter side has {size['shortest_edge']} pixels{longest}."
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    return f" Images of {height} x {width} pixels." if height and width else ""


def _summary(folder: Path, facts: RunFacts, config: dict[str, Any]) -> str:
    kind = (config.get("architectures") or [config.get("model_type", "a model")])[0]
    source = ", trained from scratch" if facts.from_scratch else ", trained" if facts.dataset else ""
    source = f", a fine-tuned version of {_link(facts.base_model)}" if facts.base_model else source
    data = f" on the {facts.dataset} dataset" if facts.dataset else ""
    images = _image_size(folder, config)
    if is_adapter(folder):
        settings = _read_json(folder / ADAPTER_CONFIG)
        kind = f"A {settings.get('peft_type') or 'PEFT'} adapter of rank {settings.get('r')} for `{kind}`"
    else:
        kind = f"`{kind}`"
    labels = list(config.get("id2label", {}).values())
    classes = (
        f" {len(labels)} classes: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}." if labels else ""
    )
    ratio = config.get("dropkey_ratio")
    method = {None: "", 0: ", without DropKey (ratio 0)"}.get(
        ratio,
        ", with DropKey: in training, random keys are taken out of attention before the softmax. Inference is plain "
        "attention",
    )
    return f"{kind}{source}{data}{method}.{images}{classes}"


def _usage(folder: Path, config: dict[str, Any], repo_id: str | None, revision: str | None) -> str:
    task, auto = _task(config)
    source = json.dumps(repo_id or folder.name)
    pin = f", revision={json.dumps(revision or 'COMMIT')}" if repo_id else ""
    carries_code = "auto_map" in config
    trust = ", trust_remote_code=True" if carries_code else ""
    lines = ["## Usage", ""]
    if repo_id and revision is None:
        lines += [
            f"Replace `COMMIT` by a commit that you have checked; `hf-dropkey check {repo_id}` compares the code and "
            "the files of the newest one with a released package and prints its hash.",
            "",
        ]
    if is_adapter(folder):
        base = _link(base_of(folder))
        lines += [f"It is an adapter for {base}, which is loaded with it (`pip install 'hf_dropkey[train,peft]'`):"]
        lines += ["```python", "from hf_dropkey import apply_dropkey, load_classifier", ""]
        lines += [f"model = load_classifier({source}{pin})"]
        lines += ["apply_dropkey(model)  # for more training; the adapter remembers the settings", "```"]
        return "\n".join(lines)
    lines.append("Without any package but Transformers:" if carries_code else "It is a plain Transformers checkpoint:")
    lines += ["```python", f"from transformers import {auto}", ""]
    lines += [f"model = {auto}.from_pretrained({source}{pin}{trust})", "```"]
    if task == "image-classification" and (folder / "preprocessor_config.json").is_file():
        call = f'pipeline("image-classification", model={source}{pin}{trust})'
        lines += ["```python", "from transformers import pipeline", "", f"classify = {call}"]
        lines += ['print(classify("image.jpg"))', "```"]
    if "custom_pipelines" in config and (folder / "preprocessor_config.json").is_file():
        # the pipelines of a family travel with its checkpoints
        (name,) = config["custom_pipelines"]
        call = f'pipeline("{name}", model={source}{pin}{trust})'
        lines += ["```python", "from transformers import pipeline", "", f"find = {call}"]
        lines += ['print(find("image.jpg"))', "```"]
    lines += ["With the package, which runs no code of this repository:", "```python"]
    if carries_code:
        lines += ["import hf_dropkey", f"from transformers import {auto}", ""]
        lines += [f"model = {auto}.from_pretrained({source}{pin})", "```"]
    else:
        lines += [f"from hf_dropkey import apply_dropkey\nfrom transformers import {auto}", ""]
        lines += [f"model = {auto}.from_pretrained({source}{pin})"]
        lines += ["apply_dropkey(model)  # for more training; the settings are in its configuration", "```"]
    return "\n".join(lines)


def _settings(config: dict[str, Any]) -> str:
    rows = [(text, config[name]) for name, text in SETTINGS.items() if name in config]
    if not rows:
        return "## DropKey\n\nThe configuration holds no DropKey settings."
    windowed = config.get("dropkey_pattern") in ("block", "cross")
    rows = [(text, value) for text, value in rows if windowed or text != SETTINGS["dropkey_window"]]
    return "## DropKey\n\n" + _table(("setting", "value"), rows)


def _training(folder: Path, facts: RunFacts) -> str:
    state, results = _read_json(folder / "trainer_state.json"), _read_json(folder / "all_results.json")
    rows: list[tuple[str, Any]] = list(facts.hyperparameters.items())
    rows += [("steps", state[name]) for name in ("global_step",) if name in state]
    rows += [("epochs done", state["epoch"])] if state.get("epoch") else []
    rows += [(name, results[name]) for name in ("parameters", "train_loss") if name in results]
    rows += [("training time (s)", results["train_runtime"])] if "train_runtime" in results else []
    rows += [("detections counted by", results[f"eval_{COUNTED_BY}"])] if f"eval_{COUNTED_BY}" in results else []
    rows += list(facts.versions.items())
    text = "## Training\n\n"
    if facts.command:
        text += f"```\n{facts.command}\n```\n\n"
    return text + (_table(("setting", "value"), rows) if rows else "No file of the run records how it was trained.")


def _results(folder: Path, facts: RunFacts) -> str:
    if facts.results:
        return f"## Results\n\n{facts.results}"
    metrics = measured(folder)
    if not metrics:
        return "## Results\n\nNothing was measured on these weights."
    where = f" on {facts.evaluation_dataset or facts.dataset or 'the evaluation data'}"
    where += f", split `{facts.dataset_split}`" if facts.dataset_split else ""
    rows = [(full_name(name), f"{value:.4g}") for name, value in metrics.items()]
    return f"## Results\n\nOne run, measured{where}:\n\n" + _table(("metric", "value"), rows)


def _limits(folder: Path, facts: RunFacts, config: dict[str, Any]) -> str:
    lines = ["DropKey changes training only; compare the results with those of a run without it to see its effect."]
    if measured(folder) and not facts.results:
        lines.append("The results are of a single run; another seed gives other numbers.")
    if config.get("id2label"):
        lines.append("It chooses among the classes above whatever the image shows.")
    if facts.dataset:
        lines.append(f"It was evaluated on {facts.dataset} only, and inherits the faults of that data.")
    lines += facts.limits
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _task(config: dict[str, Any]) -> tuple[str | None, str]:
    """The Hub's name of the task and the Auto class, by the name of the saved class."""
    name = (config.get("architectures") or [""])[0]
    return next((found for end, found in TASKS.items() if name.endswith(end)), (None, "AutoModel"))


def _link(name: str) -> str:
    # only the last part of a local path is published
    shown = PurePath(name).name if PurePath(name).is_absolute() else name
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{shown}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, Any]]) -> str:
    def shown(cell: Any) -> str:
        return f"{cell:.6g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")

    cells = [" | ".join(map(shown, row)) for row in (head, *rows)]
    return "\n".join([f"| {cells[0]} |", "|---|---|", *(f"| {line} |" for line in cells[1:])])


def _parse(text: str, folder: Path) -> ModelCard:
    try:
        return ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"the metadata of the existing card of {folder} cannot be read ({error}); repair it between the two lines "
            "'---'. Nothing was changed"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); repair it, or delete it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object; repair it, or delete it")
    return found
