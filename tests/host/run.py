"""Runs Transformers' own common tests over stock ViT and over the DropKey classes and compares them test by test.

    python tests/host/run.py [--cache_dir DIR] [-- pytest arguments]

Ends with 0 only if every test that stock ViT passes passes for ours too, at ratio 0 and at ratio 0.3, and ours skips
nothing that stock does not skip for the same reason. T2T-ViT, VOLO, CeiT and the body-mesh models, which have no stock
class, are held to the same, at ratio 0.3; DropKeyHoi is held to stock DETR, and backbones to stock DINOv2's.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import pytest
from compare_outcomes import OutcomeRecorder, differences, summary
from library_tests import LibraryTestsError, fetch_sdist, unpack_tests


STOCK, STOCK_DETR, STOCK_BACKBONE = "TestStockViT", "TestStockDetr", "TestStockBackbone"
# checkpoints of these families have had one layout only, so there is nothing to convert
NO_OTHER_LAYOUT = dict.fromkeys(
    ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"), "No conversion found for"
)
# the ResNet inside knows no attention
CONVOLUTIONAL_BACKBONE = NO_OTHER_LAYOUT | {
    "test_can_set_attention_dynamically": "Parts of this model don't support sdpa"
}
# each of our classes beside its stock class, and what it may skip although stock does not
OURS: dict[str, dict[str, str]] = {
    "TestDropKeyViTWithoutDropping": {},
    "TestDropKeyViT": {},
    "TestDropKeyT2TViT": NO_OTHER_LAYOUT,
    "TestDropKeyT2TViTPerformer": NO_OTHER_LAYOUT,
    "TestDropKeyVolo": NO_OTHER_LAYOUT,
    "TestDropKeyCeit": NO_OTHER_LAYOUT,
    # fails for stock DETR, which offers it too
    "TestDropKeyHoi": NO_OTHER_LAYOUT
    | {"test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": "Model does not support output_"},
    "TestDropKeyMesh": CONVOLUTIONAL_BACKBONE,
    "TestDropKeyMeshGraphormer": CONVOLUTIONAL_BACKBONE,
    "TestDropKeyViTBackbone": {},
    "TestDropKeyT2TViTBackbone": {},
    "TestDropKeyVoloBackbone": {},
    "TestDropKeyCeitBackbone": {},
}
# classes that another stock class than ViT stands beside
BESIDE = {name: STOCK_BACKBONE for name in OURS if name.endswith("Backbone")} | {"TestDropKeyHoi": STOCK_DETR}
SUITES = ("vit_suite.py", "families_suite.py", "task_suite.py", "backbone_suite.py")
# 5.13.0 has 93, 5.23.0 has 98, and 8 of backbones. far below, something cut the tests off and equal results would say
# nothing.
MIN_STOCK_PASSES = {STOCK: 80, STOCK_DETR: 80, STOCK_BACKBONE: 8}


def default_cache_dir() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey"


def run_suite(package_parent: Path, pytest_args: list[str]) -> OutcomeRecorder:
    """Runs the suites in this process, with the library's tests importable from `package_parent`."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(package_parent), str(here.parents[1])]
    recorder = OutcomeRecorder()
    # an empty configuration: this project's strict markers do not know the library's
    config = package_parent / "pytest.ini"
    config.write_text("[pytest]\n")
    options = ["-q", "-c", str(config), f"--rootdir={package_parent}", "-p", "no:cacheprovider", "--noconftest"]
    # a class at a time on each core
    options += ["-n", "logical", "--maxprocesses", "4", "--max-worker-restart", "0", "--dist", "loadscope"]
    options += [
        "-W",
        "ignore::pytest.PytestUnknownMarkWarning",
        *pytest_args,
        *(str(here / suite) for suite in SUITES),
    ]
    code = pytest.main(options, plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise LibraryTestsError(f"pytest could not run the common tests: it ended with {code!r}.")
    return recorder


def report(recorder: OutcomeRecorder) -> int:
    """Prints the comparison; returns the number of differences, counting a cut-off stock run as one."""
    total = 0
    for name, least in MIN_STOCK_PASSES.items():
        stock = recorder.outcomes.get(name, {})
        print(f"\n{name}: {summary(stock)}")
        for test, outcome in stock.items():
            if outcome.status == "failed":
                print(f"  fails for stock too: {test}: {outcome.reason}")
        passes = sum(outcome.status == "passed" for outcome in stock.values())
        if passes < least:
            print(f"  {name} passed {passes} tests, at least {least} are needed for a comparison")
            total += 1
    for name, skips in OURS.items():
        ours = recorder.outcomes.get(name, {})
        stock = recorder.outcomes.get(BESIDE.get(name, STOCK), {})
        found = differences(stock, ours, skips)
        print(f"{name}: {summary(ours)}; {len(found)} differ from stock")
        for line in found:
            print(f"  {line}")
        total += len(found)
    return total


def main() -> int:
    """Gets the tests, runs them, compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=default_cache_dir(), help="where the source archive is kept")
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest, after --")
    args = parser.parse_args()
    # set before transformers is imported: a test that needs the network is skipped or fails alike for both
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    # models this tiny only lose by threads, on a busy machine a factor of six
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        archive = fetch_sdist(importlib.metadata.version("transformers"), args.cache_dir)
        with tempfile.TemporaryDirectory() as directory:
            unpack_tests(archive, Path(directory))
            recorder = run_suite(Path(directory).resolve(), args.pytest_args)
    except LibraryTestsError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if report(recorder) else 0


if __name__ == "__main__":
    sys.exit(main())
