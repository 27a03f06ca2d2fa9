"""What JSON makes a loader follow: no form of a reference passes, and what Transformers itself writes does."""

import json
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_dropkey.hub.contents import UnreadableFile, leaves, parsed
from hf_dropkey.hub.references import FOLLOWED_FIELDS, defined_classes, json_problems


CLASSES = {"modeling_dropkey_vit": {"DropKeyViTModel"}, "configuration_dropkey_vit": {"DropKeyViTConfig"}}
OURS = "modeling_dropkey_vit.DropKeyViTModel"
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "sub/config.json",
    "Config.JSON",
    "any.json",
)
# of models of other data than images, and that request files or kernels by a name in their configuration
FOLLOWING = {"rag", "xlstm"}
# write a property without a setter into their own file
SHADOWING = {"pp_doclayout_v2", "pp_doclayout_v3"}


def problems(name: str, found: Any, code: bool = True) -> list[str]:
    # through text, as a checkpoint has it
    return list(json_problems(name, parsed(json.dumps(found).encode(), name), CLASSES, code=code))


def test_our_own_references_are_allowed_in_every_form():
    for value in (OURS, {"pil": OURS, "torchvision": OURS}, [OURS, None], [{"pil": OURS}]):
        assert problems("config.json", {"auto_map": {"AutoModel": value}}) == []
    pipeline = {"x": {"impl": OURS, "pt": ["AutoModelForImageClassification"], "type": "image"}}
    assert problems("config.json", {"custom_pipelines": pipeline}) == []


def test_classes_are_those_that_a_file_defines():
    source = (
        b"import os\nfrom pathlib import Path\nX = 1\nclass A: pass\nclass B(A):\n    class C: pass\ndef f(): pass\n"
    )
    assert defined_classes(source) == {"A", "B"}
    assert defined_classes(b"class (") == defined_classes(b"\xff\0") == frozenset()


def test_configurations_that_transformers_writes_are_allowed():
    written = 0
    for model_type in CONFIG_MAPPING:
        try:
            cls = CONFIG_MAPPING[model_type]
            found = json.loads(cls().to_json_string(use_diff=False))
        except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError, StrictDataclassError):
            # needs arguments, another package, or a file of the Hub
            continue
        if not cls.__module__.startswith("transformers.") or model_type in FOLLOWING | SHADOWING:
            continue
        written += 1
        assert problems("config.json", found, code=False) == [], model_type
    assert written > 500


def test_processors_that_transformers_writes_are_allowed():
    written = 0
    for name in dir(transformers):
        if not name.endswith(("ImageProcessor", "ImageProcessorPil")) or name.startswith(("Auto", "OneFormer")):
            continue
        try:
            found = json.loads(getattr(transformers, name)().to_json_string())
        except (AttributeError, ImportError, TypeError, ValueError):
            continue
        written += 1
        assert problems("preprocessor_config.json", found) == [], name
    assert written > 50


def test_a_name_is_harmless_only_without_code():
    assert problems("config.json", {"_name_or_path": "google/vit"}, code=False) == []
    assert problems("config.json", {"_name_or_path": "google/vit"}, code=True)
    assert problems("config.json", {"vision_config": {"_name_or_path": "google/vit"}}, code=False)


# --- every form at every depth -----------------------------------------------------------------------------------------

words = st.text("abcxyz_", min_size=1, max_size=8)
names = st.text("abcXYZ019._-", min_size=1, max_size=12).map(lambda text: f"a{text}")
# what a loader could follow, wherever it stands
followed = st.one_of(
    st.builds("{}/{}--{}.{}".format, names, names, words, words),
    st.builds("{}--{}.{}".format, names, words, words),
    st.builds("{}/{}".format, names, names),
    st.builds("{}/{}:{}".format, names, names, words),
    st.builds("/{}/{}.{}".format, words, words, words),
    st.builds("../{}".format, words),
    st.builds("{}\\{}".format, words, words),
    st.builds("https://{}/{}".format, words, words),
    st.builds("hf://{}/{}".format, words, words),
    st.builds("{}.{}".format, words.map(lambda text: f"m{text}"), words.map(lambda text: f"C{text}")),
    st.builds("{}.py".format, words),
    st.builds("{}.bin".format, words),
)
plain = st.one_of(st.integers(-100, 100), st.floats(-1, 1), st.booleans(), st.none(), words)
text_keys = words.filter(lambda key: not key.startswith("_") and not hasattr(PreTrainedConfig, key))


def wrapped(inner: st.SearchStrategy) -> st.SearchStrategy:
    """A value inside objects and lists, beside harmless ones."""
    beside = st.dictionaries(text_keys, plain, max_size=2)
    return st.recursive(
        inner,
        lambda deeper: st.one_of(
            st.builds(lambda key, value, more: {**more, key: value}, text_keys, deeper, beside),
            st.builds(lambda value, more: [*more, value], deeper, st.lists(plain, max_size=2)),
        ),
        max_leaves=1,
    )


fuzzed = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@pytest.mark.slow
@seed(20261126)
@fuzzed
@given(st.sampled_from(FILES), text_keys, wrapped(followed))
@example("processor_config.json", "image_processor", {"auto_map": {"AutoImageProcessor": {"pil": "evil/x--m.P"}}})
@example("config.json", "vision_config", {"attn": "evil/kernel"})
def test_nothing_that_can_be_followed_passes_under_any_key(name, key, value):
    assert problems(name, {key: value})


@pytest.mark.slow
@seed(20261126)
@fuzzed
@given(st.sampled_from(FILES), wrapped(followed | words), st.sampled_from(("auto_map", "impl")), st.lists(text_keys))
def test_no_reference_but_ours_passes(name, value, kind, path):
    found: Any = (
        {"auto_map": {"AutoModel": value}} if kind == "auto_map" else {"custom_pipelines": {"x": {"impl": value}}}
    )
    for key in path[:20]:
        found = {key: found}
    assert problems(name, found)


@pytest.mark.slow
@seed(20261126)
@fuzzed
@given(
    st.sampled_from(FILES), st.sampled_from(sorted(FOLLOWED_FIELDS)), wrapped(words | followed), st.lists(text_keys)
)
def test_no_field_that_loaders_follow_passes(name, field, value, path):
    found: Any = {field: value}
    for key in path[:20]:
        found = {key: found}
    assert problems(name, found)


@pytest.mark.slow
@seed(20261126)
@fuzzed
@given(st.binary(max_size=200) | st.text('{}[]",:abc\\u0012 \n', max_size=200).map(str.encode))
@example(b"[" * 200_000)
@example(b'{"a":1,"a":2}')
@example(b"\xff\xfe{\0}\0")
def test_other_content_is_one_kind_of_error(content):
    try:
        found = parsed(content, "x.json")
    except (UnreadableFile, ValueError):
        return
    assert list(leaves(found))
