"""Tests of installing: what the wheel holds, and that pip finds versions for every extra on ordinary machines.

For the latter nothing is installed, and of a registry's wheel only the metadata is read: `pip install --dry-run`, without
any configuration of pip's, so that no folder of wheels on this machine's disk stands in for what others get.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hf_dropkey/", "hf_dropkey_cli/")
# with what these need installed together, each alone and the core without any can be installed too
EVERYTHING = ".[all,dev]"
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
# the oldest C library that torch's wheels run on, and all that its machines can run; the oldest macOS of torch's wheels
LINUX_TAGS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64"]
MACHINES = {
    "linux, 3.11": ("3.11", LINUX, LINUX_TAGS),
    "linux, 3.12": ("3.12", LINUX, LINUX_TAGS),
    "linux, 3.13": ("3.13", LINUX, LINUX_TAGS),
    "macos, 3.13": ("3.13", MACOS, ["macosx_14_0_arm64"]),
}
# these say how to reach a registry, not what comes from it
KEPT_SETTINGS = {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY"}
# --platform and --python-version choose wheels, but pip evaluates markers for the interpreter that runs it
PIP_OF_ANOTHER_MACHINE = """
import json, runpy, sys
from pip._vendor.packaging import markers

environment = markers.default_environment() | json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(environment)
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__")
"""


def run_pip(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs pip without its configuration, with the markers of another machine; stderr is part of stdout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in KEPT_SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", PIP_OF_ANOTHER_MACHINE, json.dumps(environment), *arguments],
        cwd=ROOT,
        env=kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def resolved(machine: str, constraints: dict[str, str], folder: Path) -> dict[str, str]:
    """The versions that pip would install on a machine, by normalised name.

    Raises:
        RuntimeError: pip finds no set of versions; with what it says of the conflict.
    """
    version, markers, tags = MACHINES[machine]
    environment = markers | {"python_version": version, "python_full_version": f"{version}.0"}
    file, report = folder / "constraints.txt", folder / "report.json"
    file.write_text("".join(f"{name}=={pinned}\n" for name, pinned in constraints.items()))
    wheels = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    wheels += [f"--platform={tag}" for tag in tags]
    # fast-deps reads a wheel's metadata out of the archive in the registry, where there is no file of it beside
    options = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", report, "-c", file]
    done = run_pip(environment, "install", *options, *wheels, EVERYTHING)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-30:])
        raise RuntimeError(f"pip cannot install {EVERYTHING} in these versions ({machine}):\n{last}")
    found = json.loads(report.read_text())
    assert environment.items() <= found["environment"].items(), "pip evaluated markers for another machine"
    return {canonicalize_name(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in found["install"]}


def pins(*names: str) -> dict[str, str]:
    """The versions of constraints files by normalised name; a later file's replace an earlier one's."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def tracked() -> list[str]:
    """The files in git, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so there is no list of tracked files to compare with")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return listed.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this package, built without a registry."""
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, because building leaves files where the sources are
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    command = [sys.executable, "-m", "pip", "wheel", *options, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built == {name for name in tracked() if name.startswith(PACKAGES)}
    assert {"hf_dropkey/recipes/digits_vit.json", "hf_dropkey_cli/arguments.json"} <= built


@pytest.mark.slow
def test_an_installed_wheel_trains_predicts_and_reports(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    python = home / "bin" / "python"
    options = ["--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *options], check=True, capture_output=True, timeout=300)
    (packages,) = home.glob("lib/python*/site-packages")
    # the dependencies of this environment behind the wheel; an editable installation among them is not followed
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [home / "bin" / words[0], *words[1:]],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"
        return done.stdout

    where = run(
        "python", "-c", "import hf_dropkey, hf_dropkey_cli; print(hf_dropkey.__file__, hf_dropkey_cli.__file__)"
    )
    assert where.count(str(packages)) == 2
    assert "recipe:digits_vit  (classification)" in run("hf-dropkey", "recipes")
    brief = ["--max_steps", "2", "--max_train_samples", "64", "--max_eval_samples", "16", "--use_cpu"]
    run("hf-dropkey", "train", "recipe:digits_vit", *brief, "--output_dir", "run")
    Image.new("L", (8, 8), 128).save(work / "a.png")
    found = run("hf-dropkey", "predict", "--model_name_or_path", "run", "--images", "a.png")
    assert found.splitlines()[-1].endswith("a.png")
    (work / "run" / "report.html").unlink()
    assert run("hf-dropkey", "report", "run").strip() == "run/report.html"
    assert "Worst mistakes" in (work / "run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def registry() -> None:
    """Skips the tests where pip reaches no registry."""
    done = run_pip({}, "index", "versions", "pip", "--retries", "0")
    if done.returncode:
        pytest.skip(f"needs a package registry, and pip reaches none: {done.stdout.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("files", ["constraints.txt", "constraints.txt constraints-floor.txt"])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_extra_can_be_installed(machine: str, files: str, tmp_path: Path) -> None:
    versions = pins(*files.split())
    found = resolved(machine, versions, tmp_path)
    del found["hf-dropkey"]
    unpinned = {name: version for name, version in found.items() if versions.get(name) != version}
    assert not unpinned, f"add these to constraints.txt: {unpinned}"


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
def test_a_conflict_is_named(tmp_path: Path) -> None:
    versions = pins("constraints.txt") | {"triton": "3.9.0"}
    with pytest.raises(RuntimeError, match=rf"torch {versions['torch']} depends on triton=="):
        resolved("linux, 3.12", versions, tmp_path)
