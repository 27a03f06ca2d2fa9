"""The page that computes in the browser alone, in a headless Chromium: its numbers are PyTorch's, and it asks its own host only.

Screenshots stay in the folder that the environment variable SCREENSHOTS names, else with pytest's temporary files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from chromium import Page, chromium, chromium_program, screenshots_folder
from numpy.typing import NDArray
from PIL import Image, ImageOps
from small_demos import bad_files, noise, save_classifier
from static_pages import serving, web_runtime
from transformers import AutoImageProcessor, BitImageProcessorPil

from hf_dropkey import apply_dropkey, dropkey_active, dropkey_seed, load_classifier
from hf_dropkey.cli import main
from hf_dropkey.hub.cards import RunFacts


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("auto_image_processor")]
# of the largest logit: 32-bit sums in another order
TOLERANCE = 1e-5
MASKS = 20
DONE = "globalThis.hfDropkey?.answer?.done"
# no address but this machine's own is found
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@dataclass(frozen=True)
class Shown:
    """A page with the model that it was made of."""

    name: str
    model: Path
    page: Path
    url: str

    def logits(self, image: Image.Image, seed: int) -> NDArray[np.float32]:
        """PyTorch's logits under each mask, `[masks, classes]`."""
        model = load_classifier(self.model)
        if self.name == "photographs":
            apply_dropkey(model)
        pixels = torch.from_numpy(self.pixels(image))[None]
        rows = []
        for number in range(MASKS):
            with torch.no_grad(), dropkey_active(model), dropkey_seed(model, seed + (number << 32)):
                rows.append(model(pixels).logits[0])
        return torch.stack(rows).numpy()

    def pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """What the model takes of an image, by its processor."""
        processor: Any = AutoImageProcessor.from_pretrained(self.model, backend="pil")
        return np.asarray(processor([image.convert("RGB")], return_tensors="np")["pixel_values"])[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def shots(home: Path) -> Path:
    return screenshots_folder(home)


@pytest.fixture(scope="module")
def pages(home: Path) -> Iterator[dict[str, Shown]]:
    """A model of this package on digits, and a stock one on photographs that are resized and cropped; both served."""
    if chromium_program() is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium), which is not installed")
    pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    archive = web_runtime()
    models = {"digits": save_classifier(home / "digits_model", digits=True)}
    models["photographs"] = save_classifier(home / "photographs_model", stock=True, seed=7)
    crop = {"height": 12, "width": 12}
    BitImageProcessorPil(size={"shortest_edge": 15}, crop_size=crop).save_pretrained(models["photographs"])
    RunFacts().save(models["photographs"])
    for name, model in models.items():
        command = ["demo", str(model), "--static_page", str(home / "served" / name)]
        assert main([*command, "--onnxruntime_web", str(archive)]) == 0
    with serving(home / "served") as (url, _):
        yield {name: Shown(name, model, home / "served" / name, f"{url}{name}/") for name, model in models.items()}


@pytest.fixture(scope="module")
def browser(pages: dict[str, Shown], home: Path) -> Iterator[Page]:
    program = chromium_program()
    assert program is not None
    with chromium(program, home, ALONE) as opened:
        opened.size(1200, 900)
        opened.watch_workers()
        opened.go(pages["photographs"].url)
        opened.wait(DONE)
        yield opened


def answer(browser: Page, name: str) -> Any:
    return browser.run(f"hfDropkey.answer.{name}")


def computed(browser: Page, before: int) -> None:
    """Waits until a request after that of a number is computed."""
    browser.wait(f"hfDropkey.answer.job > {before} && hfDropkey.answer.done")


def check_numbers(browser: Page, shown: Shown, image: Image.Image, seed: int, levels: float = 0) -> None:
    """The numbers on the page are PyTorch's, of an image that a browser may decode otherwise by some grey levels."""
    expected = shown.pixels(image)
    found = np.float32(browser.run("Array.from(hfDropkey.answer.pixelValues)")).reshape(expected.shape)
    difference = float(np.abs(found - expected).max())
    # the smallest standard deviation of the channels makes a level the largest
    assert difference <= max(1e-6, levels / 255 / 0.26), difference
    logits, right = np.float32(answer(browser, "logits")), shown.logits(image, seed)
    assert answer(browser, "seed") == seed and logits.shape == right.shape
    worst = float(np.abs(logits - right).max())
    print(f"{shown.name}, seed {seed}: pixels {difference:.1e}, logits {worst:.1e} of {np.abs(right).max():.3g}")
    if not levels:
        assert worst <= TOLERANCE * max(1.0, float(np.abs(right).max())), worst
    # the masks do something
    assert float(right.std(0).max()) > 1e-3


def example(shown: Shown, number: int) -> Image.Image:
    return Image.open(shown.page / "examples" / f"{number:02}.png")


@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_the_first_view_needs_no_click_and_is_pytorchs(
    browser: Page, pages: dict[str, Shown], name: str, shots: Path
) -> None:
    browser.go(pages[name].url)
    browser.wait(f"location.pathname.includes({name!r}) && {DONE}")
    assert re.fullmatch(r".+, (over )?\d+ % ± \d+ over 20 masks", browser.text("#sentence"))
    assert "no picture leaves your machine" in browser.text("#promise")
    assert browser.run("document.querySelectorAll('#dots circle').length") == 3 * MASKS
    browser.wait("[...document.querySelectorAll('#examples img')].every(one => one.complete && one.naturalWidth > 0)")
    check_numbers(browser, pages[name], example(pages[name], 1), 0)
    browser.picture(shots / f"static_1_{name}.png")


def test_runs_are_shown_as_they_come_and_the_page_stays_free(browser: Page) -> None:
    counts = browser.run("""new Promise(done => {
        const seen = [];
        const look = () => {
            seen.push(document.querySelectorAll('#dots circle').length / 3);
            if (hfDropkey.answer.done) done(seen);
        };
        new MutationObserver(look).observe(document.querySelector('#dots'), {childList: true});
        document.querySelector('#next').click();
    })""")
    assert counts == list(range(1, MASKS + 1))


def test_a_seed_gives_its_masks_every_time(browser: Page, pages: dict[str, Shown]) -> None:
    image = example(pages["photographs"], 1)
    found = []
    for seed in (5, 2**31 - 1, 5):
        before = answer(browser, "job")
        browser.run(f"document.querySelector('#seed').value = '{seed}'")
        browser.run("document.querySelector('#seed').dispatchEvent(new Event('change'))")
        computed(browser, before)
        check_numbers(browser, pages["photographs"], image, seed)
        found.append(answer(browser, "logits"))
    assert found[0] == found[2] != found[1]
    for wrong in ("-1", "1.5", "", str(2**31)):
        browser.run(f"document.querySelector('#seed').value = '{wrong}'")
        browser.run("document.querySelector('#seed').dispatchEvent(new Event('change'))")
        assert "must be a whole number from 0 to 2147483647" in browser.text("#remark.problem")
    assert answer(browser, "logits") == found[2]
    browser.run("document.querySelector('#seed').value = '0'")


def send(browser: Page, file: Path) -> None:
    before = answer(browser, "job")
    browser.send_file("#file", file)
    computed(browser, before)


def test_a_picture_of_ones_own(browser: Page, pages: dict[str, Shown], home: Path, shots: Path) -> None:
    shown, smooth = pages["photographs"], example(pages["photographs"], 2)
    noise(301, 200, seed=5).save(home / "mine.png")
    send(browser, home / "mine.png")
    assert answer(browser, "name") == "mine.png" and browser.text("#remark") == ""
    check_numbers(browser, shown, Image.open(home / "mine.png"), 0)
    # a camera that was held upright
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.save(home / "turned.jpg", quality=90, exif=turned.tobytes())
    send(browser, home / "turned.jpg")
    check_numbers(browser, shown, ImageOps.exif_transpose(Image.open(home / "turned.jpg")), 0, levels=2)
    noise(60, 60).convert("L").save(home / "grey.png")
    send(browser, home / "grey.png")
    assert "The picture is grey" in browser.text("#remark")
    check_numbers(browser, shown, Image.open(home / "grey.png"), 0)
    Image.new("RGBA", (40, 40), (200, 100, 50, 0)).save(home / "clear.png")
    send(browser, home / "clear.png")
    assert "transparent parts" in browser.text("#remark")
    send(browser, home / "mine.png")
    browser.picture(shots / "static_2_sent.png")


def test_a_bad_file_gets_a_sentence_and_changes_nothing(browser: Page, home: Path, shots: Path) -> None:
    before = browser.text("#sentence"), answer(browser, "logits")
    for word, file in bad_files(home / "bad").items():
        browser.send_file("#file", file)
        browser.wait(f"document.querySelector('#remark.problem')?.innerText.startsWith({file.name!r})")
        text = browser.text("#remark.problem")
        assert word.replace("not an image file", "not an image file that this page reads").split(" (")[0] in text
    assert (browser.text("#sentence"), answer(browser, "logits")) == before
    browser.picture(shots / "static_3_bad_file.png")


def test_a_picture_is_dropped_or_pasted(browser: Page) -> None:
    for kind, event, field in (("drop", "DragEvent", "dataTransfer"), ("paste", "ClipboardEvent", "clipboardData")):
        before = answer(browser, "job")
        browser.run(f"""(async () => {{
            const file = await (await fetch('examples/02.png')).blob();
            const moved = new DataTransfer();
            moved.items.add(new File([file], '{kind}.png', {{type: 'image/png'}}));
            document.body.dispatchEvent(new {event}('{kind}', {{{field}: moved, bubbles: true, cancelable: true}}));
        }})()""")
        computed(browser, before)
        assert answer(browser, "name") == f"{kind}.png"
    browser.run(
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))"
    )
    assert "Save the picture first" in browser.text("#remark.problem")


def test_keys_are_enough(browser: Page) -> None:
    browser.run("document.activeElement.blur()")
    reached: list[str] = []
    while "next" not in reached and len(reached) < 20:
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id || document.activeElement.closest('[id]').id"))
    assert list(dict.fromkeys(reached)) == ["examples", "file", "seed", "next"]
    before = answer(browser, "job"), answer(browser, "seed")
    browser.press(" ", 32)
    computed(browser, before[0])
    assert answer(browser, "seed") == before[1] + 1
    browser.run("document.querySelector('#examples button').focus()")
    browser.press(" ", 32)
    computed(browser, before[0] + 1)
    # what cannot be seen is said
    assert browser.run("[...document.querySelectorAll('#examples img')].every(one => one.alt)")
    assert browser.run("document.querySelector('#seen').ariaLabel") == answer(browser, "name")


@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_it_is_readable_on_a_phone(browser: Page, pages: dict[str, Shown], name: str, shots: Path) -> None:
    browser.size(390, 844, mobile=True)
    browser.go(pages[name].url)
    browser.wait(f"location.pathname.includes({name!r}) && {DONE}")
    browser.wait("document.documentElement.scrollWidth <= 390")
    small = "[...document.querySelectorAll('main *')].filter(one => one.innerText && parseFloat(getComputedStyle(one).fontSize) < 12).length"
    assert browser.run(small) == 0
    drawn = (
        "[...document.querySelectorAll('#dots text')].map(one => one.getAttribute('font-size') * one.getScreenCTM().a)"
    )
    assert min(browser.run(drawn)) >= 12
    wide = "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > 390).length"
    assert browser.run(wide) == 0
    browser.picture(shots / f"static_4_phone_{name}.png")
    browser.size(1200, 900)


def hosts(requests: Sequence[str]) -> set[str]:
    return {urlsplit(request).netloc for request in requests if not request.startswith(("data:", "blob:"))}


def test_neither_the_page_nor_its_worker_can_ask_another_host(
    browser: Page, pages: dict[str, Shown], home: Path
) -> None:
    # what the page and its workers asked for until here, the workers' requests too
    own = urlsplit(pages["digits"].url).netloc
    assert hosts(browser.requests) == {own}
    assert {"model_monte_carlo.onnx", "ort-wasm-simd-threaded.wasm"} <= {
        urlsplit(request).path.rpartition("/")[2] for request in browser.requests
    }
    assert browser.errors == []
    with serving(home) as (other, asked):
        send_it = (
            f"fetch({other!r}, {{method: 'POST', mode: 'no-cors', body: 'x'}}).then(() => 'sent', () => 'refused')"
        )
        assert browser.run(send_it) == "refused"
        assert browser.run(send_it, session=browser.workers[-1]) == "refused"
        assert asked == []


def test_it_computes_when_the_server_has_gone(browser: Page, pages: dict[str, Shown], home: Path) -> None:
    shown = pages["photographs"]
    with serving(shown.page) as (url, _):
        browser.go(url)
        browser.wait(
            f"location.href == {url!r} && {DONE} && document.querySelectorAll('#examples button').length == 2"
        )
    assert browser.run("fetch('settings.json', {cache: 'no-store'}).then(() => 'sent', () => 'gone')") == "gone"
    before = answer(browser, "job")
    browser.click("#examples button:nth-child(2)")
    computed(browser, before)
    check_numbers(browser, shown, example(shown, 2), 0)
    noise(50, 50, seed=9).save(home / "alone.png")
    send(browser, home / "alone.png")
    check_numbers(browser, shown, Image.open(home / "alone.png"), 0)
