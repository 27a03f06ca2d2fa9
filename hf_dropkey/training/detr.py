"""What the training of every model with a DETR inside shares: a small backbone, its learning rate, predictions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import ConvNextConfig

from .trainer import GuardedTrainer


# the deepest stage's stride is 32, 16 without the last stage
BACKBONE_WIDTHS = {32: (32, 64, 128, 256), 16: (32, 64, 128)}


def small_backbone(stride: int) -> ConvNextConfig:
    """A small ConvNeXt for a model from scratch, whose layer norms learn.

    DETR freezes the batch norms of a ResNet, which without pretraining would stay as they were initialised.

    Args:
        stride: Pixels between two keys, 16 or 32.
    """
    widths = BACKBONE_WIDTHS[stride]
    output: dict[str, Any] = {"out_features": [f"stage{len(widths)}"]}
    return ConvNextConfig(
        hidden_sizes=list(widths),
        depths=[1] * len(widths),
        num_stages=len(widths),
        # at its usual 1e-6 every block starts as nothing, and needs long training to be more
        layer_scale_init_value=1.0,
        **output,
    )


class DetrTrainer(GuardedTrainer):
    """`GuardedTrainer` whose predictions are what `found` makes of a batch's outputs, and whose labels are rows `[N]`.

    Raw outputs would be larger, and of a different size in every batch. Labels of the batch have the row of the split
    under `row`.
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

    def found(self, outputs: Any, labels: list[dict[str, torch.Tensor]]) -> Any:
        """The predictions of a batch, a tensor or a tuple of tensors with a row for each image; a task's own."""
        raise NotImplementedError

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """Loss, predictions and rows of one batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        labels = inputs["labels"]
        return loss, self.found(outputs, labels), torch.stack([label["row"] for label in labels])


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model's convolutional backbone that learn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "backbone" in name.split("."):
            yield parameter
