"""Records what must stay as release 0.1.0 had it: checkpoint folders, their logits, and masks for fixed seeds.

Run once, by the code of that release (commit b60f8af): `python tests/recorded/record.py`. A later release is held to
what is recorded here, so running it again with other code would only move the mark.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import hf_dropkey
from hf_dropkey.models.dropkey import PATTERNS, dropped_scores


FOLDER = Path(__file__).parent
COMMON = {"initializer_range": 0.3, "num_labels": 5, "dropkey_ratio": 0.3, "dropkey_final_ratio": 0.1}
# two or three layers each; CeiT's class attention has no grid, so "block" and "cross" have no place there
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "vit": (
        "DropKeyViT",
        {
            "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32,
            "image_size": 48, "patch_size": 8,
        },
        PATTERNS,
    ),
    "t2t_vit": (
        "DropKeyT2TViT",
        {
            "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 1, "token_size": 4,
            "token_stage": "transformer", "dropkey_token_stage": True, "image_size": 48,
        },
        PATTERNS,
    ),
    "volo": (
        "DropKeyVolo",
        {
            "depths": [1, 1, 1], "hidden_size": 12, "num_attention_heads": 3, "outlook_hidden_size": 8,
            "num_outlook_heads": 2, "num_class_layers": 1, "stem_size": 4, "mlp_ratio": 1, "image_size": 48,
        },
        PATTERNS,
    ),
    "ceit": (
        "DropKeyCeit",
        {
            "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 1, "stem_size": 4,
            "image_size": 48,
        },
        ("score", "key", "token"),
    ),
}  # fmt: skip
SEEDS = ((0, 0), (1, 2), (-123456789, 987654321))
RATIOS = (0.05, 0.1, 0.3, 0.5, 0.9)
SHAPES = ((2, 3, 17, 17), (1, 2, 5, 197), (2, 1, 9, 65), (1, 1, 2, 577))
# window, grid, shape
GRIDS = (
    (1, None, (2, 2, 10, 10)),
    (2, (3, 5), (1, 2, 7, 16)),
    (3, (14, 14), (1, 1, 4, 197)),
    (5, (6, 7), (2, 1, 3, 44)),
)


def pixels() -> torch.Tensor:
    """The images that every recorded number belongs to, `[2, 3, 48, 48]`."""
    return torch.linspace(-1, 1, 2 * 3 * 48 * 48, dtype=torch.float64).view(2, 3, 48, 48)


def record_checkpoint(name: str) -> None:
    """One archive: the folder that `save_pretrained` wrote, and `expected.safetensors` with logits in float64.

    "eval": of eval mode in float32. A pattern's name: of train mode under `torch.manual_seed(3)` with that pattern and
    the window 1 in every attention, which one other decision in any mask would change.
    """
    prefix, settings, patterns = MODELS[name]
    config = getattr(hf_dropkey, f"{prefix}Config")(**settings, **COMMON)
    torch.manual_seed(0)
    model = getattr(hf_dropkey, f"{prefix}ForImageClassification")(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with torch.no_grad():
            expected = {"eval": model(pixels().float()).logits.double()}
            model.double().train()
            model.set_attn_implementation("eager")
            for pattern in patterns:
                for module in model.modules():
                    if hasattr(module, "dropkey_ratio"):
                        module.dropkey_pattern, module.dropkey_window = pattern, 1
                torch.manual_seed(3)
                expected[pattern] = model(pixels()).logits
        save_file(expected, Path(folder) / "expected.safetensors")
        shutil.make_archive(str(FOLDER / f"dropkey_{name}"), "xztar", folder)


def recorded_mask(**case: Any) -> dict[str, Any]:
    """A case with the decisions it leads to: their sum and the SHA-256 of their packed bits, small masks in full."""
    real = case.pop("real", None)
    arguments = {name: value for name, value in case.items() if name not in ("seed", "shape", "ratio")}
    mask = torch.tensor(real, dtype=torch.bool)[:, None, None] if real is not None else None
    seed = torch.tensor(case["seed"], dtype=torch.int32)
    dropped = dropped_scores(seed, case["shape"], case["ratio"], real=mask, **arguments)
    bits = np.packbits(dropped.numpy())
    found = {"returned": list(dropped.shape), "sum": int(dropped.sum()), "sha256": hashlib.sha256(bits).hexdigest()}
    if len(bits) <= 40:
        found["bits"] = bits.tobytes().hex()
    return case | ({} if real is None else {"real": real}) | found


def record_masks() -> None:
    """All patterns over seeds, ratios, shapes, windows and grids, in one JSON file."""
    cases = [
        recorded_mask(seed=seed, shape=shape, ratio=ratio, pattern=pattern)
        for seed, shape, ratio, pattern in itertools.product(SEEDS, SHAPES, RATIOS, ("score", "key", "token"))
    ]
    cases += [
        recorded_mask(seed=seed, shape=shape, ratio=ratio, pattern=pattern, window=window, grid=grid)
        for seed, ratio, pattern, (window, grid, shape) in itertools.product(SEEDS, RATIOS, ("block", "cross"), GRIDS)
    ]
    lengths = torch.arange(20) < torch.tensor([[20], [12], [1]])
    cases += [
        recorded_mask(seed=seed, shape=(3, 2, 4, 20), ratio=ratio, pattern="token", real=lengths.int().tolist())
        for seed, ratio in itertools.product(SEEDS, RATIOS)
    ]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "masks.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    record_masks()
    for family in MODELS:
        record_checkpoint(family)
