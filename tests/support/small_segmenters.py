"""Tiny segmentation models of stock Transformers with random weights, saved as pretrained ones are, with three classes."""

from pathlib import Path
from typing import Any

from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SwinConfig,
)


KINDS = ("segformer", "beit", "mask2former")
CLASSES = ("a", "b", "c")


def small_pretrained(kind: str, folder: Path) -> Path:
    """Saves a model of a kind and its image processor, for images of 64 x 64 pixels."""
    labels: Any = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    model: Any
    config: Any
    processor: Any = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    if kind == "segformer":
        sizes: Any = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16, **labels))
    elif kind == "beit":
        heads: Any = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
        heads["out_indices"] = [1, 2, 3, 4]
        config = BeitConfig(**heads, image_size=64, patch_size=16, **labels)
        config.use_auxiliary_head = False
        model = BeitForSemanticSegmentation(config)
    else:
        stages: Any = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
        swin = SwinConfig(embed_dim=8, num_heads=[1, 1, 2, 2], window_size=4, image_size=64, **stages)
        sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
        layers: Any = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "train_num_points": 64}
        widths: Any = {"encoder_feedforward_dim": 32, "dim_feedforward": 32}
        config = Mask2FormerConfig(backbone_config=swin, **sizes, **layers, **widths, **labels)
        model = Mask2FormerForUniversalSegmentation(config)
        processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
