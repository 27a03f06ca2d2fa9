"""Models and runs that are small enough for any test: their shapes, and what the recipes of several tests share."""

from typing import Any


# of a model that is saved, pushed or looked at
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
# of a model that is trained
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
# a run of it on a few of the digits
RECIPE: dict[str, Any] = {
    **TINY,
    "image_size": 8,
    "patch_size": 2,
    "dropkey_ratio": 0.4,
    "hidden_dropout_prob": 0.1,
    "do_train": True,
    "do_eval": True,
    "max_train_samples": 96,
    "learning_rate": 0.005,
    "save_strategy": "steps",
    "use_cpu": True,
    "report_to": "none",
}
# the environment in which accelerate shards a DropKeyViT; on a CPU together with `forked.shard_on_cpu`
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DropKeyViTLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "ACCELERATE_USE_CPU": "true",
}
