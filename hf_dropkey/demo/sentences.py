"""Answers in words."""

from collections.abc import Sequence
from pathlib import Path

from ..hub.cards import RunFacts
from ..saved import read_json
from .answers import Answer, Classifier


def answer_sentence(answer: Answer, rank: float | None, split: str = "test") -> str:
    """What the model says and how sure it is: "daisy, 93 % ± 14 over 20 masks; more uncertain than 90 % of the test images".

    Args:
        answer: Of one image.
        rank: The fraction of evaluation images that are less uncertain; None leaves the clause out.
        split: Name of their split.
    """
    sure = f"{answer.label}, {_percent(answer.probabilities[answer.best])}"
    masks = len(answer.by_mask)
    if masks == 1:
        return f"{sure}, without a mask: at the ratio 0 no key is dropped"
    spread = f"{sure} ± {100 * answer.std[answer.best]:.0f} over {masks} masks"
    return spread if rank is None else f"{spread}; {_rank_clause(rank, split)}"


def rank_note(model: Classifier, answer: Answer) -> str | None:
    """Why an answer has no rank among evaluation images, and how it gets one; None where it has one, or cannot."""
    if len(answer.by_mask) == 1 or not model.has_dropkey or model.rank(answer) is not None:
        return None
    own = model.settings
    if model.measured is not None and (answer.settings.ratio, answer.settings.pattern) != (own.ratio, own.pattern):
        return f"It is compared with evaluation images at the model's own ratio {own.ratio:g} and pattern {own.pattern} only."
    return (
        "How this compares with other images was not measured: hf-dropkey evaluate --model_name_or_path "
        f"{model.name} --uncertainty, with evaluation data, does so."
    )


def short_answer(answer: Answer) -> str:
    """The class and its probability: "daisy, 93 % ± 14"."""
    return answer_sentence(answer, None).partition(" over ")[0].partition(", without")[0]


def _rank_clause(rank: float, split: str) -> str:
    # the smaller number says little where most images are alike
    if rank >= 0.5:
        return f"more uncertain than {rank:.0%} of the {split} images".replace("%", " %")
    return f"less uncertain than {1 - rank:.0%} of the {split} images".replace("%", " %")


def _percent(value: float) -> str:
    """A probability; certainty is not claimed where rounding would."""
    if value > 0.995:
        return "over 99 %"
    return f"{100 * value:.0f} %"


def votes(answer: Answer) -> str:
    """How the masks voted: "17 of 20 masks say 8, 3 say 3"."""
    if len(answer.by_mask) == 1:
        return "The ratio is 0: there are no masks that could disagree."
    winners = answer.by_mask.argmax(1).tolist()
    counts = sorted({number: winners.count(number) for number in winners}.items(), key=lambda one: -one[1])
    number, most = counts[0]
    if most == len(winners):
        return f"All {most} masks say {answer.names[number]}."
    others = ", ".join(f"{count} say {answer.names[other]}" for other, count in counts[1:])
    return f"{most} of {len(winners)} masks say {answer.names[number]}, {others}."


def disagreements(answers: Sequence[Sequence[Answer]]) -> list[int]:
    """The places of images on which two models differ, the surest two first.

    Args:
        answers: Of two models, one for each image.
    """
    first, second = answers
    differ = [place for place, (one, other) in enumerate(zip(first, second, strict=True)) if one.label != other.label]
    return sorted(differ, key=lambda place: -min(first[place].probabilities.max(), second[place].probabilities.max()))


def training_command(folder: Path) -> str:
    """The command that trained a model, where its folder has it; else one that trains a model like it."""
    facts = RunFacts.load(folder)
    if facts.command:
        return facts.command
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    ratio = settings.get("dropkey_ratio") or 0.1
    return (
        f"hf-dropkey train --model_name_or_path {folder.resolve().name} --train_dir photos/train --validation_dir "
        f"photos/validation --dropkey_ratio {ratio} --do_train --do_eval --output_dir runs/mine"
    )
