"""Exports: a plain Transformers checkpoint, and graphs that run without Python code of ours (ONNX, PyTorch's `pt2`)."""

from .graphs import GRAPH_FORMATS, ExportedGraph, export_graph
from .onnx_model import DropKeyONNX
from .plain import export_plain, plain_class, plain_config, plain_model


__all__ = [
    "GRAPH_FORMATS",
    "DropKeyONNX",
    "ExportedGraph",
    "export_graph",
    "export_plain",
    "plain_class",
    "plain_config",
    "plain_model",
]
