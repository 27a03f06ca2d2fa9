"""What a classifier says about one image: its predictions over masks, where it looks, which keys each layer loses.

A model is shared by all visitors. An answer holds the model's lock and sets ratio and pattern for its own length
(`dropkey`), so one answer is computed after the other, and the model is afterwards as it was. The masks depend on the
seed alone (`dropkey_seed`).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor

from ..classification.adapters import load_classifier
from ..classification.pictures import Pictures
from ..classification.uncertainty import SAMPLES, MeasuredUncertainty
from ..export.graphs import ExportedGraph, export_graph
from ..images.classes import class_names
from ..inference import MonteCarloMoments, dropkey_seed, eval_mode
from ..inspection.analysis import VISIBLE, rollout_map
from ..inspection.recording import AttentionRecord, LayerAttention, UnreadableAttentionError, record_attention
from ..models.attention import default_device
from ..models.dropkey import PATTERNS
from ..patching.apply import SETTING_NAMES, dropkey, dropkey_active, dropkey_modules
from ..patching.sites import transformers_model


# of a model that was trained without DropKey
USUAL_RATIO = 0.1
LARGEST_RATIO = 0.9
LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """What a visitor chooses: the largest drop ratio of a layer, what is dropped together, the seed of the masks."""

    ratio: float
    pattern: str
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value that the page does not offer; a client of the API may send any."""
        if not 0 <= self.ratio <= LARGEST_RATIO:
            raise ValueError(f"The ratio {self.ratio} is not in [0, {LARGEST_RATIO}]. Choose one that is.")
        if self.pattern not in PATTERNS:
            raise ValueError(f"The pattern {self.pattern!r} is unknown. Choose one of {', '.join(PATTERNS)}.")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"The seed {self.seed} is not in [0, {LARGEST_SEED}]. Choose one that is.")


@dataclass(frozen=True)
class LostKeys:
    """The keys that one query of one head loses in one layer.

    Attributes:
        ratio: The drop ratio of the layer.
        lost: bool `[rows, columns]`, of the patches.
        count: How many keys, those in front of the patches included.
        keys: Number of keys.
        query: "class token", or "middle patch" in a layer without one.
    """

    ratio: float
    lost: NDArray[np.bool_]
    count: int
    keys: int
    query: str


@dataclass(frozen=True)
class Answer:
    """What a classifier says about one image.

    Attributes:
        settings: The visitor's settings.
        names: C class names.
        by_mask: Class probabilities under each mask, `[S, C]`; S is 1 with the ratio 0, which has no masks.
        probabilities: Their mean, `[C]`.
        std: Their standard deviation, `[C]`; zeros with the ratio 0.
        mutual_information: Of prediction and mask in nats; 0 with the ratio 0.
        rollout: Attention rollout on the patches, `[rows, columns]`; None where attention cannot be read.
        lost: The keys lost under the first mask, by layer; empty where attention cannot be read.
        unreadable: Why attention cannot be read, else None.
        seen: The image as the model sees it.
    """

    settings: Settings
    names: tuple[str, ...]
    by_mask: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    std: NDArray[np.float64]
    mutual_information: float
    rollout: NDArray[np.float64] | None
    lost: tuple[LostKeys, ...]
    unreadable: str | None
    seen: Image.Image

    @property
    def best(self) -> int:
        """Number of the predicted class."""
        return int(self.probabilities.argmax())

    @property
    def label(self) -> str:
        """Name of the predicted class."""
        return self.names[self.best]


class Classifier:
    """An opened image classifier. Threads may ask it at once; they get their answers one after the other.

    Attributes:
        name: Name of the folder.
        settings: The model's own ratio and pattern, with seed 0.
        has_dropkey: Whether the model has DropKey settings; else `settings` has a usual ratio.
        processor: Its image processor.
        channels: Of its images.
        measured: Uncertainty on evaluation images, None if the folder does not have it.
    """

    def __init__(self, folder: Path, *, name: str | None = None):
        """Opens a folder.

        Raises:
            FileNotFoundError, ValueError, ImportError: As `load_classifier`; or there is no image processor.
        """
        self.name = name or folder.resolve().name
        self.model = load_classifier(folder).to(default_device())
        self._root: Any = transformers_model(self.model)
        processor = AutoImageProcessor.from_pretrained(folder)
        # configurations without this field are of models for colour images
        self.channels = int(getattr(self._root.config, "num_channels", 3))
        self.processor = processor
        self.names = tuple(class_names(self._root.config, str(folder)))
        self.measured = MeasuredUncertainty.load(folder)
        self._lock = threading.Lock()
        found = {name: getattr(self._root.config, f"dropkey_{name}", None) for name in SETTING_NAMES}
        self.has_dropkey = bool(found["ratio"])
        ratio = min(float(found["ratio"] or USUAL_RATIO), LARGEST_RATIO)
        self.settings = Settings(ratio, str(found["pattern"] or "score"))
        # a schedule whose other end is above a smaller ratio would be refused
        self._final_ratio = float(found["final_ratio"] or 0.0)

    def answer(self, image: Image.Image, settings: Settings) -> Answer:
        """Everything about one image.

        Raises:
            ValueError: The settings do not fit the model, such as a window larger than its patch grid.
        """
        inputs = self._inputs(image)
        with self._lock, self._set(settings):
            by_mask = self._probabilities(inputs, settings)
            rollout, lost, unreadable = self._attention(inputs, settings)
        return self._answer(by_mask, settings, rollout, lost, unreadable, self._pictures(image).seen(0))

    def prediction(self, image: Image.Image, settings: Settings) -> Answer:
        """As `answer`, without the attention."""
        inputs = self._inputs(image)
        with self._lock, self._set(settings):
            by_mask = self._probabilities(inputs, settings)
        return self._answer(by_mask, settings, None, (), None, self._pictures(image).seen(0))

    def rank(self, answer: Answer) -> float | None:
        """The fraction of evaluation images that the model is less uncertain about; None where that was not measured.

        Nor was it for settings other than the model's own.
        """
        own = answer.settings.ratio == self.settings.ratio and answer.settings.pattern == self.settings.pattern
        measured = self.measured_with_own_settings
        if measured is None or not own or answer.settings.ratio == 0:
            return None
        return measured.rank(answer.mutual_information)

    @property
    def measured_with_own_settings(self) -> MeasuredUncertainty | None:
        """Uncertainty on evaluation images over `SAMPLES` masks with `settings`, None if it was not measured."""
        found, own = self.measured, self.settings
        # fewer masks estimate a smaller mutual information
        wanted = (own.ratio, own.pattern, SAMPLES)
        return found if found and (found.ratio, found.pattern, found.samples) == wanted else None

    def export(self, out: Path, image_size: tuple[int, int]) -> ExportedGraph:
        """Writes the model's graphs, as `export_graph` does with `monte_carlo`, at the ratio and the pattern of `settings`."""
        device = self._root.device
        with self._lock, self._set(self.settings):
            # graphs are compared with the model in onnxruntime on the CPU
            self._root.to("cpu")
            try:
                return export_graph(self._root, out, image_size=image_size, monte_carlo=True)
            finally:
                self._root.to(device)

    def _inputs(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return next(self._pictures(image).batches([0], 1, self._root.device))

    def _pictures(self, image: Image.Image) -> Pictures:
        return Pictures([{"image": image}], ["image"], None, self.processor, self.channels)

    def _set(self, settings: Settings) -> Any:
        final = min(self._final_ratio, settings.ratio)
        return dropkey(
            self.model, settings.ratio, final_ratio=final, pattern=settings.pattern, with_attention_dropout=True
        )

    def _probabilities(self, inputs: dict[str, torch.Tensor], settings: Settings) -> NDArray[np.float64]:
        """Class probabilities under each mask, `[S, C]`: copies of the image in one batch, which have a mask each."""
        with torch.inference_mode(), eval_mode(self._root):
            if settings.ratio == 0:
                logits = self._root(**inputs).logits
            else:
                copies = inputs["pixel_values"].repeat(SAMPLES, 1, 1, 1)
                with dropkey_active(self._root), dropkey_seed(self._root, settings.seed):
                    logits = self._root(pixel_values=copies).logits
        found: NDArray[np.float64] = logits.double().softmax(-1).cpu().numpy()
        return found

    def _attention(
        self, inputs: dict[str, torch.Tensor], settings: Settings
    ) -> tuple[NDArray[np.float64] | None, tuple[LostKeys, ...], str | None]:
        try:
            plain = record_attention(self._root, inputs)
        except UnreadableAttentionError as error:
            return None, (), str(error)
        source = "class" if plain.layers[-1].layout.prefix else "mean"
        rollout: NDArray[np.float64] = rollout_map(plain.on_last_grid, source)[0].double().cpu().numpy()
        if settings.ratio == 0:
            dropped = plain
        else:
            # the first copy of `_probabilities` has these masks too
            with dropkey_seed(self._root, settings.seed):
                dropped = record_attention(self._root, inputs, dropkey=True)
        ratios = {name: float(module.dropkey_ratio) for name, module in dropkey_modules(self._root)}
        return rollout, lost_keys(plain, dropped, ratios), None

    def _answer(
        self,
        by_mask: NDArray[np.float64],
        settings: Settings,
        rollout: NDArray[np.float64] | None,
        lost: tuple[LostKeys, ...],
        unreadable: str | None,
        seen: Image.Image,
    ) -> Answer:
        mean, std, information = by_mask.mean(0), np.zeros(by_mask.shape[1]), 0.0
        if len(by_mask) > 1:
            moments = MonteCarloMoments(-1)
            for row in torch.from_numpy(by_mask).log():
                moments.add(row)
            predicted = moments.prediction()
            std, information = predicted.std.double().numpy(), float(predicted.mutual_information)
        return Answer(settings, self.names, by_mask, mean, std, information, rollout, lost, unreadable, seen)


def lost_keys(plain: AttentionRecord, dropped: AttentionRecord, ratios: dict[str, float]) -> tuple[LostKeys, ...]:
    """For each layer the keys whose weight DropKey made 0, of the class token (else of the middle patch), in its first head.

    Args:
        plain: Attention without DropKey, of one image.
        dropped: The same with DropKey.
        ratios: The drop ratio of each attention by name.
    """
    now = {layer.name: layer for layer in dropped.layers}
    return tuple(
        _lost(layer, now[layer.name], ratios.get(layer.name.partition(" (")[0], 0.0))
        for layer in plain.layers
        if layer.name in now
    )


def _lost(before: LayerAttention, after: LayerAttention, ratio: float) -> LostKeys:
    layout = before.layout
    rows, columns = layout.grid
    query = 0 if layout.prefix else rows // 2 * columns + columns // 2
    was, now = before.weights[0, 0, query], after.weights[0, 0, query]
    gone = ((was > VISIBLE) & (now == 0)).cpu().numpy()
    name = "class token" if layout.prefix else "middle patch"
    return LostKeys(ratio, gone[layout.prefix :].reshape(layout.grid), int(gone.sum()), len(gone), name)


def by_uncertainty(answers: Sequence[Answer]) -> list[int]:
    """The places of answers from the most to the least uncertain."""
    return sorted(range(len(answers)), key=lambda place: -answers[place].mutual_information)
