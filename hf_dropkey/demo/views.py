"""The tabs of a classifier's page as HTML: what a visitor's image and settings give. Nothing here knows gradio."""

import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from . import drawing
from .answers import Answer, Classifier, Settings, by_uncertainty
from .examples import Example
from .sentences import answer_sentence, disagreements, rank_note, short_answer, training_command, votes


# settings whose examples are kept; a visitor who draws the slider would otherwise fill the memory
MOST_KEPT = 16
NATS = "Ordered by how far the masks disagree: mutual information of prediction and mask, in nats."
ALIKE = "Both models with the ratio and the pattern that are chosen below."


class Views:
    """One or two opened models and the example images.

    Visitors share it, and nothing of theirs is kept in it: a view depends on its arguments alone. The predictions of the
    examples, which are the same for everybody, are kept.

    Attributes:
        models: One classifier, or two to compare.
        folders: Their folders.
        examples: At least one.
    """

    def __init__(self, models: Sequence[Classifier], folders: Sequence[Path], examples: Sequence[Example]):
        self.models, self.folders, self.examples = tuple(models), tuple(folders), tuple(examples)
        self._kept: dict[tuple[int, Settings], list[Answer]] = {}
        self._lock = threading.Lock()

    def about(self) -> str:
        """What the page shows, in one sentence."""
        model = self.models[0]
        own = model.settings
        if not model.has_dropkey:
            return f"{model.name}, trained without DropKey: the ratio {own.ratio:g} is a guess, change it below."
        return f"{model.name}, trained with DropKey at the ratio {own.ratio:g}, pattern {own.pattern}."

    def see(self, image: Image.Image, name: str, settings: Settings) -> tuple[str, str, dict[str, Any]]:
        """The first tab, the dots of the second, and the numbers of both."""
        model = self.models[0]
        answer = model.answer(image, settings)
        rank = model.rank(answer)
        split = model.measured.split if model.measured is not None else "test"
        words = answer_sentence(answer, rank, split)
        numbers = {
            "sentence": words,
            "label": answer.label,
            "probability": round(float(answer.probabilities[answer.best]), 6),
            "std": round(float(answer.std[answer.best]), 6),
            "mutual_information_nats": round(answer.mutual_information, 6),
            "rank": rank,
            "ratio": settings.ratio,
            "pattern": settings.pattern,
            "seed": settings.seed,
        }
        seen = drawing.see(answer, words, image=name, remark=rank_note(model, answer))
        return seen, self._dots(answer, words), numbers

    def _dots(self, answer: Answer, words: str) -> str:
        parts = [drawing.sentence(words), drawing.note(votes(answer))]
        parts += [drawing.heading("Probability of the likeliest classes, a dot for each mask"), drawing.dots(answer)]
        return drawing.block(*parts)

    def uncertain(self, settings: Settings) -> str:
        """The example images from the most to the least uncertain."""
        answers = self.example_answers(0, settings)
        items = []
        for place in by_uncertainty(answers):
            one = answers[place]
            lines = (short_answer(one), f"{one.mutual_information:.3f} nats")
            items.append((one.seen, lines, False))
        return drawing.block(
            drawing.heading("The examples, the most uncertain first"), drawing.note(NATS), drawing.cards(items)
        )

    def compare(self, image: Image.Image, name: str, settings: Settings) -> str:
        """Both models on one image, and the examples on which they differ."""
        if len(self.models) < 2:
            return drawing.block(
                drawing.note("Open two checkpoints to compare them:"),
                f"<pre>hf-dropkey demo {self.models[0].name} ANOTHER</pre>",
            )
        shown = []
        for model in self.models:
            answer = model.answer(image, settings)
            words = (model.name, answer_sentence(answer, model.rank(answer)))
            drawn = answer.seen if answer.rollout is None else drawing.over_image(answer.seen, answer.rollout)
            shown.append(drawing.captioned(drawing.picture(drawn, f"{model.name} on {name}"), *words))
        answers = [self.example_answers(number, settings) for number in range(2)]
        differ = disagreements(answers)
        head = f"They disagree on {len(differ)} of {len(self.examples)} examples"
        order = differ + [place for place in range(len(self.examples)) if place not in differ]
        items = []
        for place in order:
            lines = [
                f"{model.name}: {short_answer(found[place])}"
                for model, found in zip(self.models, answers, strict=True)
            ]
            items.append((answers[0][place].seen, lines, place in differ))
        return drawing.block(
            '<div class="pair">', *shown, "</div>", drawing.note(ALIKE), drawing.heading(head), drawing.cards(items)
        )

    def training(self) -> str:
        """How the model was trained, or one like it is."""
        parts = [drawing.note("Install the package and train:"), "<pre>pip install 'hf_dropkey[train]'"]
        parts += [f"\n{escape(training_command(folder))}" for folder in self.folders]
        parts += ["</pre>", drawing.note("DropKey on a model of your own, in your own training loop:")]
        own = self.models[0].settings
        parts += [
            "<pre>from hf_dropkey import apply_dropkey\n\n"
            f"apply_dropkey(model, ratio={own.ratio:g}, pattern=&quot;{own.pattern}&quot;)</pre>",
            drawing.note("Without data at hand: hf-dropkey train recipe:digits_vit takes about a minute on a CPU."),
        ]
        return drawing.block(*parts)

    def example_answers(self, number: int, settings: Settings) -> list[Answer]:
        """The predictions of a model for all examples."""
        key = number, settings
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = [self.models[number].prediction(example.image, settings) for example in self.examples]
            with self._lock:
                while len(self._kept) >= MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = found
        return found
