"""Training a detection model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..training.trainer import GuardedTrainer
from .metrics import post_process


class DetectionTrainer(GuardedTrainer):
    """`GuardedTrainer` whose predictions are detections `[N, K, 6]` (`post_process`) and whose labels are rows `[N]` of the split.

    Raw outputs would be larger, and of a different size in every batch. `processing_class` must be the image processor
    of the model's family.
    """

    def __init__(self, *args: Any, backbone_learning_rate: float | None = None, **kwargs: Any) -> None:
        """`backbone_learning_rate` is that of the convolutional backbone; None: as for the rest.

        Raises:
            ValueError: The rate is negative, or the model has no backbone that learns.
        """
        super().__init__(*args, **kwargs)
        self.backbone_learning_rate = backbone_learning_rate
        model: Any = self.model
        if backbone_learning_rate is None:
            return
        if backbone_learning_rate < 0:
            raise ValueError(f"backbone_learning_rate={backbone_learning_rate} is negative")
        if not list(backbone_parameters(model)):
            raise ValueError(
                f"backbone_learning_rate={backbone_learning_rate}, but {type(model).__name__} has no backbone that "
                "learns; leave it out"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's own, with the parameters of the backbone in groups of their own."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and self.backbone_learning_rate is not None:
            model: Any = self.model
            backbone = {id(parameter) for parameter in backbone_parameters(model)}
            for group in list(optimizer.param_groups):
                inside = [parameter for parameter in group["params"] if id(parameter) in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                optimizer.add_param_group({**group, "params": inside, "lr": self.backbone_learning_rate})
        return optimizer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss, detections and rows of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        labels = inputs["labels"]
        processor: Any = self.processing_class
        detections = post_process(processor, outputs, torch.stack([label["frame"] for label in labels]))
        return loss, detections, torch.stack([label["row"] for label in labels])


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model's convolutional backbone that learn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "backbone" in name.split("."):
            yield parameter
