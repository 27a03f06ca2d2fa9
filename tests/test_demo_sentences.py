"""Answers in words."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_dropkey.demo.answers import Answer, Settings
from hf_dropkey.demo.sentences import answer_sentence, disagreements, short_answer, training_command, votes
from hf_dropkey.hub.cards import RunFacts


NAMES = ("daisy", "rose", "tulip")


def answer(*rows: tuple[float, float, float]) -> Answer:
    by_mask = np.array(rows)
    std = by_mask.std(0, ddof=1) if len(rows) > 1 else np.zeros(3)
    settings = Settings(0.1 if len(rows) > 1 else 0.0, "score")
    return Answer(settings, NAMES, by_mask, by_mask.mean(0), std, 0.0, None, (), None, Image.new("RGB", (4, 4)))


SURE = [(0.9, 0.1, 0.0)] * 10 + [(0.7, 0.3, 0.0)] * 10
SPLIT = [(0.8, 0.2, 0.0)] * 15 + [(0.1, 0.9, 0.0)] * 4 + [(0.1, 0.2, 0.7)]


def test_the_sentence_of_the_first_view() -> None:
    assert (
        answer_sentence(answer(*SURE), 0.9)
        == "daisy, 80 % ± 10 over 20 masks; more uncertain than 90 % of the test images"
    )
    assert answer_sentence(answer(*SURE), 0.25, "validation").endswith(
        "; less uncertain than 75 % of the validation images"
    )


def test_the_clause_is_left_out_without_numbers() -> None:
    assert answer_sentence(answer(*SURE), None) == "daisy, 80 % ± 10 over 20 masks"
    assert short_answer(answer(*SURE)) == "daisy, 80 % ± 10"


def test_without_masks_there_is_no_spread() -> None:
    assert (
        answer_sentence(answer((0.999, 0.001, 0.0)), None)
        == "daisy, over 99 %, without a mask: at the ratio 0 no key is dropped"
    )
    assert short_answer(answer((0.5, 0.3, 0.2))) == "daisy, 50 %"
    assert "no masks" in votes(answer((0.5, 0.3, 0.2)))


def test_votes_are_counted() -> None:
    assert votes(answer(*SURE)) == "All 20 masks say daisy."
    assert votes(answer(*SPLIT)) == "15 of 20 masks say daisy, 4 say rose, 1 say tulip."


def test_the_surest_disagreement_comes_first() -> None:
    daisy, rose = answer((0.9, 0.1, 0.0)), answer((0.2, 0.8, 0.0))
    weak = answer((0.4, 0.5, 0.1))
    assert disagreements([[daisy, daisy, daisy], [daisy, weak, rose]]) == [2, 1]
    assert disagreements([[rose], [weak]]) == []


def test_the_command_is_that_of_the_run(tmp_path: Path) -> None:
    assert "--dropkey_ratio 0.1" in training_command(tmp_path) and tmp_path.name in training_command(tmp_path)
    assert str(tmp_path) not in training_command(tmp_path)
    RunFacts(command="hf-dropkey train mine.json").save(tmp_path)
    assert training_command(tmp_path) == "hf-dropkey train mine.json"


@pytest.mark.parametrize("rank", [0.0, 0.5, 1.0])
def test_percent_signs_have_a_space(rank: float) -> None:
    assert "%" in answer_sentence(answer(*SURE), rank) and "% of" in answer_sentence(answer(*SURE), rank)
    assert "0%" not in answer_sentence(answer(*SURE), rank)
