"""From the arguments of a job for body meshes to its model, its `Trainer`, its metrics and a figure."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, TrainingArguments

from ..extras import needed
from ..hub.trainer import output_folder
from ..images.augmentation import AugmentationEpoch
from ..images.sources import EVALUATION_SPLITS, load_named
from ..training.arguments import DropKeyArguments, RampArguments, RunArguments
from ..training.job import EvaluationJob, TrainingJob, public_name
from ..training.record import Fingerprint
from ..training.trainer import GuardedTrainer
from .arguments import (
    FIGURE,
    MeshAugmentationArguments,
    MeshBodyArguments,
    MeshDataArguments,
    MeshModelArguments,
    MeshRunArguments,
)
from .bodies import Body, mirror_of
from .data import GeneratedPeople, MeshData, RowPeople, background_files, mean_vertices
from .figures import PREDICTION_TITLES, prediction_row, sheet
from .metrics import METRICS, body_mesh_errors
from .model import image_processor, make_body, make_config, make_model
from .renderer import crop_camera
from .transform import MeshAugmentation, MeshDataset, SquareView, View


with needed("train"):
    import datasets

logger = logging.getLogger(__name__)

GENERATED_TRAIN, GENERATED_EVALUATION = 3000, 300
# held-out people are of no seed that a training can have
HELD_OUT_SEED = 2**32
TARGETS = ("joints_3d", "joints_2d", "vertices", "has_joints_3d", "has_vertices")


@dataclass
class MeshJob(TrainingJob[MeshData]):
    """A training job for body meshes.

    Attributes:
        the_body: The body model.
        config: The configuration.
        mesh_augmentation: How training images vary.
        processor: The image processor.
    """

    # the Hub has no task of this name yet; it is the one that its readers would look for
    TASK = "image-to-3d"

    model: MeshModelArguments
    dropkey: DropKeyArguments
    ramp: RampArguments
    body: MeshBodyArguments
    data: MeshDataArguments
    augmentation: MeshAugmentationArguments
    mesh: MeshRunArguments
    run: RunArguments
    training: TrainingArguments

    def check(self) -> None:
        """Makes augmentation, body, configuration and image processor."""
        self.mesh_augmentation = MeshAugmentation(**asdict(self.augmentation))
        self.callbacks = self.ramp.callbacks()
        self.the_body = make_body(self.body.body)
        self.mirror = mirror_of(self.the_body.template) if self.mesh_augmentation.flip_probability else None
        self.config, self.topology = make_config(self.model, self.dropkey, self.the_body)
        self.processor: Any = image_processor(self.config)

    def load(self) -> MeshData:
        """The persons to train and to evaluate on."""
        evaluates = self.training.do_eval or self.training.eval_strategy != "no"
        return load_mesh_data(
            self.data, self.the_body, self.config.image_size, training=self.training.do_train, evaluation=evaluates
        )

    def make_model(self, data: MeshData) -> PreTrainedModel:
        """The model with its body."""
        return make_model(self.config, self.topology, self.model, self.the_body)

    def make_trainer(self, model: PreTrainedModel, data: MeshData) -> "MeshTrainer":
        """The `Trainer`, which measures the mean body too."""
        self.train_set, self.evaluation_set = (
            None
            if split is None
            else MeshDataset(
                split,
                self.processor,
                image_size=self.config.image_size,
                num_vertices=self.config.num_vertices[-1],
                mirror=self.mirror,
                augmentation=self.mesh_augmentation if split is data.train else None,
                seed=self.data_seed,
                num_channels=self.config.num_channels,
            )
            for split in (data.train, data.evaluation)
        )
        self.training.label_names = list(TARGETS)
        epochs: Any = self.train_set
        callbacks = [AugmentationEpoch(epochs)] if self.train_set is not None else []
        known = data.train if data.train is not None else data.evaluation
        return MeshTrainer(
            model=model,
            args=self.training,
            train_dataset=self.train_set,
            eval_dataset=self.evaluation_set,
            processing_class=self.processor,
            compute_metrics=mesh_metrics,
            callbacks=[*callbacks, *self.callbacks],
            on_nonfinite_loss=self.run.on_nonfinite_loss,
            mean_body=None if known is None else mean_vertices(known, self.the_body.joint_regressor),
        )

    def fingerprint(self, data: MeshData) -> Fingerprint:
        """Rows and hashes of names, persons and sizes of each split."""
        return data.fingerprint()

    def describe(self, data: MeshData) -> None:
        """Logs the meshes and the number of persons."""
        logger.info("meshes of %s vertices, %d tokens", self.config.num_vertices, self.config.num_tokens)
        for name, split in (("training", data.train), ("evaluation", data.evaluation)):
            if split is not None:
                logger.info("%s on %s: %d persons", name, split.name, len(split))

    def draw(self, trainer: GuardedTrainer, data: MeshData) -> None:
        """Draws evaluation images with the meshes that the model finds, if `--draw_images` is above 0."""
        if self.evaluation_set is not None and self.mesh.draw_images:
            draw_predictions(trainer, self.evaluation_set, range(min(self.mesh.draw_images, len(self.evaluation_set))))

    def card(self, data: MeshData) -> dict[str, Any]:
        """Data set and starting point."""
        return {
            "tags": ["vision", "human-mesh-recovery"],
            "dataset": self.data.name,
            "finetuned_from": public_name(self.model.model_name_or_path),
        }


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class MeshEvaluation(EvaluationJob[MeshData], MeshJob):
    """Measures a saved model beside the mean body; nothing is trained."""

    NAME = "mesh"


def load_mesh_data(
    arguments: MeshDataArguments, body: Body, image_size: int, *, training: bool, evaluation: bool
) -> MeshData:
    """The persons to train and to evaluate on, generated or read and checked.

    Raises:
        ValueError, FileNotFoundError: A split is missing, or rows cannot be used.
    """
    if arguments.dataset_name is not None:
        return MeshData(
            read_split(arguments, body, "train") if training else None,
            read_split(arguments, body, "evaluation") if evaluation else None,
        )
    backgrounds = background_files(arguments.backgrounds)
    people = [
        GeneratedPeople(body, count, seed, image_size, backgrounds) if wanted else None
        for wanted, count, seed in (
            (training, arguments.max_train_samples or GENERATED_TRAIN, arguments.generated_seed),
            (evaluation, arguments.max_eval_samples or GENERATED_EVALUATION, HELD_OUT_SEED),
        )
    ]
    return MeshData(*people)


def read_split(arguments: MeshDataArguments, body: Body, role: str) -> RowPeople:
    """One split of a data set of the hub or in a folder."""
    rows: Any = load_named(str(arguments.dataset_name), arguments.dataset_config_name)
    wanted = [arguments.train_split_name] if role == "train" else list(EVALUATION_SPLITS)
    if role != "train" and arguments.eval_split_name is not None:
        wanted = [arguments.eval_split_name]
    name = next((one for one in wanted if one in rows), None)
    if name is None:
        raise ValueError(
            f"{arguments.dataset_name} has the splits {', '.join(rows)}, none of {', '.join(wanted)}. Name one with "
            "--train_split_name and --eval_split_name"
        )
    split = rows[name]
    limit = arguments.max_train_samples if role == "train" else arguments.max_eval_samples
    if limit is not None:
        split = split.select(range(min(limit, len(split))))
    if "image" in split.column_names:
        split = split.cast_column("image", datasets.Image(decode=False))
    return RowPeople(split, f"{arguments.dataset_name} ({name})", body, skip=arguments.skip_bad_rows)


# --- training --------------------------------------------------------------------------------------------------------


class MeshTrainer(GuardedTrainer):
    """`GuardedTrainer` whose predictions are errors of each person in mm `[N, 4]` and whose labels are the mean body's.

    Meshes of all persons would not fit in memory. NaN where a person has no mesh or no joints.
    """

    def __init__(self, *args: Any, mean_body: np.ndarray | None = None, **kwargs: Any) -> None:
        """`mean_body` is a mesh `[V, 3]`: what a model must beat."""
        super().__init__(*args, **kwargs)
        self.mean_body = mean_body

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss and errors of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        whole: Any = self.accelerator.unwrap_model(model)
        found = outputs["vertices"].float().cpu().numpy()
        arrays = {name: inputs[name].float().cpu().numpy() for name in TARGETS}
        errors = person_errors(whole, found, arrays)
        mean = np.full_like(errors, np.nan)
        if self.mean_body is not None:
            mean = person_errors(whole, np.broadcast_to(self.mean_body, found.shape), arrays)
        return loss, torch.tensor(errors, device=loss.device), torch.tensor(mean, device=loss.device)


def person_errors(model: Any, vertices: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Errors of each person in mm, `[N, 4]` in the order of `METRICS`; NaN where there is nothing to compare with."""
    body, config = model.mesh.body, model.config
    found = body_mesh_errors(
        vertices=vertices,
        true_vertices=arrays["vertices"],
        true_joints=arrays["joints_3d"][..., :3],
        has_vertices=arrays["has_vertices"],
        has_joints_3d=arrays["has_joints_3d"],
        joint_regressor=body.joint_regressor.float().cpu().numpy(),
        joint_rows=config.joint_rows,
        hips=config.hip_joints,
        pelvis_row=config.pelvis_row,
    )
    table = np.full((len(vertices), len(METRICS)), np.nan)
    for column, name in enumerate(METRICS):
        flag = "has_vertices" if "pve" in name else "has_joints_3d"
        table[arrays[flag] != 0, column] = found[name]
    return table


def mesh_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The mean errors in mm, those of the mean body, and the ratio of both for vertices."""
    metrics = {}
    for prefix, table in (("", prediction.predictions), ("mean_body_", prediction.label_ids)):
        for column, name in enumerate(METRICS):
            values = np.asarray(table)[:, column]
            values = values[np.isfinite(values)]
            if len(values):
                metrics[f"{prefix}{name}"] = float(values.mean())
    if {"mpvpe", "mean_body_mpvpe"} <= set(metrics):
        metrics["mpvpe_to_mean_body"] = metrics["mpvpe"] / metrics["mean_body_mpvpe"]
    return metrics


@torch.no_grad()
def draw_predictions(trainer: GuardedTrainer, dataset: MeshDataset, rows: Sequence[int]) -> None:
    """Draws persons of a data set with the meshes that the model finds, into the folder of the run."""
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    pixels = torch.stack([dataset[row]["pixel_values"] for row in rows]).to(model.device)
    outputs = model.eval()(pixels)
    faces = model.mesh.body.faces.cpu().numpy()
    pictures = []
    for index, row in enumerate(rows):
        person = dataset.split.person(row)
        crop = SquareView(person.box, View()).crop(dataset.split.image(row), dataset.image_size)
        vertices, joints, camera = (
            outputs[name][index].float().cpu().numpy() for name in ("vertices", "mesh_joints", "camera")
        )
        pictures.append(
            prediction_row(crop, vertices, crop_camera(camera, crop.width), joints, faces, person.vertices)
        )
    file = output_folder(trainer.args) / FIGURE
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet(pictures, PREDICTION_TITLES).save(file)
    logger.info("%d persons with their meshes are in %s", len(rows), file)
