"""Tests of the gate in tests/host: it compares rightly, trusts no changed archive and unpacks nothing elsewhere."""

import io
import tarfile
from pathlib import Path

import pytest
from compare_outcomes import Outcome, differences, summary
from library_tests import LibraryTestsError, fetch_sdist, sha256, unpack_tests


PASSED, FAILED = Outcome("passed"), Outcome("failed", "AssertionError: 1 != 2")


def skipped(reason: str = "test requires accelerator") -> Outcome:
    return Outcome("skipped", reason)


@pytest.mark.parametrize(
    ("stock", "ours", "differs"),
    [
        (PASSED, PASSED, False),
        (PASSED, FAILED, True),
        (PASSED, skipped(), True),
        (PASSED, None, True),
        (None, PASSED, True),
        (FAILED, FAILED, False),
        (FAILED, PASSED, False),
        (FAILED, skipped(), True),
        (skipped(), PASSED, False),
        (skipped(), FAILED, True),
        (skipped(), skipped(), False),
        (skipped("ViTModel has no RoPE"), skipped("DropKeyViTModel has no RoPE"), False),
        (skipped("ViTModel has no RoPE"), skipped("DropKeyT2TViTModel has no RoPE"), False),
        (skipped("<class 'm.ViTModel'> has no RoPE"), skipped("<class 'n.DropKeyVoloModel'> has no RoPE"), False),
        (skipped("ViTModel has no RoPE"), skipped("not supported"), True),
    ],
)
def test_differences(stock: Outcome | None, ours: Outcome | None, differs: bool) -> None:
    outcomes = [{} if outcome is None else {"test_x": outcome} for outcome in (stock, ours)]
    assert bool(differences(*outcomes)) == differs


def test_a_skip_may_be_allowed_for_one_reason() -> None:
    skips = {"test_x": "No conversion found for"}
    stock = {"test_x": PASSED}
    assert not differences(stock, {"test_x": skipped("No conversion found for DropKeyVoloModel")}, skips)
    assert not differences(stock, {"test_x": PASSED}, skips)
    assert differences(stock, {"test_x": skipped("no time")}, skips)
    assert differences(stock, {"test_x": FAILED}, skips)
    assert differences(stock, {}, skips)


def test_summary() -> None:
    assert summary({"a": PASSED, "b": PASSED, "c": skipped(), "d": FAILED}) == "2 passed, 1 skipped, 1 failed"


def archive_with(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = b"value = 1\n"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_only_the_tests_are_unpacked(tmp_path: Path) -> None:
    names = ["t/tests/test_modeling_common.py", "t/tests/../../evil.py", "/tests/evil.py", "t/src/evil.py"]
    target = tmp_path / "target"
    target.mkdir()
    unpack_tests(archive_with(tmp_path / "t.tar.gz", names), target)
    assert (target / "transformers_tests" / "test_modeling_common.py").exists()
    assert not list(tmp_path.rglob("evil.py"))


def test_an_archive_without_common_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryTestsError, match=r"holds no tests/test_modeling_common\.py"):
        unpack_tests(archive_with(tmp_path / "t.tar.gz", ["t/setup.py"]), tmp_path)


def test_the_cached_archive_is_used_unless_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pip without an index stands for no network
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(LibraryTestsError, match="pip cannot download it"):
        fetch_sdist("1.2.3", tmp_path)
    archive = archive_with(
        tmp_path / "transformers-1.2.3.tar.gz", ["transformers-1.2.3/tests/test_modeling_common.py"]
    )
    with pytest.raises(LibraryTestsError, match="pip cannot download it"):
        fetch_sdist("1.2.3", tmp_path)
    (tmp_path / f"{archive.name}.sha256").write_text(sha256(archive))
    assert fetch_sdist("1.2.3", tmp_path) == archive
    archive.write_bytes(b"something else")
    with pytest.raises(LibraryTestsError, match="but pip verified"):
        fetch_sdist("1.2.3", tmp_path)
