"""What every test gets: no network, fixed seeds, one thread, caches of its process's own; and the data sets beside the
repository, where there are.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from hub_server import HubServer

# before any test module imports torch or transformers, and for the processes that tests start
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
# code of checkpoints and prepared data sets, which processes side by side would write over each other's
CACHE = tempfile.TemporaryDirectory(prefix="hf_dropkey_tests_")
os.environ["HF_HOME"] = CACHE.name
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)
# models this tiny only lose by threads, on a busy machine a factor of six
os.environ.setdefault("OMP_NUM_THREADS", "1")
# without a GPU, Triton's interpreter runs the fused kernels; Triton decides when it is first imported
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
# a file is the work of one process: begun last, these would keep one busy while the others have nothing left
LONGEST = ("test_documented_commands.py", "test_triton_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first; all others stay in their order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds Python, numpy and torch before each test, so that a test's numbers do not depend on the tests before it."""
    from transformers import set_seed

    set_seed(0)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Restores what a test, or a script that it runs, shows and hides of the log, so that the next ones see theirs."""
    from transformers.utils import logging as transformers_logging

    hidden, shown = logging.root.manager.disable, transformers_logging.get_verbosity()
    yield
    logging.disable(hidden)
    transformers_logging.set_verbosity(shown)


@pytest.fixture(scope="module")
def hub() -> Iterator["HubServer"]:
    """A server that speaks the Hub's API."""
    from hub_server import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `shared/data` beside the repository; a test that uses it is skipped elsewhere."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {os.path.relpath(folder, ROOT)}, which is not there")
    return folder


@pytest.fixture(scope="session")
def shared_cases() -> Path:
    """The folder `shared/cases` beside the repository; a test that uses it is skipped elsewhere."""
    folder = ROOT.parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip(f"needs the small inputs in {os.path.relpath(folder, ROOT)}, which is not there")
    return folder


@pytest.fixture(scope="session")
def auto_image_processor() -> None:
    """Skips a test that loads an image processor, where Transformers refuses to without torchvision (5.13 does)."""
    from transformers import AutoImageProcessor, __version__

    try:
        AutoImageProcessor.from_pretrained  # noqa: B018  # a stand-in for the class raises on any access
    except ImportError:
        pytest.skip(f"AutoImageProcessor of Transformers {__version__} needs torchvision, which is not installed")
