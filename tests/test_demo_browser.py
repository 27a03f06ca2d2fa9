"""The demo in a real browser: `hf-dropkey demo` in a process of its own, a headless Chromium, what a visitor does.

Screenshots stay in the folder that the environment variable SCREENSHOTS names, else with pytest's temporary files.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import Page, chromium, chromium_program, screenshots_folder
from small_demos import bad_files, noise, save_classifier


pytestmark = pytest.mark.slow
UPLOAD = "input[type=file]"
SENTENCE = "document.querySelector('#see .answer').innerText"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def shots(home: Path) -> Path:
    return screenshots_folder(home)


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """The address that the command prints."""
    pytest.importorskip("gradio", reason="needs gradio, which the extra 'demo' installs")
    models = [save_classifier(home / "first"), save_classifier(home / "second", stock=True, seed=7)]
    command = [sys.executable, "-m", "hf_dropkey", "demo", *map(str, models), "--port", "0"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=home)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, (home / "server.log").read_text()
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(url: str, home: Path) -> Iterator[Page]:
    program = chromium_program()
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium), which is not installed")
    with chromium(program, home) as browser:
        browser.size(1200, 900)
        browser.go(url)
        browser.wait(f"document.querySelector('#see .answer') && {SENTENCE}")
        # gradio puts the lower parts on the page later
        browser.wait("document.querySelector('#ratio input[type=range]') && document.querySelector('#examples img')")
        yield browser


def changed(page: Page, before: str) -> str:
    """The sentence after it has changed."""
    page.wait(f"{SENTENCE} != {before!r}")
    return page.text("#see .answer")


def settled(page: Page, file: Path) -> None:
    """A screenshot when nothing is computed any more; gradio makes what waits pale."""
    page.wait("![...document.querySelectorAll('.pending, .generating')].length")
    page.run("new Promise(done => setTimeout(done, 500))")
    page.picture(file)


def open_tab(page: Page, name: str) -> None:
    page.run(f"[...document.querySelectorAll('button[role=tab]')].find(one => one.innerText == {name!r}).click()")


def test_the_first_view_needs_no_click(page: Page, shots: Path) -> None:
    assert re.fullmatch(r".+, (over )?\d+ % ± \d+ over 20 masks", page.text("#see .answer"))
    # the image, the rollout, and what three layers lose; all of them drawn
    page.wait("document.querySelectorAll('#see img').length == 5")
    page.wait("[...document.querySelectorAll('#see img')].every(one => one.complete && one.naturalWidth > 0)")
    # controls below the answer
    assert page.run(
        "document.querySelector('#ratio').getBoundingClientRect().top > document.querySelector('#see').getBoundingClientRect().bottom"
    )
    settled(page, shots / "1_first_view.png")


def test_an_example_is_clicked(page: Page, shots: Path) -> None:
    before = page.text("#see .answer")
    page.click("#examples .grid-container > *:nth-child(4)")
    assert changed(page, before)
    settled(page, shots / "2_example.png")


def test_a_picture_is_sent_and_a_bad_one_gets_a_sentence(page: Page, shots: Path, home: Path) -> None:
    before = page.text("#see .answer")
    noise(300, 200, seed=5).save(home / "mine.png")
    page.send_file(UPLOAD, home / "mine.png")
    after = changed(page, before)
    assert page.run("document.querySelector('#see img').alt") == "your picture"
    settled(page, shots / "3_sent.png")
    for word, file in bad_files(home / "bad").items():
        page.send_file(UPLOAD, file)
        page.wait(f"document.querySelector('#remark .problem')?.innerText.startsWith({file.name!r})")
        assert word in page.text("#remark .problem")
        assert page.text("#see .answer") == after
    settled(page, shots / "4_bad_file.png")


def test_the_ratio_and_the_pattern_are_changed(page: Page, shots: Path) -> None:
    before = page.text("#see .answer")
    page.run("document.querySelector('#ratio input[type=range]').focus()")
    for _ in range(8):
        page.press("ArrowRight", 39)
    after = changed(page, before)
    page.wait("document.querySelector('#see .strip').innerText.includes('ratio 80 %')")
    settled(page, shots / "5_ratio.png")
    page.click("#pattern input")
    page.wait("document.querySelectorAll('ul[role=listbox] li').length == 5")
    page.run(
        "[...document.querySelectorAll('ul[role=listbox] li')].find(one => one.innerText.includes('(key)')).dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    assert changed(page, after)
    settled(page, shots / "6_pattern.png")


def test_every_tab_opens(page: Page, shots: Path) -> None:
    open_tab(page, "How sure")
    page.wait("document.querySelectorAll('#sure circle').length == 60")
    page.wait("document.body.innerText.includes('The examples, the most uncertain first')")
    settled(page, shots / "7_how_sure.png")
    open_tab(page, "Compare")
    page.wait("/They disagree on \\d+ of 12 examples/.test(document.body.innerText)")
    settled(page, shots / "8_compare.png")
    open_tab(page, "Train it yourself")
    page.wait("document.body.innerText.includes('hf-dropkey train recipe:digits_vit')")
    settled(page, shots / "9_train.png")
    open_tab(page, "See")


def test_it_is_readable_on_a_phone(page: Page, shots: Path) -> None:
    page.size(390, 844, mobile=True)
    page.wait("document.documentElement.scrollWidth <= 390")
    small = "[...document.querySelectorAll('#see *')].filter(one => one.innerText && parseFloat(getComputedStyle(one).fontSize) < 12).length"
    assert page.run(small) == 0
    wide = "[...document.querySelectorAll('.dk *')].filter(one => one.getBoundingClientRect().right > 390).length"
    assert page.run(wide) == 0
    settled(page, shots / "10_phone.png")


def test_no_other_host_was_asked_and_nothing_failed(page: Page, url: str) -> None:
    hosts = {urlsplit(request).netloc for request in page.requests if not request.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(url).netloc}
    assert page.errors == []
