"""Tests that the project is what its documents say: import directions, the tree, the examples, the version ranges."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement

import hf_dropkey
from hf_dropkey.models.compatibility import MINIMUM_TRANSFORMERS, NEXT_TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_dropkey"
MODELS = PACKAGE / "models"
MODEL_FILES = sorted(MODELS.glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
# what a user reads; its examples run
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# what the loader of remote code takes for a relative import: any such line, in a docstring too
LOADER_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)
# whoever can load the checkpoint has these; transformers itself needs huggingface_hub
TRAVELLING_IMPORTS = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
# the loader of remote code does not ask for what a `try` imports
OPTIONAL = {"triton", "PIL", "scipy"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Each imported module, with its leading dots, and whether the import stands in a `try`."""

    def visit(node: ast.AST, in_try: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_try) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), in_try
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_try or isinstance(node, ast.Try))

    yield from visit(ast.parse(source), False)


def forbidden_imports(source: str, neighbours: set[str]) -> list[str]:
    """The imports that a file which travels with a checkpoint must not have."""
    found = []
    for module, in_try in imports(source):
        top = module.split(".")[0]
        allowed = module[1:] in neighbours if not top else top in TRAVELLING_IMPORTS or (top in OPTIONAL and in_try)
        if not allowed:
            found.append(module)
    return found


def misread_imports(source: str) -> set[str]:
    """The relative imports that the loader reads where Python has none, or the other way round."""
    read = {"." + (found[1] or found[2]) for found in LOADER_IMPORT.finditer(source)}
    return read ^ {module for module, _ in imports(source) if module.startswith(".")}


def tracked_files() -> list[str]:
    """The files in git, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so there is no list of tracked files to compare with")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_travelling_files_import_only_what_travels(path: Path) -> None:
    source = path.read_text()
    assert not forbidden_imports(source, {file.stem for file in MODEL_FILES})
    assert not misread_imports(source), "the loader of remote code copies the files that such lines name"


def test_travelling_files_lie_in_one_folder() -> None:
    assert MODEL_FILES
    assert not [path for path in MODELS.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize(
    "line",
    [
        "import numpy",
        "import triton",
        "from hf_dropkey.models.dropkey import draw_seed",
        "from . import dropkey",
        "from .other import name",
        "from ..patching import name",
        "from .dropkey.deeper import name",
        "def late():\n    import numpy",
    ],
)
def test_a_forbidden_import_is_found(line: str) -> None:
    assert forbidden_imports(line, {"dropkey"})
    assert not forbidden_imports("import torch.nn\nimport re\nfrom .dropkey import name", {"dropkey"})
    assert not forbidden_imports("try:\n    import triton\nexcept ImportError:\n    triton = None", set())


def test_a_misread_import_is_found() -> None:
    docstring = '"""How to:\n\n    from .dropkey import name\n"""\n'
    assert misread_imports(docstring) == {".dropkey"}
    assert not misread_imports("from .dropkey import name\n")


def test_scripts_are_imported_by_nothing() -> None:
    names = {path.stem for path in SCRIPTS} | {"scripts"}
    for path in [*ROOT.glob("hf_dropkey/**/*.py"), *ROOT.glob("tests/**/*.py"), *SCRIPTS]:
        found = [module for module, _ in imports(path.read_text()) if module.lstrip(".").split(".")[0] in names]
        assert not found, f"{path.relative_to(ROOT)} imports {found}; move what it needs into hf_dropkey/"


# from the ground up: a file imports from floors below its own, and from its own room or file
FLOORS = (
    ("version", "moved", "extras", "recipes"),
    ("models", "images", "intervals", "plots", "reference", "evaluate_modules"),
    ("patching", "fast_masks"),
    ("inference", "saved"),
    ("export", "inspection"),
    ("hub",),
    ("pages",),
    ("training",),
    ("classification", "detection", "hoi", "mesh", "segmentation"),
    ("lab", "demo"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# `__init__` names the public face of all floors, and `moved` the old names of all of them
PACKAGE_FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def room_of(module: str) -> str:
    """The room, or the file at the top, of a dotted name below the package; "" for the package itself."""
    return module.split(".")[0]


def rooms_used(source: str, own: str) -> set[str]:
    """The rooms that a file of the package, `own` by its dotted name, imports from."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = own.split(".")[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {room_of(".".join([*above, name])) for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found |= {
                room_of(module.partition(".")[2]) for module in modules if module.partition(".")[0] == PROJECT["name"]
            }
    return found


def above_or_beside(source: str, own: str) -> list[str]:
    """The rooms that a file must not import from: of floors above, other ones on its own, and the package itself."""
    room = room_of(own)
    return sorted(
        used for used in rooms_used(source, own) if used != room and (not used or FLOOR[used] >= FLOOR[room])
    )


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    allowed = {"moved"} if path.name == "__init__.py" else set()
    assert set(above_or_beside(path.read_text(), own)) <= allowed


def test_an_import_of_a_floor_above_is_found() -> None:
    assert above_or_beside("from ..hub.push import api", "patching.apply") == ["hub"]
    assert above_or_beside("def late():\n    from .cli import main", "saved") == ["cli"]
    assert above_or_beside("from ..classification.data import digits", "detection.data") == ["classification"]
    assert above_or_beside("import hf_dropkey\nfrom .. import models", "hub.push") == [""]
    assert above_or_beside("from hf_dropkey.lab.rows import Row", "training.job") == ["lab"]
    assert not above_or_beside("from ..models import attention\nfrom .sites import find_attention", "patching.apply")


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE_FILES}
    assert rooms <= set(FLOOR)
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [room for room in rooms if not re.search(rf"^  (.*  )?{room}(/|\.py)", contributing, re.MULTILINE)]
    assert not missing, f"name {missing} in the house of CONTRIBUTING.md"


def test_the_public_names() -> None:
    families = {"Ceit", "T2TViT", "ViT", "Volo"}
    models = {
        f"DropKey{family}{part}"
        for family in families
        for part in ("Backbone", "Config", "Model", "ForImageClassification", "PreTrainedModel")
    }
    patching = {"DropKeyReport", "apply_dropkey", "remove_dropkey", "dropkey", "dropkey_active", "dropkey_disabled"}
    patching |= {"DropPathReport", "apply_drop_path", "remove_drop_path"}
    patching |= {"PatchDropoutReport", "apply_patch_dropout", "remove_patch_dropout"}
    inference = {"MonteCarloPrediction", "monte_carlo_predict", "export_plain", "layer_ratios", "default_backend"}
    inference |= {"DropKeyONNX", "dropkey_seed", "export_graph", "load_classifier", "metric_path"}
    inference |= {"save_adapter_settings"}
    training = {
        "DropKeyGuardCallback",
        "DropKeyLogCallback",
        "DropKeyScheduleCallback",
        "DropKeySeedCallback",
        "HubTrainer",
        "carry_backbone_code",
        "push_folder",
    }
    others = {"DropKeyViTForMaskedImageModeling", "__version__"}
    others |= {"drop_keys", "DropKey", "dropkey_attention", "sample_ids", "number_layers"}
    others |= {"enable_fast_masks", "disable_fast_masks", "fast_masks_enabled"}
    others |= {"DropKeyFeaturesConfig", "DropKeyFeaturesForImageClassification"}
    others |= {"HoiPipeline", *(f"DropKeyHoi{part}" for part in ("Config", "Model", "PreTrainedModel"))}
    others |= {"DropKeyHoiForObjectDetection"}
    others |= {f"DropKeyMesh{part}" for part in ("Config", "Model", "ForBodyMesh", "PreTrainedModel")}
    assert set(hf_dropkey.__all__) == models | patching | inference | training | others
    for name in hf_dropkey.__all__:
        assert getattr(hf_dropkey, name) is not None and name in dir(hf_dropkey)
    with pytest.raises(AttributeError, match="module 'hf_dropkey' has no attribute 'nothing'"):
        _ = hf_dropkey.nothing


def test_no_test_file_imports_from_another() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        found = [name for name, _ in imports(path.read_text()) if re.match(r"(tests)?\.?(test_|conftest)", name)]
        assert not found, f"{path.name} imports {found}; move what it needs to tests/support/"


def examples(page: str) -> str:
    """The Python examples of a page, with a blank line for each other line: a traceback names the page's own line."""
    inside, lines = False, []
    for line in page.splitlines():
        starts = line.strip() == "```python"
        inside = (inside or starts) and line.strip() != "```"
        lines.append(line if inside and not starts else "")
    return "\n".join(lines)


# each page in a folder and with names of its own; one process, because most of the time is for imports
RUN_PAGES = """
import os, sys
for page in sys.argv[1:]:
    os.chdir(os.path.dirname(page))
    exec(compile(open(page, encoding="utf-8").read(), page, "exec"), {"__name__": "__main__"})
    print("passed", page, flush=True)
"""


def test_the_examples_of_all_pages_run(tmp_path: Path) -> None:
    files = []
    for page in PAGES:
        source = examples(page.read_text(encoding="utf-8"))
        if source.strip():
            (tmp_path / page.stem).mkdir()
            files.append(tmp_path / page.stem / f"{page.stem}.py")
            files[-1].write_text(source, encoding="utf-8")
    assert {"README", "patching"} <= {file.stem for file in files}
    command = [sys.executable, "-c", RUN_PAGES, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed") >= len(files)


def test_an_example_keeps_its_line() -> None:
    assert examples("a\n```python\nb = 1\n```\nc\n```\nd\n```") == "\n\nb = 1\n\n\n\n\n"


def test_the_table_of_the_api_page_is_the_public_api() -> None:
    section = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
    assert sorted(names) == sorted(hf_dropkey.__all__)


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page to files that are not there, or to headings that the other page lacks."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if "://" in link or (target.exists() and not heading):
            continue
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if target.is_file() else []
        if heading not in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [*PAGES[1:], NOTEBOOK, *ROOT.glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_found() -> None:
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/none.md) [b](#none) [c](docs/speed.md#none)") == [
        "docs/none.md",
        "#none",
        "docs/speed.md#none",
    ]
    assert not broken_links(page, "[a](docs/speed.md) [b](#settings) [c](docs/speed.md#costs) [d](https://a.b/c)")


def test_the_readme_and_the_pages_link_to_each_other() -> None:
    for page in (*PAGES[1:], NOTEBOOK):
        assert f"](docs/{page.name})" in readme(), f"README.md does not link to docs/{page.name}"
        assert "](../README.md)" in page.read_text(encoding="utf-8"), f"docs/{page.name} does not link to README.md"


def test_the_readme_is_short_and_of_this_version() -> None:
    assert len(readme().splitlines()) < 150
    assert f"\nVersion {hf_dropkey.__version__.rpartition('.')[0]}. " in readme()


@pytest.mark.parametrize("command", ["bash scripts/quickstart.sh", "bash scripts/test.sh"])
def test_the_readme_has_the_commands(command: str) -> None:
    assert command in readme()
    assert (ROOT / command.split()[1]).is_file()


def test_no_file_names_a_machine() -> None:
    # a path on somebody's disk, or where packages come from
    pattern = r"(^|[^A-Za-z0-9_.*)}])/(home|root|Users|work|opt|mnt)/[A-Za-z0-9]|pypi[.]org|pythonhosted[.]org"
    tracked_files()
    done = subprocess.run(["git", "grep", "-nIE", pattern], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert not done.stdout


def requirement(lines: list[str], name: str) -> Requirement:
    """The requirement of one package among many."""
    return next(found for found in map(Requirement, lines) if found.name == name)


def pins(path: str) -> dict[str, str]:
    """Package and version of each line of a constraints file."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    return {name.lower().replace("-", "_"): version for name, version in (line.split("==") for line in lines)}


def test_the_range_of_transformers_is_the_same_everywhere() -> None:
    lowest, next_major = MINIMUM_TRANSFORMERS, NEXT_TRANSFORMERS[0]
    assert NEXT_TRANSFORMERS[1] == 0
    expected = f">={lowest[0]}.{lowest[1]},<{next_major}"
    assert requirement(PROJECT["dependencies"], "transformers") == Requirement(f"transformers{expected}")
    assert f"transformers{expected}" in (MODELS / "compatibility.py").read_text()
    assert pins("constraints-floor.txt")["transformers"] == f"{lowest[0]}.{lowest[1]}.0"


@pytest.mark.parametrize("floor", [False, True], ids=["constraints", "floor"])
def test_the_tested_versions_lie_in_the_ranges(floor: bool) -> None:
    versions = pins("constraints.txt") | (pins("constraints-floor.txt") if floor else {})
    optional = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for found in map(Requirement, PROJECT["dependencies"] + optional):
        if found.name != PROJECT["name"]:
            assert found.specifier.contains(versions[found.name.lower().replace("-", "_")]), found


def test_the_version_is_the_same_everywhere() -> None:
    version = hf_dropkey.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version


def endless_calls(source: str) -> list[int]:
    """The lines of calls that may wait for ever for a process, a thread or a queue."""
    waiting = {"run", "call", "check_call", "check_output", "communicate", "join", "wait"}
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waiting):
            continue
        of_subprocess = isinstance(node.func.value, ast.Name) and node.func.value.id == "subprocess"
        # other functions called run are anybody's, and ", ".join has an argument
        waits = of_subprocess or (node.func.attr in ("communicate", "join", "wait") and not node.args)
        if waits and not any(keyword.arg == "timeout" for keyword in node.keywords):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_nothing_waits_for_ever(path: Path) -> None:
    assert not endless_calls(path.read_text())


def test_a_call_that_may_wait_for_ever_is_found() -> None:
    source = "subprocess.run(a)\nprocess.join()\nprocess.communicate()\n"
    assert endless_calls(source) == [1, 2, 3]
    assert not endless_calls("subprocess.run(a, timeout=1)\nprocess.join(1)\n', '.join(a)\nmodel.run()")


def test_ci_can_be_started() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
