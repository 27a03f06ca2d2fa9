"""DropKeyMesh: METRO and MeshGraphormer with DropKey in all attentions. This file travels with checkpoints.

One family for both systems: tokens for joints and coarse vertices, three encoder stages of BERT layers, linear maps to
the finer meshes, a weak-perspective camera. Sources: Lin et al., "End-to-End Human Pose and Mesh Reconstruction with
Transformers", CVPR 2021; Lin et al., "Mesh Graphormer", ICCV 2021.

Coordinates are metres around the pelvis: x to the right of the image, y down, z away from the camera.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn
from transformers import AutoBackbone, BertConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.utils.generic import ModelOutput, TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import dropkey_attention_forward
from .configuration_dropkey_mesh import DropKeyMeshConfig
from .dropkey import DropKeyRatioMixin, dropkey_is_active, layer_ratios
from .loss_dropkey_mesh import MeshTargets, body_mesh_losses
from .modeling_dropkey import DropKeyModelMixin


# what replaces the whole input of a masked token, template included
MASKED_VALUE = 0.01
# standard deviation of the heads' first weights at coordinates: training starts near the template
SMALL_START = 1e-3
# a standing person fills the crop
START_SCALE = 0.9


@dataclass
class DropKeyMeshModelOutput(ModelOutput):
    """What the transformer returns.

    Attributes:
        last_hidden_state: Coordinates of all tokens `[B, N, 3]`: joints, coarse vertices, grid positions.
        hidden_states: Inputs and outputs of the layers, if requested.
        attentions: Weights `[B, H, N, N]` of every attention, if requested.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class BodyMeshOutput(ModelOutput):
    """A predicted body, in metres around the pelvis.

    Attributes:
        loss: The weighted sum of losses, if there are targets.
        vertices: The full mesh `[B, V, 3]`.
        mesh_joints: Joints regressed from the full mesh `[B, J, 3]`, which the metrics use.
        joints: The joint tokens `[B, J, 3]`.
        camera: (s, tx, ty) `[B, 3]`: a point is drawn at `s * (xy + t)`, -1 to 1 across the crop.
        mid_vertices: The mesh of middle resolution.
        coarse_vertices: The vertex tokens `[B, coarse, 3]`.
        loss_dict: The losses before they are weighted.
        hidden_states: See `DropKeyMeshModelOutput`.
        attentions: See `DropKeyMeshModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    vertices: torch.FloatTensor | None = None
    mesh_joints: torch.FloatTensor | None = None
    joints: torch.FloatTensor | None = None
    camera: torch.FloatTensor | None = None
    mid_vertices: torch.FloatTensor | None = None
    coarse_vertices: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def mixed(weights: torch.Tensor, vertices: torch.Tensor) -> torch.Tensor:
    """Weighted sums `[..., rows, 3]` of vertices `[..., V, 3]`, a row of `weights` `[rows, V]` for each."""
    # one matrix product: `weights @ vertices` copies the weights for every mesh, and took a quarter of a training step
    return nn.functional.linear(vertices.mT, weights).mT


# --- the body --------------------------------------------------------------------------------------------------------


class DropKeyMeshBody(nn.Module):
    """The body a checkpoint predicts, as buffers: template, triangles, joint regressor, down-sampling, neighbours.

    Attributes:
        template: Full mesh in rest pose `[V, 3]`, metres.
        faces: Triangles `[F, 3]`.
        joint_regressor: `[R, V]`, rows sum to 1.
        downsample_mid: `[mid, V]`, rows sum to 1.
        downsample_coarse: `[coarse, mid]`, rows sum to 1.
        adjacency: Neighbours of the coarse vertices with themselves, rows sum to 1; only with graph blocks.
    """

    def __init__(self, config: DropKeyMeshConfig):
        super().__init__()
        coarse, middle, full = config.num_vertices
        self.pelvis_row = config.pelvis_row
        self.joint_rows = list(config.joint_rows)
        self.template: torch.Tensor
        self.faces: torch.Tensor
        self.joint_regressor: torch.Tensor
        self.downsample_mid: torch.Tensor
        self.downsample_coarse: torch.Tensor
        self.register_buffer("template", torch.zeros(full, 3))
        self.register_buffer("faces", torch.zeros(config.num_faces, 3, dtype=torch.long))
        self.register_buffer("joint_regressor", torch.zeros(config.num_regressor_rows, full))
        self.register_buffer("downsample_mid", torch.zeros(middle, full))
        self.register_buffer("downsample_coarse", torch.zeros(coarse, middle))
        if config.graph_stages:
            self.adjacency: torch.Tensor
            self.register_buffer("adjacency", torch.zeros(coarse, coarse))

    def levels(self, vertices: torch.Tensor) -> list[torch.Tensor]:
        """A full mesh `[..., V, 3]` at three resolutions, coarse first, each relative to the full mesh's pelvis."""
        pelvis = mixed(self.joint_regressor[self.pelvis_row][None], vertices)
        middle = mixed(self.downsample_mid, vertices)
        # centred last, as in the official systems: rows that sum to 1 do so up to rounding only
        return [level - pelvis for level in (mixed(self.downsample_coarse, middle), middle, vertices)]

    def joints(self, vertices: torch.Tensor) -> torch.Tensor:
        """The predicted joints `[..., J, 3]` of full meshes `[..., V, 3]`."""
        return mixed(self.joint_regressor[self.joint_rows], vertices)

    def reference_tokens(self) -> torch.Tensor:
        """Joints and coarse vertices of the template relative to its pelvis, `[J + coarse, 3]`."""
        pelvis = (self.joint_regressor @ self.template)[self.pelvis_row]
        return torch.cat((self.joints(self.template) - pelvis, self.levels(self.template)[0]))


# --- layers ----------------------------------------------------------------------------------------------------------


class DropKeyMeshSelfAttention(DropKeyRatioMixin, BertSelfAttention):
    """BERT's self-attention, with DropKey in training.

    Attributes:
        dropkey_ratio: Drop ratio of this attention, a plain float that may be changed at any time.
        dropkey_pattern: What is dropped together.
        dropkey_window: Size of a block or cross, in patches.
    """

    def __init__(self, config: DropKeyMeshConfig, stage: BertConfig, dropkey_ratio: float):
        super().__init__(stage)
        # the public one, which `set_attn_implementation` changes
        self.config = config
        self.dropkey_ratio = dropkey_ratio
        self.dropkey_pattern = config.dropkey_pattern
        self.dropkey_window = config.dropkey_window
        self.dropkey_configured = config.dropkey_ratio

    def forward(  # type: ignore[override]  # without BERT's cache of keys
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `[B, N, C]` tokens to each other; returns the output, and the weights on `eager`."""
        if not dropkey_is_active(self):
            plain: Any = super().forward(hidden_states, attention_mask, **kwargs)
            return plain
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        output, weights = dropkey_attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            implementation=self.config._attn_implementation,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return output.flatten(-2), weights


class GraphLinear(nn.Module):
    """A linear map whose parameters have the names of MeshGraphormer's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(outputs, inputs))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return nn.functional.linear(hidden_states, self.W, self.b)


class GraphConvolution(nn.Module):
    """The mean over a vertex and its neighbours of a linear map, plus a bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """`[B, V, C]` to the same shape; `adjacency` `[V, V]`, rows sum to 1."""
        return adjacency @ (hidden_states @ self.weight) + self.bias


class DropKeyMeshGraphBlock(nn.Module):
    """MeshGraphormer's graph residual block on the vertex tokens."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        half = size // 2
        self.pre_norm = nn.LayerNorm(size, eps=eps)
        self.lin1 = GraphLinear(size, half)
        self.norm1 = nn.LayerNorm(half, eps=eps)
        self.conv = GraphConvolution(half)
        self.norm2 = nn.LayerNorm(half, eps=eps)
        self.lin2 = GraphLinear(half, size)

    def forward(self, vertices: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Vertex tokens `[B, V, C]` to tokens of the same shape."""
        hidden = self.lin1(self.pre_norm(vertices).relu())
        hidden = self.conv(self.norm1(hidden).relu(), adjacency)
        return vertices + self.lin2(self.norm2(hidden).relu())


class DropKeyMeshLayer(BertLayer):
    """BERT's layer with DropKey in its attention and, in graph stages, a graph block behind it."""

    def __init__(self, config: DropKeyMeshConfig, stage: BertConfig, dropkey_ratio: float, graph: bool):
        super().__init__(stage)
        self.attention.self = DropKeyMeshSelfAttention(config, stage, dropkey_ratio)
        self.graph_conv = DropKeyMeshGraphBlock(stage.hidden_size, stage.layer_norm_eps) if graph else None
        self.num_joints = config.num_joints
        self.num_coarse = config.num_vertices[0]

    def forward(  # type: ignore[override]  # without BERT's cross-attention and cache
        self, hidden_states: torch.Tensor, adjacency: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Tokens `[B, N, C]` to tokens of the same shape."""
        attended, _ = self.attention(hidden_states, **kwargs)
        if self.graph_conv is not None:
            end = self.num_joints + self.num_coarse
            vertices = self.graph_conv(attended[:, self.num_joints : end], adjacency)
            attended = torch.cat((attended[:, : self.num_joints], vertices, attended[:, end:]), dim=1)
        return self.feed_forward_chunk(attended)


class DropKeyMeshHead(nn.Linear):
    """The linear head of a stage, which starts small at the coordinates."""


class DropKeyMeshResidual(nn.Linear):
    """The residual map of a stage's input, which starts by passing the first three features, the template's."""


class DropKeyMeshCameraOutput(nn.Linear):
    """The last map of the camera head, which starts at a person that fills the crop."""


class DropKeyMeshStage(nn.Module):
    """One encoder: embedding, BERT layers, and a linear head with a residual map of the stage's input.

    Args:
        config: The model's configuration.
        index: Which stage.
        ratios: Drop ratio of each layer.
    """

    def __init__(self, config: DropKeyMeshConfig, index: int, input_size: int, ratios: Sequence[float]):
        super().__init__()
        size = config.hidden_sizes[index]
        output_size = [*config.stage_output_sizes, 3][index]
        stage = BertConfig(
            hidden_size=size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_sizes[index],
            hidden_act=config.hidden_act,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
            layer_norm_eps=config.layer_norm_eps,
        )
        self.embedding = nn.Linear(input_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        graph = index in config.graph_stages
        self.layers = nn.ModuleList(DropKeyMeshLayer(config, stage, ratio, graph) for ratio in ratios)
        self.head = DropKeyMeshHead(size, output_size)
        self.residual = DropKeyMeshResidual(input_size, output_size)

    def forward(self, tokens: torch.Tensor, adjacency: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Tokens `[B, N, input]` to `[B, N, output]`."""
        hidden_states = self.embedding(tokens) + self.position_embeddings.weight[: tokens.shape[1]]
        hidden_states = self.dropout(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, adjacency, **kwargs)
        return self.head(hidden_states) + self.residual(tokens)


class DropKeyMeshEmbeddings(nn.Module):
    """Feature maps and the template to tokens."""

    def __init__(self, config: DropKeyMeshConfig, channels: Sequence[int]):
        super().__init__()
        self.config = config
        self.feature_size = channels[-1]
        rows, columns = config.feature_grid
        reference = config.num_joints + config.num_vertices[0]
        if config.token_source == "positions":
            # the positions are the channels of this convolution over the feature axis
            self.token_projection = nn.Conv1d(rows * columns, reference, kernel_size=1)
        if config.use_grid_tokens:
            self.grid_projection = nn.Linear(channels[-2], 3 + self.feature_size)

    def forward(
        self, feature_maps: Sequence[torch.Tensor], reference: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens `[B, N, 3 + features]`.

        Args:
            feature_maps: Of the backbone, the last one `[B, C, rows, columns]`.
            reference: Template coordinates `[J + coarse, 3]`.
            keep: `[B, J + coarse, 1]`, 0 where a token is masked.
        """
        feature = feature_maps[-1]
        if self.config.token_source == "positions":
            features = self.token_projection(feature.flatten(2).transpose(1, 2))
        else:
            features = feature.flatten(2).mean(-1)[:, None].expand(-1, reference.shape[0], -1)
        template = reference.to(features.dtype)[None].expand(features.shape[0], -1, -1)
        tokens = torch.cat((template, features), dim=-1)
        if keep is not None:
            keep = keep.to(tokens.dtype)
            tokens = tokens * keep + MASKED_VALUE * (1 - keep)
        if self.config.use_grid_tokens:
            grid = feature_maps[-2]
            if list(grid.shape[-2:]) != list(self.config.feature_grid):
                rows, columns = self.config.feature_grid
                grid = nn.functional.adaptive_avg_pool2d(grid, (rows, columns))
            tokens = torch.cat((tokens, self.grid_projection(grid.flatten(2).transpose(1, 2))), dim=1)
        return tokens


def draw_kept_tokens(count: int, sizes: Sequence[int], ratio: float, device: torch.device) -> torch.Tensor:
    """Masked-vertex modelling: which tokens of each sample keep their input, `[count, sum(sizes), 1]`, 0 = masked.

    For each group of `sizes` (joints, vertices) and each sample, u is uniform in [0, 1] and int(u * ratio * size)
    tokens are masked.
    """
    kept = []
    for size in sizes:
        number = (torch.rand(count, 1, device=device) * ratio * size).long()
        # the places of random numbers in order are a random permutation
        places = torch.rand(count, size, device=device).argsort(dim=1).argsort(dim=1)
        kept.append(places >= number)
    return torch.cat(kept, dim=1)[..., None].float()


def layer_recorder() -> OutputRecorder:
    """What records the outputs of the layers of all stages, and finds them by numbers from either end."""
    recorder = OutputRecorder(DropKeyMeshLayer)
    # not an argument: older releases have no such field, and record all layers or none
    recorder.num_hidden_layers_key = "num_stage_layers"
    return recorder


# --- models ----------------------------------------------------------------------------------------------------------


class DropKeyMeshPreTrainedModel(DropKeyModelMixin, PreTrainedModel):
    """What the DropKeyMesh models share: configuration class, initial weights, flags."""

    config: DropKeyMeshConfig
    config_class = DropKeyMeshConfig
    base_model_prefix = "mesh"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    # the losses are means over what a batch holds, not sums that Trainer could divide
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DropKeyMeshLayer"]
    _can_record_outputs = {"hidden_states": layer_recorder(), "attentions": DropKeyMeshSelfAttention}

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in Transformers; a single name means the transformer, and leaves the backbone, which may not know it."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation}
        super().set_attn_implementation(attn_implementation, allow_all_kernels=allow_all_kernels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            # torch's own start, which the official model keeps for the mixture of positions
            bound = module.in_channels**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, DropKeyMeshBody):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, GraphLinear):
            init.trunc_normal_(module.W, std=self.config.initializer_range)
            init.zeros_(module.b)
        elif isinstance(module, GraphConvolution):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, (DropKeyMeshHead, DropKeyMeshResidual)):
            self._start_at_template(module)
        elif isinstance(module, DropKeyMeshCameraOutput):
            init.copy_(module.bias, torch.tensor([START_SCALE, 0.0, 0.0]))

    def _start_at_template(self, linear: nn.Linear) -> None:
        """Lets the first three features, the template's coordinates, pass a stage nearly unchanged before training."""
        # the whole tensor, because a slice would not tell that its weights were loaded
        weight = torch.randn_like(linear.weight) * self.config.initializer_range
        if isinstance(linear, DropKeyMeshResidual):
            weight[:3] = torch.eye(3, weight.shape[1], device=weight.device)
        else:
            weight[:3] *= SMALL_START / self.config.initializer_range
        init.copy_(linear.weight, weight)


class DropKeyMeshModel(DropKeyMeshPreTrainedModel):
    """Backbone, tokens and encoder stages: an image to coordinates of joints and coarse vertices.

    Attention i of all stages in order of execution drops keys at `layer_ratios(...)[i]`.
    """

    def __init__(self, config: DropKeyMeshConfig):
        config.validate_dropkey()
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = list(self.backbone.channels)
        if config.use_grid_tokens and len(channels) < 2:
            raise ValueError(
                "Grid tokens come from the backbone's last-but-one feature map, but the backbone returns one map. "
                "Name two in its `out_features`, for example ['stage3', 'stage4']."
            )
        self.body = DropKeyMeshBody(config)
        self.embeddings = DropKeyMeshEmbeddings(config, channels)
        stages, depth = len(config.hidden_sizes), config.num_hidden_layers
        ratios = layer_ratios(
            stages * depth, config.dropkey_ratio, config.dropkey_final_ratio, config.dropkey_schedule
        )
        sizes = [3 + channels[-1], *config.stage_output_sizes]
        self.stages = nn.ModuleList(
            DropKeyMeshStage(config, index, sizes[index], ratios[index * depth : (index + 1) * depth])
            for index in range(stages)
        )
        self.post_init()

    def feature_maps(self, pixel_values: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """The backbone's feature maps of `[B, C, height, width]`.

        Raises:
            ValueError: `pixel_values` is missing or not of the configured size.
        """
        side = self.config.image_size
        expected = (self.config.num_channels, side, side)
        if pixel_values is None or tuple(pixel_values.shape[1:]) != expected:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(
                f"`pixel_values` must have the shape [batch, {', '.join(map(str, expected))}], got {shape}. Cut each "
                "person out as a square and resize it with the checkpoint's image processor."
            )
        return self.backbone(pixel_values.to(self.dtype)).feature_maps

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        token_keep_mask: torch.Tensor | None = None,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DropKeyMeshModelOutput:
        """Encodes crops of persons.

        Args:
            pixel_values: `[B, C, height, width]`.
            token_keep_mask: `[B, J + coarse]` or `[B, J + coarse, 1]`, 0 where a token's input is masked. In training
                it is drawn (`masked_ratio`) where it is not given.
            feature_maps: Of the backbone, instead of images.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            The coordinates of all tokens.

        Raises:
            ValueError: Images or feature maps are of another shape than configured.
        """
        maps = self.feature_maps(pixel_values) if feature_maps is None else feature_maps
        self._check_map(maps[-1])
        sizes = (self.config.num_joints, self.config.num_vertices[0])
        if token_keep_mask is None and self.training and self.config.masked_ratio > 0:
            token_keep_mask = draw_kept_tokens(maps[-1].shape[0], sizes, self.config.masked_ratio, maps[-1].device)
        if token_keep_mask is not None:
            token_keep_mask = token_keep_mask.reshape(-1, sum(sizes), 1)
        tokens = self.embeddings(maps, self.body.reference_tokens(), token_keep_mask)
        adjacency = self.body.adjacency.to(tokens.dtype) if self.config.graph_stages else None
        for stage in self.stages:
            tokens = stage(tokens, adjacency, **kwargs)
        return DropKeyMeshModelOutput(last_hidden_state=tokens)

    def _check_map(self, feature: torch.Tensor) -> None:
        """Raises ValueError where the last feature map is not as configured."""
        expected = (self.embeddings.feature_size, *self.config.feature_grid)
        if tuple(feature.shape[1:]) != expected:
            raise ValueError(
                f"The backbone's last feature map has the shape {tuple(feature.shape[1:])}, but {expected} is "
                "configured (channels, rows, columns). Set `feature_grid` to what the backbone makes of `image_size`."
            )


class DropKeyMeshCamera(nn.Module):
    """Weak-perspective camera (s, tx, ty) from the coarse vertices."""

    def __init__(self, config: DropKeyMeshConfig):
        super().__init__()
        self.vertex = nn.Linear(3, 1)
        self.hidden = nn.Linear(config.num_vertices[0], config.camera_hidden_size)
        self.output = DropKeyMeshCameraOutput(config.camera_hidden_size, 3)

    def forward(self, coarse_vertices: torch.Tensor) -> torch.Tensor:
        """`[B, coarse, 3]` to `[B, 3]`."""
        return self.output(self.hidden(self.vertex(coarse_vertices).squeeze(-1)))


class DropKeyMeshForBodyMesh(DropKeyMeshPreTrainedModel):
    """An image of a person to a mesh: `DropKeyMeshModel`, maps to the finer meshes, a camera, and the losses.

    A new model has no body. Give it one with `set_body`; a checkpoint holds it.
    """

    def __init__(self, config: DropKeyMeshConfig):
        super().__init__(config)
        self.mesh = DropKeyMeshModel(config)
        coarse, middle, full = config.num_vertices
        self.upsampling = nn.ModuleList((nn.Linear(coarse, middle), nn.Linear(middle, full)))
        self.camera = DropKeyMeshCamera(config)
        self.post_init()

    @torch.no_grad()
    def set_body(
        self,
        *,
        template: torch.Tensor,
        faces: torch.Tensor,
        joint_regressor: torch.Tensor,
        downsampling: Sequence[torch.Tensor],
        upsampling: Sequence[torch.Tensor] | None = None,
        adjacency: torch.Tensor | None = None,
    ) -> None:
        """Fills the buffers with a body, and starts the maps to finer meshes from interpolation.

        Args:
            template: Full mesh in rest pose `[V, 3]`, metres, y down.
            faces: Triangles `[F, 3]`.
            joint_regressor: `[R, V]`.
            downsampling: Full to middle `[mid, V]`, middle to coarse `[coarse, mid]`.
            upsampling: First weights, coarse to middle `[mid, coarse]` and middle to full `[V, mid]`; None keeps them.
            adjacency: `[coarse, coarse]`, rows sum to 1; needed with `graph_stages` only.

        Raises:
            ValueError: A tensor has another shape than the configuration says.
        """
        body = self.mesh.body
        given: dict[str, torch.Tensor] = {
            "template": template,
            "faces": faces,
            "joint_regressor": joint_regressor,
            "downsample_mid": downsampling[0],
            "downsample_coarse": downsampling[1],
        }
        if self.config.graph_stages:
            if adjacency is None:
                raise ValueError(f"`graph_stages` {self.config.graph_stages} need the body's `adjacency`.")
            given["adjacency"] = adjacency
        for name, value in given.items():
            check_shape(name, value, getattr(body, name))
        for name, value in given.items():
            getattr(body, name).copy_(torch.as_tensor(value))
        linear: Any
        for linear, weight in zip(self.upsampling, upsampling or (), strict=bool(upsampling)):
            check_shape("upsampling", weight, linear.weight)
            linear.weight.copy_(torch.as_tensor(weight))
            linear.bias.zero_()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        joints_3d: torch.Tensor | None = None,
        joints_2d: torch.Tensor | None = None,
        vertices: torch.Tensor | None = None,
        has_joints_3d: torch.Tensor | None = None,
        has_vertices: torch.Tensor | None = None,
        token_keep_mask: torch.Tensor | None = None,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BodyMeshOutput:
        """Predicts bodies; with targets, all five of them, also the loss.

        Args:
            pixel_values: Square crops of persons `[B, C, height, width]`.
            joints_3d: `[B, J, 4]`: x, y, z in metres and confidence, relative to any point.
            joints_2d: `[B, J, 3]`: x, y from -1 to 1 across the crop and confidence.
            vertices: `[B, V, 3]` in metres, relative to any point.
            has_joints_3d: `[B]`, 1 where a sample has 3-D joints.
            has_vertices: `[B]`, 1 where a sample has a mesh.
            token_keep_mask: See `DropKeyMeshModel.forward`.
            feature_maps: See `DropKeyMeshModel.forward`.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Raises:
            ValueError: Some targets are missing or of another shape than the body's.
        """
        outputs = self.mesh(pixel_values, token_keep_mask=token_keep_mask, feature_maps=feature_maps, **kwargs)
        joints, coarse, _ = outputs.last_hidden_state.split(
            (
                self.config.num_joints,
                self.config.num_vertices[0],
                self.config.num_tokens - self.config.num_joints - self.config.num_vertices[0],
            ),
            dim=1,
        )
        middle = self.upsampling[0](coarse.transpose(1, 2)).transpose(1, 2)
        full = self.upsampling[1](middle.transpose(1, 2)).transpose(1, 2)
        found = {
            "vertices": full,
            "mesh_joints": self.mesh.body.joints(full),
            "joints": joints,
            "camera": self.camera(coarse),
            "mid_vertices": middle,
            "coarse_vertices": coarse,
        }
        given = (joints_3d, joints_2d, vertices, has_joints_3d, has_vertices)
        loss: Any = None
        losses = None
        if any(value is not None for value in given):
            loss, losses = self._losses(found, given)
        return BodyMeshOutput(
            loss=loss,
            loss_dict=losses,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **found,
        )

    def _losses(
        self, found: dict[str, torch.Tensor], given: tuple[torch.Tensor | None, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of losses, and each of them."""
        names = ("joints_3d", "joints_2d", "vertices", "has_joints_3d", "has_vertices")
        count, joints = found["vertices"].shape[0], self.config.num_joints
        shapes = ((count, joints, 4), (count, joints, 3), tuple(found["vertices"].shape), (count,), (count,))
        for name, value, shape in zip(names, given, shapes, strict=True):
            if value is None:
                raise ValueError(
                    f"A loss needs all of {', '.join(names)}, but {name} is missing. Where a sample lacks joints or a "
                    "mesh, pass zeros and has_joints_3d or has_vertices of 0."
                )
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must have the shape {list(shape)}, got {list(value.shape)}. The data must have this "
                    "model's joints and the topology of its body."
                )
        targets = MeshTargets(*given)  # type: ignore[arg-type]  # none of them is missing
        losses = body_mesh_losses(
            joints=found["joints"],
            mesh_joints=found["mesh_joints"],
            vertices=(found["coarse_vertices"], found["mid_vertices"], found["vertices"]),
            camera=found["camera"],
            targets=targets,
            target_vertices=self.mesh.body.levels(targets.vertices.to(self.mesh.body.template.dtype)),
            hips=self.config.hip_joints,
        )
        weights = {
            "joints_3d": self.config.joint_loss_coefficient,
            "mesh_joints_3d": self.config.joint_loss_coefficient,
            "vertices_coarse": self.config.vertex_loss_coefficient,
            "vertices_mid": self.config.vertex_loss_coefficient,
            "vertices_full": self.config.vertex_loss_coefficient,
            "joints_2d": self.config.keypoint_loss_coefficient,
            "mesh_joints_2d": self.config.keypoint_loss_coefficient,
        }
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return total, losses


def check_shape(name: str, value: torch.Tensor, buffer: torch.Tensor) -> None:
    """Raises ValueError where a part of a body does not fit the configuration."""
    if tuple(value.shape) != tuple(buffer.shape):
        raise ValueError(
            f"The body's {name} has the shape {list(value.shape)}, but the configuration says {list(buffer.shape)}. "
            "Set `num_vertices`, `num_faces` and `num_regressor_rows` to the body's, and train anew: a checkpoint "
            "predicts one topology."
        )


__all__ = ["BodyMeshOutput", "DropKeyMeshForBodyMesh", "DropKeyMeshModel", "DropKeyMeshPreTrainedModel"]
