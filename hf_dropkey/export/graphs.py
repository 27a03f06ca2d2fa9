"""A model in eval mode as one graph with a free batch size: `export_graph`, for onnxruntime, transformers.js and PyTorch.

A graph is compared with the model at batch sizes it was not traced with before anything is written: an exporter that
turns the batch size into a constant does so without a word.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..extras import needed
from ..inference import dropkey_seed, eval_mode
from ..models.sample_masks import seed_words
from ..patching.apply import BACKEND_FIELD, apply_dropkey, dropkey_active, forgotten_ratio
from ..saved import one_error, processor_size, read_json
from .plain import check_target, copy_processor, load_model, plain_class, plain_config, replaced


GRAPH_FORMATS = ("onnx", "pt2")
# where transformers.js looks for them
ONNX_FILE, INT8_FILE, MONTE_CARLO_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_monte_carlo.onnx"
PT2_FILE, MONTE_CARLO_PT2_FILE = "model.pt2", "model_monte_carlo.pt2"
OPSET = 20
# traced with the first, compared at the others
TRACED_BATCH, COMPARED_BATCHES = 2, (1, 3)
# of the largest value of an output in the model: rounding differs between kernels, a wrong graph does not stay below
TOLERANCE = 1e-3
# seeds at which a graph that drops keys is compared; one has a high word
COMPARED_SEEDS = (1, 7, 5 + (3 << 32))


@dataclass(frozen=True)
class ExportedGraph:
    """What `export_graph` wrote.

    Attributes:
        files: The graphs, relative to the folder.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        image_size: Height and width of the images.
        difference: The largest difference from the model's outputs.
        int8_difference: The same of the int8 graph, or None without one.
        monte_carlo_difference: The same of the graph that drops keys, over some seeds, or None without one.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    image_size: tuple[int, int]
    difference: float
    int8_difference: float | None = None
    monte_carlo_difference: float | None = None

    def __str__(self) -> str:
        """What was written, in one line."""
        height, width = self.image_size
        more = "" if self.int8_difference is None else f", in 8 bits {self.int8_difference:.1e}"
        if self.monte_carlo_difference is not None:
            more += f", with dropped keys {self.monte_carlo_difference:.1e}"
        return (
            f"{', '.join(self.files)} for any number of images of {height} x {width} pixels; outputs "
            f"{', '.join(self.outputs)}; at most {self.difference:.1e} from the model's{more}"
        )


class _Named(nn.Module):
    """A model of images with the tensors of its output as a plain tuple; with a seed, it drops that seed's keys."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixel_values: torch.Tensor, seed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        with contextlib.nullcontext() if seed is None else dropkey_seed(self.model, seed):
            outputs = self.model(pixel_values=pixel_values)
        return tuple(outputs[name] for name in self.names)


# inputs of a graph and what the model puts out for them, by their names
Case = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def export_graph(
    model_or_folder: nn.Module | str | os.PathLike,
    out: str | os.PathLike,
    *,
    file_format: str = "onnx",
    image_size: int | tuple[int, int] | None = None,
    int8: bool = False,
    monte_carlo: bool = False,
    overwrite: bool = False,
) -> ExportedGraph:
    """Writes the graph of a vision model in eval mode, for any batch size, and what runs it needs beside it.

    The folder is laid out as transformers.js finds it: `config.json`, the image processor's file, `onnx/model.onnx`;
    or `model.pt2` for `torch.export.load`.

    Args:
        model_or_folder: A vision model, of this package or of Transformers, patched or not; or a folder that holds one,
            from which the image processor is copied too.
        out: Folder to write, new or empty.
        file_format: "onnx" (needs the extra `onnx`) or "pt2".
        image_size: Height and width of the images in pixels; default the processor's, then the configuration's.
        int8: Write an ONNX graph with weights in 8 bits, too: `onnx/model_quantized.onnx`, whose outputs differ.
        monte_carlo: Write a second graph, in which DropKey is active and whose input `seed`, int32 `[2]`, says what is
            dropped: the same as within `dropkey_seed(model, seed)`. `DropKeyONNX` runs it.
        overwrite: Replace the saved model in `out`; all other files there are deleted too.

    Returns:
        What was written and how far its outputs are from the model's.

    Raises:
        ValueError: An unknown format, no known image size, a model that takes no images or cannot be traced, or outputs
            that differ from the model's. Nothing is written then.
        FileExistsError, NotADirectoryError: As `export_plain` has them.
        ImportError: The extra `onnx` is missing.
    """
    if file_format not in GRAPH_FORMATS:
        raise ValueError(f"the format {file_format!r} is unknown; choose one of {', '.join(GRAPH_FORMATS)}")
    if int8 and file_format != "onnx":
        raise ValueError(
            f"int8 graphs are written as onnx, not as {file_format}; leave --int8 out, or pass --format onnx"
        )
    if file_format == "onnx":
        with needed("onnx"):
            import onnxruntime  # noqa: F401  # now, not after minutes of work
            import onnxscript  # noqa: F401
    source = None if isinstance(model_or_folder, nn.Module) else Path(model_or_folder)
    check_target(source, Path(out), overwrite=overwrite)
    model: Any = model_or_folder if isinstance(model_or_folder, nn.Module) else load_model(Path(model_or_folder))
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{type(model).__name__} takes no images; graphs are made of vision models")
    if monte_carlo and source is not None and forgotten_ratio(model) is not None:
        # a stock model that was trained with DropKey remembers its settings, and is loaded without it
        apply_dropkey(model)
    size = _size_of(model, source, image_size)
    with eval_mode(model), torch.no_grad(), replaced(Path(out)) as stage:
        written = _write(model, stage, file_format, size, int8=int8)
        if monte_carlo:
            written = _write_monte_carlo(model, stage, file_format, written)
        _write_config(model, stage / "config.json")
        copy_processor(source, stage)
    return written


def _size_of(model: Any, source: Path | None, requested: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images that a model is exported for."""
    config, processor = model.config, {}
    if source is not None and (source / "preprocessor_config.json").is_file():
        processor = read_json(source / "preprocessor_config.json")
    candidates = (
        requested,
        processor_size(processor),
        getattr(config, "image_size", None),
        getattr(getattr(config, "vision_config", None), "image_size", None),
    )
    for found in candidates:
        size = _height_and_width(found)
        if size is not None:
            return size
    raise ValueError(
        f"neither the image processor nor the configuration of {type(model).__name__} says the size of the images; pass "
        "--image_size (image_size=...) in pixels"
    )


def _height_and_width(size: Any) -> tuple[int, int] | None:
    """From a number, a pair, or a processor's size; None where it does not fix both."""
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        return None
    return pair


def _write(model: Any, stage: Path, file_format: str, size: tuple[int, int], *, int8: bool) -> ExportedGraph:
    """Traces, writes and compares the graph of a model that drops nothing."""
    images = {batch: _noise(model, batch, size) for batch in (TRACED_BATCH, *COMPARED_BATCHES)}
    cases: list[Case] = [
        ({"pixel_values": images[batch]}, _outputs(model, images[batch])) for batch in COMPARED_BATCHES
    ]
    names = tuple(cases[0][1])
    file = ONNX_FILE if file_format == "onnx" else PT2_FILE
    difference = _write_graph(_Named(model, names), {"pixel_values": images[TRACED_BATCH]}, cases, stage / file)
    about: dict[str, Any] = dict(inputs=("pixel_values",), outputs=names, image_size=size, difference=difference)
    if not int8:
        return ExportedGraph(files=(file,), **about)
    from onnxruntime.quantization import quantize_dynamic

    with _quiet():
        quantize_dynamic(stage / ONNX_FILE, stage / INT8_FILE)
    # 8 bits differ by what they are; the caller sees by how much
    int8_difference = _difference(cases, _runner(stage / INT8_FILE), tolerance=float("inf"))
    return ExportedGraph(files=(file, INT8_FILE), int8_difference=int8_difference, **about)


def _write_monte_carlo(model: Any, stage: Path, file_format: str, plain: ExportedGraph) -> ExportedGraph:
    """Traces, writes and compares the graph of a model that drops keys, and says so beside what the plain one is."""
    with dropkey_active(model), _implementation(model, "eager"):
        cases: list[Case] = []
        for batch, seed in zip(itertools.cycle(COMPARED_BATCHES), COMPARED_SEEDS, strict=False):
            pixels = _noise(model, batch, plain.image_size)
            with dropkey_seed(model, seed):
                expected = _outputs(model, pixels)
            cases.append(({"pixel_values": pixels, "seed": seed_words(seed)}, expected))
        traced = {"pixel_values": _noise(model, TRACED_BATCH, plain.image_size), "seed": seed_words(0)}
        file = MONTE_CARLO_FILE if file_format == "onnx" else MONTE_CARLO_PT2_FILE
        difference = _write_graph(_Named(model, plain.outputs), traced, cases, stage / file)
    return replace(plain, files=(*plain.files, file), monte_carlo_difference=difference)


def _write_graph(graph: _Named, traced: dict[str, torch.Tensor], cases: Sequence[Case], file: Path) -> float:
    """Writes the graph that a model is for some inputs; returns the largest difference from what is expected."""
    program = _traced(graph, traced)
    if file.suffix == ".pt2":
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        return _difference(cases, lambda inputs: loaded(**inputs))
    file.parent.mkdir(exist_ok=True)
    with one_error("the graph cannot be written as ONNX"), _quiet():
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(traced),
            output_names=list(graph.names),
            # Transformers' checks of tensors, where code was read
            custom_translation_table={torch.ops.aten._is_all_true.default: _all_true},
            verbose=False,
        )
        made.save(file)
    return _difference(cases, _runner(file))


def _traced(graph: _Named, inputs: dict[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """The program of a model for any number of images.

    Raises:
        ValueError: It cannot be traced.
    """
    shapes = {name: {0: torch.export.Dim("batch")} if name == "pixel_values" else None for name in inputs}
    trace = partial(torch.export.export, graph, (), inputs, dynamic_shapes=shapes)
    name = type(graph.model).__name__
    with one_error(f"{name} cannot be exported"), _quiet():
        try:
            return trace(strict=False)
        except torch._dynamo.exc.UserError:
            if "seed" not in inputs:
                # slow, but it reads a number of images where code asks for the length of a tensor (RT-DETR, D-FINE)
                return trace(strict=True)
    raise ValueError(
        f"{name} fixes the number of images while it is traced, which a graph with a seed has no way around; export it "
        "without --monte_carlo (monte_carlo=True)"
    )


def _noise(model: Any, batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Images of standard normal values from a generator of their own."""
    config = getattr(model.config, "vision_config", model.config)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(batch))
    return pixels.to(next(model.parameters()))


def _outputs(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a model puts out, by name.

    Raises:
        ValueError: The model does not take images alone.
    """
    with one_error(f"{type(model).__name__} takes no images of {tuple(pixels.shape[-2:])} pixels alone"):
        outputs = model(pixel_values=pixels)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _write_config(model: PreTrainedModel, file: Path) -> None:
    """The configuration of the architecture that readers know, without references to code that is not beside it."""
    config: Any = model.config
    with contextlib.suppress(ValueError):
        cls: Any = plain_class(type(model))
        config = plain_config(config, cls.config_class)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "custom_pipelines")}
    file.write_text(json.dumps({**fields, "architectures": [type(model).__name__]}, indent=2) + "\n", encoding="utf-8")


def _runner(file: Path) -> Callable[[dict[str, torch.Tensor]], Sequence[torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with one_error(f"{file.name} does not run on {len(inputs['pixel_values'])} images"):
            found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(array) for array in found]

    return run


def _difference(
    cases: Sequence[Case],
    run: Callable[[dict[str, torch.Tensor]], Sequence[torch.Tensor]],
    tolerance: float = TOLERANCE,
) -> float:
    """The largest difference between a graph and the model.

    Raises:
        ValueError: It is above the tolerance, as a fraction of the largest value of that output.
    """
    largest = 0.0
    for inputs, expected in cases:
        count = len(inputs["pixel_values"])
        for (name, right), found in zip(expected.items(), run(inputs), strict=True):
            if found.shape != right.shape:
                raise ValueError(
                    f"the graph puts out {name} of shape {tuple(found.shape)} for {count} images, the model "
                    f"{tuple(right.shape)}; nothing was written"
                )
            difference = float((found - right).abs().max())
            if not difference <= tolerance * max(1.0, float(right.abs().max())):
                raise ValueError(
                    f"the graph's {name} differs from the model's by {difference:.2g} for {count} images; nothing was "
                    "written"
                )
            largest = max(largest, difference)
    return largest


@contextlib.contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    """A model on another attention backend, and at the end each part on its own again."""
    # set back by hand: Transformers would give all parts one backend, which a convolutional backbone refuses
    before = [(config, getattr(config, BACKEND_FIELD)) for config in _configurations(model.config)]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, backend in before:
            setattr(config, BACKEND_FIELD, backend)


def _configurations(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and those of the parts within it."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(one for part in parts if part is not None for one in _configurations(part))]


def _all_true(values: Any) -> Any:
    """`aten._is_all_true` in the operators of ONNX."""
    from onnxscript import opset20

    op: Any = opset20

    # of the numbers of onnx.TensorProto: 6 is int32, 9 bool
    return op.Cast(op.ReduceMin(op.Cast(values, to=6), keepdims=0), to=9)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters report about their own inside."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
