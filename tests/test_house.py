"""Tests that the project is what its documents say: import directions, the tree, the examples, the version ranges."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_dropkey.models.compatibility import MINIMUM_TRANSFORMERS, NEXT_TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "hf_dropkey" / "models"
MODEL_FILES = sorted(MODELS.glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# what the loader of remote code takes for a relative import: any such line, in a docstring too
LOADER_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)
# whoever can load the checkpoint has these; transformers itself needs huggingface_hub
TRAVELLING_IMPORTS = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names


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
        allowed = module[1:] in neighbours if not top else top in TRAVELLING_IMPORTS or (top == "triton" and in_try)
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
    return (ROOT / "README.md").read_text()


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


def listed_tree(text: str) -> dict[str, str]:
    """The paths in the block under "## The tree", each with its folder.

    One entry a line, two spaces deeper than its folder, a folder's name ends with a slash. `a.py, b.py` are two
    entries, `<family>` stands for any text, and what follows two spaces is the description.
    """
    block = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block under '## The tree'"
    listed, folders = {}, [""]
    for line in filter(str.strip, block[1].splitlines()):
        depth, odd = divmod(len(line) - len(line.lstrip()), 2)
        assert not odd and depth < len(folders), f"indent {line!r} by two spaces more than its folder"
        del folders[depth + 1 :]
        for name in re.split(r" {2,}", line.strip())[0].split(", "):
            path = folders[depth] + re.sub(r"<\w+>", "*", name)
            listed[path] = folders[depth]
            if name.endswith("/"):
                folders.append(path)
    return listed


def tree_errors(listed: dict[str, str], tracked: list[str]) -> list[str]:
    """Entries of the tree that match no file, and files that its listed folders leave out."""
    entries = {
        f"{'/'.join(parts[: n + 1])}{'/' if n + 1 < len(parts) else ''}"
        for parts in map(split, tracked)
        for n in range(len(parts))
    }
    errors = [f"{path} is in the tree but not in git" for path in listed if not any(fnmatch(e, path) for e in entries)]
    # a folder without listed contents stands for all of them; names with a leading dot need no entry
    detailed = set(listed.values())
    for entry in sorted(entries):
        parent = entry.rstrip("/").rpartition("/")[0]
        parent = f"{parent}/" if parent else ""
        name = entry.removeprefix(parent)
        if (
            parent in detailed
            and not name.startswith((".", "__init__"))
            and not any(fnmatch(entry, p) for p in listed)
        ):
            errors.append(f"{entry} is in git but not in the tree")
    return errors


def split(path: str) -> list[str]:
    return path.split("/")


def test_the_tree_in_the_readme_is_true() -> None:
    assert not tree_errors(listed_tree(readme()), tracked_files())


def test_a_wrong_tree_is_found() -> None:
    tree = "## The tree\n```\na/            a folder\n  one.py, x_<name>.py   two files\n  c/  more\nREADME.md\n```\n"
    tracked = ["README.md", ".gitignore", "a/__init__.py", "a/one.py", "a/x_b.py", "a/c/deep.py"]
    assert tree_errors(listed_tree(tree), tracked) == []
    assert tree_errors(listed_tree(tree), [*tracked, "a/two.py"]) == ["a/two.py is in git but not in the tree"]
    assert tree_errors(listed_tree(tree), tracked[:-1]) == ["a/c/ is in the tree but not in git"]


def test_the_examples_in_the_readme_run(tmp_path: Path) -> None:
    inside, lines, blocks = False, [], 0
    for line in readme().splitlines():
        starts = line.strip() == "```python"
        blocks += starts
        inside = (inside or starts) and line.strip() != "```"
        # a blank line for each line of prose: a traceback names README's own line
        lines.append(line if inside and not starts else "")
    assert blocks >= 3, f"README.md has {blocks} Python examples"
    script = tmp_path / "README.py"
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


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
