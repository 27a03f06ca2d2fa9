"""Monte-Carlo inference on an exported graph, in onnxruntime: `DropKeyONNX`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..extras import needed
from ..inference import MonteCarloMoments, MonteCarloPrediction
from ..models.sample_masks import seed_words
from .graphs import MONTE_CARLO_FILE, ONNX_FILE


class DropKeyONNX:
    """A classifier that `export_graph(..., monte_carlo=True)` wrote, or without that its plain graph alone.

    Args:
        folder: What `export_graph` wrote.
        providers: Of onnxruntime, such as "CUDAExecutionProvider".

    Example:

        model = DropKeyONNX("graph")
        logits = model(images)
        how_sure = model.monte_carlo_predict(images, samples=20, seed=1)

    Raises:
        FileNotFoundError: The folder has no graph.
        ImportError: The extra `onnx` is missing.
    """

    def __init__(self, folder: str | os.PathLike, providers: Sequence[str] = ("CPUExecutionProvider",)):
        with needed("onnx"):
            import onnxruntime
        self.folder = Path(folder)
        if not (self.folder / ONNX_FILE).is_file():
            raise FileNotFoundError(f"{self.folder} has no {ONNX_FILE}; write it with hf-dropkey export --format onnx")
        files = (ONNX_FILE, MONTE_CARLO_FILE)
        self._sessions: dict[str, Any] = {
            file: onnxruntime.InferenceSession(self.folder / file, providers=list(providers))
            for file in files
            if (self.folder / file).is_file()
        }

    def __call__(self, pixel_values: NDArray[np.float32], seed: int | None = None) -> NDArray[np.float32]:
        """Logits `[B, classes]` of images `[B, C, height, width]`; with a seed, with its keys dropped.

        Raises:
            ValueError: A seed for a folder without a graph that drops keys.
        """
        file, inputs = ONNX_FILE, {"pixel_values": pixel_values}
        if seed is not None:
            file, inputs["seed"] = MONTE_CARLO_FILE, seed_words(seed).numpy()
        if file not in self._sessions:
            raise ValueError(
                f"{self.folder} has no {file}, so nothing can be dropped; export again with --monte_carlo"
            )
        logits: NDArray[np.float32] = self._sessions[file].run(["logits"], inputs)[0]
        return logits

    def monte_carlo_predict(
        self, pixel_values: NDArray[np.float32], *, samples: int = 20, seed: int = 0
    ) -> MonteCarloPrediction:
        """The mean prediction over random masks and how much it varies, as `hf_dropkey.monte_carlo_predict` has it.

        Args:
            pixel_values: Images `[B, C, height, width]`.
            samples: Number of masks, at least 2.
            seed: The masks are those of `dropkey_seed(model, seed + (number << 32))`, numbers from 0, so that fewer
                samples are the first of more; in [0, 2**32).

        Raises:
            ValueError: Fewer than 2 samples, a seed outside its range, or a folder without a graph that drops keys.
        """
        if samples < 2:
            raise ValueError(f"`samples` must be at least 2, got {samples}.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2**32), got {seed}.")
        moments = MonteCarloMoments(-1)
        for number in range(samples):
            moments.add(torch.from_numpy(self(pixel_values, seed + (number << 32))))
        return moments.prediction()
