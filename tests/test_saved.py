"""What a loader says of weights: its own log, not Transformers' table, unless something unexpected is in it."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as hf_logging

from hf_dropkey.saved import check_attention, quiet_loading


SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_expected_tables_are_left_out_and_others_shown(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**SHAPE, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("transformers").addHandler(handler)
    # other tests may have changed what Transformers shows
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()

    def load(**changes: Any) -> str:
        written.seek(0)
        written.truncate()
        config = ViTConfig(**{**SHAPE, "image_size": 16, "patch_size": 8, **changes})
        ViTForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
        return written.getvalue()

    try:
        assert "LOAD REPORT" in load(image_size=32)
        with quiet_loading():
            assert load(image_size=32) == ""
            # weights that the model does not have are a surprise
            assert "UNEXPECTED" in load(num_hidden_layers=1)
        assert "LOAD REPORT" in load(image_size=32)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        hf_logging.set_verbosity(level)


def test_an_unknown_attention_lists_those_there_are() -> None:
    for name in (None, "eager", "sdpa", "flex_attention", "dropkey_triton", "owner/kernel"):
        check_attention(name)
    with pytest.raises(
        ValueError, match=r"--attn_implementation sdp is unknown; choose from dropkey_triton, eager, .*sdpa"
    ):
        check_attention("sdp")
