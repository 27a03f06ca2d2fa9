"""The page as visitors get it, through gradio's own client."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_demos import RATIO, bad_files, noise, save_classifier
from small_pages import client_of, served

from hf_dropkey.demo.answers import Classifier, Settings
from hf_dropkey.demo.examples import Example
from hf_dropkey.demo.page import COMPARE, SURE, TRAIN, Calls
from hf_dropkey.demo.views import Views


pytestmark = pytest.mark.usefixtures("auto_image_processor")


REMARK, SEE, NUMBERS = 0, 1, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("models")
    return [save_classifier(home / "one"), save_classifier(home / "two", stock=True, seed=7)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        noise(seed=number).save(home / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def url(folders: list[Path], pictures: Path) -> Iterator[str]:
    with served(folders, pictures) as address:
        yield address


def test_settings_of_one_visitor_are_not_those_of_another(url: str, folders: list[Path]) -> None:
    """Each sends a picture, then changes settings: the picture is remembered for its visitor alone."""
    from gradio_client import handle_file

    model = Classifier(folders[0])
    sent = {seed: noise(seed=seed) for seed in (20, 21, 22)}

    def visit(seed: int) -> list[dict[str, Any]]:
        client = client_of(url)
        file = folders[0].parent / f"{seed}.png"
        sent[seed].save(file)
        found = [client.predict(handle_file(str(file)), RATIO, "score", 0, api_name="/picture")[NUMBERS]]
        found += [client.predict(0.3, "key", seed, api_name="/settings")[NUMBERS] for _ in range(3)]
        return found

    with ThreadPoolExecutor(3) as visitors:
        for seed, (first, *others) in zip(sent, visitors.map(visit, sent), strict=True):
            expected = model.answer(sent[seed], model.settings)
            assert first["label"] == expected.label
            assert first["probability"] == pytest.approx(expected.probabilities.max(), abs=1e-4)
            changed = model.answer(sent[seed], Settings(0.3, "key", seed))
            for other in others:
                assert other["probability"] == pytest.approx(changed.probabilities.max(), abs=1e-4)
                assert (other["ratio"], other["pattern"], other["seed"]) == (0.3, "key", seed)


def test_a_bad_file_gets_a_sentence_and_changes_nothing(url: str, tmp_path: Path) -> None:
    from gradio_client import handle_file

    client = client_of(url)
    before = client.predict(RATIO, "score", 0, api_name="/settings")[NUMBERS]
    for word, file in bad_files(tmp_path / "bad").items():
        if not file.stat().st_size:
            # gradio's client sends no empty files; `test_demo_uploads` has it
            continue
        found = client.predict(handle_file(str(file)), RATIO, "score", 0, api_name="/picture")
        assert word in found[REMARK] and "dk" in found[REMARK], word
    assert client.predict(RATIO, "score", 0, api_name="/settings")[NUMBERS] == before


def test_a_setting_outside_its_range_is_refused(url: str) -> None:
    found = client_of(url).predict(RATIO, "score", -5, api_name="/settings")
    assert "The seed -5 is not in" in found[REMARK]


@pytest.fixture(scope="module")
def views(folders: list[Path]) -> Views:
    examples = [Example(f"<i>{number}</i>", noise(seed=number)) for number in range(4)]
    return Views([Classifier(folder) for folder in folders], folders, examples)


def test_the_first_view_holds_its_pictures_and_no_address(views: Views) -> None:
    seen, dots, numbers = views.see(noise(), "<i>mine</i>", views.models[0].settings)
    assert numbers["sentence"] in seen.replace("&lt;", "<").replace("&gt;", ">")
    # two large pictures, and one for each layer
    assert seen.count('<img src="data:image/') == 2 + 3 and "http" not in seen.replace("data:image", "")
    assert "<i>mine" not in seen and "<b>bird" not in seen + dots
    assert dots.count("<circle") == 3 * 20


def test_only_the_open_tab_is_computed(views: Views) -> None:
    skipped = object()
    calls = Calls(views, lambda: skipped)
    shown = {tab: calls.opening(tab)(0, RATIO, "score", 0) for tab in (SURE, COMPARE, TRAIN)}
    assert [tab for tab, found in shown.items() if found[0] != tab] == []
    assert "The examples" in shown[SURE][-2] and shown[SURE][-1] is skipped
    assert "They disagree on" in shown[COMPARE][-1] and shown[COMPARE][-2] is skipped
    assert shown[TRAIN][1:] == [skipped] * 7


def test_two_models_are_compared_on_the_visitors_picture(views: Views) -> None:
    settings = views.models[0].settings
    shown = views.compare(noise(seed=30), "mine", settings)
    assert "one" in shown and "two" in shown and "on mine" in shown
    labels = [[answer.label for answer in views.example_answers(number, settings)] for number in range(2)]
    differ = sum(one != other for one, other in zip(*labels, strict=True))
    assert f"They disagree on {differ} of 4 examples" in shown and shown.count('class="differs"') == differ


def test_one_model_has_nothing_to_compare_with(views: Views) -> None:
    alone = Views(views.models[:1], views.folders[:1], views.examples)
    assert "hf-dropkey demo one ANOTHER" in alone.compare(noise(), "mine", views.models[0].settings)


def test_kept_predictions_are_few(views: Views) -> None:
    for seed in range(20):
        views.example_answers(0, Settings(0.2, "score", seed))
    assert len(views._kept) <= 16
