"""Import paths of version 0.1 still work, and say where their names are now."""

import importlib
import pickle
import warnings

import pytest

import hf_dropkey
from hf_dropkey.moved import IN_PLACE, MOVED


# of each module of version 0.1, what people import from it
NAMES = {
    "attention_analysis": "attention_rollout",
    "attention_plots": "entropy_and_distance",
    "attention_recording": "record_attention",
    "benchmark": "interleaved_times",
    "callbacks": "DropKeyScheduleCallback",
    "cards": "write_card",
    "checkpoints": "prepare_output_folder",
    "classification": "make_model",
    "classification_arguments": "RunArguments",
    "classification_trainer": "ClassificationJob",
    "data": "load_image_data",
    "detection": "DetectionTrainer",
    "detection_data": "load_detection_data",
    "detection_metrics": "CocoMetrics",
    "detection_transform": "BoxAugmentation",
    "dispatch": "DropKeyConfigView",
    "evidence": "comparison",
    "evidence_cards": "verdict",
    "experiments": "Grid",
    "families": "FAMILIES",
    "faults": "GuardedTrainer",
    "hub": "files_to_push",
    "hub_trainer": "HubTrainer",
    "image_checks": "read_image",
    "image_transform": "Augmentation",
    "inspection": "inspect_folder",
    "legacy_names": "convert_legacy_names",
    "metrics": "classification_metrics",
    "patching": "dropkey_modules",
    "plots": "detections",
    "release_check": "check_release",
    "report": "RegularisedAttention",
    "result_plots": "curves",
    "results": "interval",
    "robustness": "occlude",
    "sites": "find_attention",
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_warns_and_works(old: str) -> None:
    module = importlib.import_module(f"hf_dropkey.{old}")
    with pytest.warns(
        DeprecationWarning, match=rf"hf_dropkey\.{old}\.{NAMES[old]} is now hf_dropkey\.[A-Za-z_.]+; the old"
    ):
        found = getattr(module, NAMES[old])
    assert any(
        getattr(importlib.import_module(f"hf_dropkey.{place}"), NAMES[old], None) is found for place in MOVED[old]
    )
    assert getattr(hf_dropkey, old) is module


def test_the_warning_names_the_line_that_imports() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("from hf_dropkey.callbacks import DropKeySeedCallback", "a_users_file.py", "exec"), {})
    assert [warning.filename for warning in caught] == ["a_users_file.py"]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_name_that_never_was_is_an_attribute_error(old: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'hf_dropkey.{old}' has no attribute 'nothing'"):
        _ = importlib.import_module(f"hf_dropkey.{old}").nothing


def test_a_pickle_of_version_0_1_opens() -> None:
    # training_args.bin of a run may hold such a reference
    with pytest.warns(DeprecationWarning, match="is now hf_dropkey.training.callbacks.DropKeySeedCallback"):
        assert pickle.loads(b"chf_dropkey.callbacks\nDropKeySeedCallback\n.") is hf_dropkey.DropKeySeedCallback


def test_public_names_need_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hf_dropkey.patching.apply_dropkey is hf_dropkey.apply_dropkey
        assert set(IN_PLACE) <= set(MOVED)
