"""Configuration of DropKeyMesh: METRO and MeshGraphormer for human bodies. This file travels with checkpoints."""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

import inspect
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_dropkey import DropKeyConfigMixin


TOKEN_SOURCES = ("positions", "pooled")


@strict
class DropKeyMeshConfig(DropKeyConfigMixin, PreTrainedConfig):
    """Configuration of METRO (Lin et al., CVPR 2021) or MeshGraphormer (Lin et al., ICCV 2021) with DropKey.

    The defaults are METRO on a ResNet-50 and a body of 6,890 vertices; `DropKeyMeshConfig.graphormer()` is
    MeshGraphormer. With the same weights, a model in eval mode, or with `dropkey_ratio=0`, computes exactly what the
    plain system computes. The schedule runs over all attentions in order of execution.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Any configuration that `AutoBackbone` knows. Its last feature map gives the tokens, the one before it the
            grid tokens. A ResNet-50 by default.
        image_size (`int`, defaults to 224):
            Side of the square crops.
        num_channels (`int`, defaults to 3):
            Image channels, those of the backbone.
        feature_grid (`list[int]`, defaults to `[7, 7]`):
            Rows and columns of the backbone's last feature map at `image_size`.
        token_source (`str`, defaults to `"positions"`):
            `"positions"` (METRO): each token mixes the positions of the feature map by learned weights. `"pooled"`
            (MeshGraphormer): every token has the mean of the feature map.
        use_grid_tokens (`bool`, defaults to `False`):
            Adds one token for each position of the backbone's last-but-one feature map (MeshGraphormer). A finer map is
            averaged to `feature_grid`.
        num_vertices (`list[int]`, defaults to `[431, 1723, 6890]`):
            Vertices of the mesh at three resolutions, coarse to full. The transformer has a token for each coarse one.
        num_faces (`int`, defaults to 13776):
            Triangles of the full mesh.
        num_regressor_rows (`int`, defaults to 17):
            Rows of the joint regressor.
        joint_rows (`list[int]`, defaults to the 14 of METRO):
            The rows of the regressor that are predicted and evaluated, in order.
        pelvis_row (`int`, defaults to 0):
            The row of the regressor at which meshes are centred.
        hip_joints (`list[int]`, defaults to `[2, 3]`):
            Positions in `joint_rows` whose middle centres joints.
        hidden_sizes (`list[int]`, defaults to `[1024, 256, 128]`):
            Width of the layers of each encoder stage.
        stage_output_sizes (`list[int]`, defaults to `[512, 128]`):
            Output width of every stage but the last, which gives three coordinates.
        intermediate_sizes (`list[int]`, defaults to `[3072, 3072, 3072]`):
            Width of the feed-forward parts of each stage.
        num_hidden_layers (`int`, defaults to 4):
            Layers of each stage.
        num_attention_heads (`int`, defaults to 4):
            Heads of each attention.
        max_position_embeddings (`int`, defaults to 512):
            Rows of each stage's position table, at least the number of tokens.
        graph_stages (`list[int]`, defaults to `[]`):
            Stages whose layers have a graph residual block on the vertex tokens; `[2]` in MeshGraphormer.
        camera_hidden_size (`int`, defaults to 250):
            Hidden width of the camera head.
        masked_ratio (`float`, defaults to 0.3):
            In training, up to this fraction of the joint tokens and of the vertex tokens is masked, [0, 1].
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward parts.
        hidden_dropout_prob (`float`, defaults to 0.1):
            Dropout on embeddings and layer outputs.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on attention weights, which DropKey replaces; 0.1 in the official systems.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial linear weights.
        layer_norm_eps (`float`, defaults to 1e-12):
            Epsilon of all layer norms.
        joint_loss_coefficient (`float`, defaults to 1000.0):
            Weight of the 3-D joint losses.
        vertex_loss_coefficient (`float`, defaults to 33.0):
            Weight of each of the three vertex losses.
        keypoint_loss_coefficient (`float`, defaults to 100.0):
            Weight of the 2-D joint losses.

    Example:

        config = DropKeyMeshConfig(dropkey_ratio=0.1)
        model = DropKeyMeshForBodyMesh(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_mesh"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["loss_dict", "mid_vertices", "coarse_vertices", "hidden_states", "attentions"]

    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int = 224
    num_channels: int = 3
    feature_grid: list[int] | tuple[int, ...] = (7, 7)
    token_source: str = "positions"
    use_grid_tokens: bool = False
    num_vertices: list[int] | tuple[int, ...] = (431, 1723, 6890)
    num_faces: int = 13776
    num_regressor_rows: int = 17
    joint_rows: list[int] | tuple[int, ...] = (3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10)
    pelvis_row: int = 0
    hip_joints: list[int] | tuple[int, ...] = (2, 3)
    hidden_sizes: list[int] | tuple[int, ...] = (1024, 256, 128)
    stage_output_sizes: list[int] | tuple[int, ...] = (512, 128)
    intermediate_sizes: list[int] | tuple[int, ...] = (3072, 3072, 3072)
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    graph_stages: list[int] | tuple[int, ...] = ()
    camera_hidden_size: int = 250
    masked_ratio: float | int = 0.3
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    joint_loss_coefficient: float | int = 1000.0
    vertex_loss_coefficient: float | int = 33.0
    keypoint_loss_coefficient: float | int = 100.0

    # one class for both: the mesh is what people load
    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_mesh.DropKeyMeshConfig",
        "AutoModel": "modeling_dropkey_mesh.DropKeyMeshForBodyMesh",
    }
    family_pipelines: ClassVar[dict[str, dict[str, Any]]] = {
        "body-mesh": {"impl": "pipeline_dropkey_mesh.BodyMeshPipeline", "pt": ["AutoModel"], "type": "image"}
    }

    def __post_init__(self, **kwargs: Any) -> None:
        # a configuration class of its own for every kind of backbone
        if self.backbone_config is None:
            stages = ["stage3", "stage4"] if self.use_grid_tokens else ["stage4"]
            self.backbone_config = AutoConfig.for_model("resnet", out_features=stages, num_channels=self.num_channels)
        elif isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        # JSON has no tuples, and a configuration equals the one that is read back
        for name in ("feature_grid", "num_vertices", "joint_rows", "hip_joints", "hidden_sizes", "stage_output_sizes",
                     "intermediate_sizes", "graph_stages"):  # fmt: skip
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @classmethod
    def graphormer(cls, **kwargs: Any) -> "DropKeyMeshConfig":
        """The configuration of MeshGraphormer; `kwargs` are further fields and win over its own."""
        own: dict[str, Any] = {
            "token_source": "pooled",
            "use_grid_tokens": True,
            "graph_stages": [2],
            "hidden_sizes": [1024, 256, 64],
            "intermediate_sizes": [2048, 512, 128],
            "stage_output_sizes": [512, 128],
        }
        return cls(**{**own, **kwargs})

    @property
    def num_joints(self) -> int:
        """Number of predicted joints."""
        return len(self.joint_rows)

    @property
    def num_stage_layers(self) -> int:
        """Number of layers of all stages together."""
        return len(self.hidden_sizes) * self.num_hidden_layers

    @property
    def num_tokens(self) -> int:
        """Tokens of the transformer: joints, coarse vertices, then grid positions."""
        rows, columns = self.feature_grid
        return self.num_joints + self.num_vertices[0] + self.use_grid_tokens * rows * columns

    def validate_architecture(self) -> None:
        """Raises ValueError where fields contradict each other."""
        stages = len(self.hidden_sizes)
        for name, wanted in (("intermediate_sizes", stages), ("stage_output_sizes", stages - 1), ("num_vertices", 3),
                             ("feature_grid", 2), ("hip_joints", 2)):  # fmt: skip
            if len(getattr(self, name)) != wanted:
                raise ValueError(
                    f"`{name}` must have {wanted} values (with {stages} `hidden_sizes`), got {getattr(self, name)}."
                )
        if not stages:
            raise ValueError("`hidden_sizes` must name the width of one stage at least.")
        for name in ("feature_grid", "num_vertices", "hidden_sizes", "intermediate_sizes", "stage_output_sizes"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if list(self.num_vertices) != sorted(self.num_vertices):
            raise ValueError(f"`num_vertices` runs from the coarse mesh to the full one, got {self.num_vertices}.")
        for size in self.hidden_sizes:
            if self.num_attention_heads < 1 or size % self.num_attention_heads:
                raise ValueError(
                    f"Each of `hidden_sizes` {self.hidden_sizes} must be a multiple of `num_attention_heads` "
                    f"({self.num_attention_heads})."
                )
        self._validate_indices(stages)
        if self.token_source not in TOKEN_SOURCES:
            raise ValueError(f"`token_source` must be one of {', '.join(TOKEN_SOURCES)}, got {self.token_source!r}.")
        if not 0 <= self.masked_ratio <= 1:
            raise ValueError(f"`masked_ratio` must lie in [0, 1], got {self.masked_ratio}.")
        if self.num_hidden_layers < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1, got {self.num_hidden_layers}.")
        if self.max_position_embeddings < self.num_tokens:
            raise ValueError(
                f"`max_position_embeddings` ({self.max_position_embeddings}) must be at least the {self.num_tokens} "
                "tokens: joints, coarse vertices and grid tokens."
            )

    def _validate_indices(self, stages: int) -> None:
        """Raises ValueError where an index points past what it selects from."""
        for name, end in (("joint_rows", self.num_regressor_rows), ("hip_joints", self.num_joints),
                          ("graph_stages", stages)):  # fmt: skip
            if not all(0 <= index < end for index in getattr(self, name)):
                raise ValueError(f"Every value of `{name}` must lie in [0, {end}), got {getattr(self, name)}.")
        if not 0 <= self.pelvis_row < self.num_regressor_rows:
            raise ValueError(
                f"`pelvis_row` must lie in [0, {self.num_regressor_rows}), the rows of the joint regressor, got "
                f"{self.pelvis_row}."
            )

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; joints and vertices lie on no grid."""
        super().validate_dropkey()
        if self.dropkey_pattern in ("block", "cross") and self.dropkey_ratio > 0:
            raise ValueError(
                f"The tokens of a body mesh lie on no patch grid, so the pattern {self.dropkey_pattern!r} cannot drop "
                "them. Choose 'score', 'key' or 'token'."
            )

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_mesh import DropKeyMeshModel

        return Path(inspect.getfile(DropKeyMeshModel))

    def pipeline_class(self) -> type:
        """The pipeline of the family."""
        # as above: Transformers looks for pipelines by task, no model imports them
        from .pipeline_dropkey_mesh import BodyMeshPipeline

        return BodyMeshPipeline


__all__ = ["DropKeyMeshConfig"]
