"""What happened to each common test, and where one model does worse than another. Imports pytest only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest


@dataclass(frozen=True)
class Outcome:
    """How one test ended: "passed", "failed" or "skipped", with the skip's reason or the error's first line."""

    status: str
    reason: str = ""


@dataclass
class OutcomeRecorder:
    """A pytest plugin that keeps every test's outcome by test class and test name."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst of a test's reports: set-up, the test, its subtests, tear-down."""
        if report.passed and report.when != "call":
            return
        test_class, test = report.nodeid.split("::")[-2:]
        tests = self.outcomes.setdefault(test_class, {})
        if report.failed:
            tests[test] = Outcome("failed", failure_reason(report))
        elif tests.get(test, Outcome("passed")).status == "passed":
            tests[test] = Outcome(report.outcome, skip_reason(report) if report.skipped else "")


def failure_reason(report: pytest.TestReport) -> str:
    """The first line of a failed test's error message."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = report.longreprtext if crash is None else crash.message
    return message.strip().split("\n", 1)[0]


def skip_reason(report: pytest.TestReport) -> str:
    """The reason of a skipped test, without pytest's prefix."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longreprtext


def differences(
    stock: dict[str, Outcome], ours: dict[str, Outcome], skips: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """One line for each test in which ours does worse than stock.

    What stock passes, ours must pass; what ours skips, stock must skip for the same reason. A test that fails for both
    is the library's own and no difference.

    Args:
        stock: Outcomes of the library's own model by test name.
        ours: The same of ours.
        skips: Tests that ours may skip, with how the reason must begin.
    """
    found = []
    for test in sorted(stock.keys() | ours.keys()):
        expected, got = stock.get(test), ours.get(test)
        if got is not None and got.status == "skipped" and test in skips:
            if not got.reason.startswith(skips[test]):
                found.append(f"{test}: skipped for another reason than {skips[test]!r}: {got.reason}")
        elif expected is None or got is None:
            found.append(f"{test}: {'not run for stock' if expected is None else 'not run for ours'}")
        elif expected.status == "passed" and got.status != "passed":
            found.append(f"{test}: stock passed, ours {got.status}: {got.reason}")
        elif got.status == "skipped" and expected.status != "skipped":
            found.append(f"{test}: stock {expected.status}, ours skipped: {got.reason}")
        elif got.status == "skipped" and without_names(got.reason) != without_names(expected.reason):
            found.append(f"{test}: skipped for another reason: stock {expected.reason!r}, ours {got.reason!r}")
        elif got.status == "failed" and expected.status == "skipped":
            found.append(f"{test}: stock skipped, ours failed: {got.reason}")
    return found


def without_names(reason: str) -> str:
    """A skip reason with stock's and our class names made equal."""
    return re.sub(r"[\w.]*(ViT|DropKeyVolo|DropKeyCeit|DropKeyMesh|DropKeyHoi|Detr)", "ViT", reason)


def summary(tests: dict[str, Outcome]) -> str:
    """How many tests ended how, such as "100 passed, 65 skipped, 0 failed"."""
    statuses = [outcome.status for outcome in tests.values()]
    return ", ".join(f"{statuses.count(status)} {status}" for status in ("passed", "skipped", "failed"))
