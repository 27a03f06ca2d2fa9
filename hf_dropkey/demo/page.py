"""The page of a classifier: gradio's blocks around `views`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..extras import needed
from ..models.dropkey import PATTERNS
from . import drawing
from .answers import LARGEST_RATIO, Settings
from .examples import Example
from .uploads import read_upload
from .views import Views


SEE, SURE, COMPARE, TRAIN = TABS = ("See", "How sure", "Compare", "Train it yourself")
PATTERN_TEXTS = {
    "score": "single scores (score)",
    "key": "keys of a head (key)",
    "token": "keys of all heads (token)",
    "block": "squares (block)",
    "cross": "crosses (cross)",
}
THUMBNAIL = 160
# of a control in pixels: on a phone each has a row of its own
WIDTH = 240


def page(views: Views, title: str) -> Any:
    """The page, with the first example computed.

    Raises:
        ImportError: gradio is not installed.
    """
    with needed("demo"):
        import gradio
    own, first = views.models[0].settings, views.examples[0]
    seen, dots, numbers = views.see(first.image, first.name, own)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        # of one visitor: the number of an example or the picture that was sent, and the tab that is open
        chosen, tab = gradio.State(0, time_to_live=3600), gradio.State(SEE)
        gradio.HTML(drawing.block(drawing.note(views.about())), elem_id="about")
        with gradio.Tabs(elem_id="tabs"):
            with gradio.Tab(SEE) as see_tab:
                see = gradio.HTML(seen, elem_id="see")
            with gradio.Tab(SURE) as sure_tab:
                sure = gradio.HTML(dots, elem_id="sure")
                uncertain = gradio.HTML("", elem_id="uncertain")
            with gradio.Tab(COMPARE) as compare_tab:
                compare = gradio.HTML("", elem_id="compare")
            with gradio.Tab(TRAIN) as train_tab:
                gradio.HTML(views.training(), elem_id="training")
        remark = gradio.HTML("", elem_id="remark")
        gradio.HTML(drawing.block(drawing.heading("Another picture")))
        gallery = gallery_of(gradio, views.examples)
        # any kind of file, so that a wrong one gets our sentence
        upload = gradio.UploadButton("Send a picture of your own", elem_id="upload")
        with gradio.Row():
            label = "Largest drop ratio"
            ratio = gradio.Slider(
                0, LARGEST_RATIO, own.ratio, step=0.05, label=label, elem_id="ratio", buttons=[], min_width=WIDTH
            )
            choices = [(PATTERN_TEXTS[name], name) for name in PATTERNS]
            pattern = gradio.Dropdown(
                choices,
                value=own.pattern,
                label="Dropped together",
                filterable=False,
                elem_id="pattern",
                min_width=WIDTH,
            )
            # without gradio's own bounds, whose message names no next step
            seed = gradio.Number(0, label="Seed of the masks", precision=0, elem_id="seed", min_width=WIDTH)
        data = gradio.JSON(numbers, visible=False)
        outputs = [chosen, remark, see, sure, data, uncertain, compare]
        settings = [tab, ratio, pattern, seed]
        calls = Calls(views, gradio.skip)
        gradio.on(
            [ratio.change, pattern.change, seed.change],
            calls.changed,
            [chosen, *settings],
            outputs,
            api_name="settings",
            trigger_mode="always_last",
            show_progress_on=[see, sure],
        )
        selected = _selecting(calls, gradio.SelectData)
        gallery.select(selected, settings, outputs, api_visibility="private", show_progress_on=[see, sure])
        upload.upload(calls.sent, [upload, *settings], outputs, api_name="picture", show_progress_on=[see, sure])
        for name, entry in zip(TABS, (see_tab, sure_tab, compare_tab, train_tab), strict=True):
            entry.select(calls.opening(name), [chosen, *settings[1:]], [tab, *outputs], api_visibility="private")
    return blocks


def _selecting(calls: "Calls", event_class: type) -> Callable[..., Any]:
    """The call of a click on an example, with the annotation that gradio reads to pass the event."""

    def selected(tab: str, ratio: float, pattern: str, seed: float, event: Any) -> list[Any]:
        return calls.example(int(event.index), tab, ratio, pattern, seed)

    selected.__annotations__["event"] = event_class
    return selected


def gallery_of(gradio: Any, examples: Sequence[Example]) -> Any:
    """The examples to choose from, inside gradio's blocks."""
    return gradio.Gallery(
        [drawing.enlarged(example.image, THUMBNAIL) for example in examples],
        label="Examples",
        show_label=False,
        height="auto",
        allow_preview=False,
        interactive=False,
        object_fit="contain",
        buttons=[],
        format="png",
        elem_id="examples",
    )


@dataclass(frozen=True)
class Calls:
    """What the page calls, with a visitor's values in the arguments; a mistake becomes a sentence on the page.

    Attributes:
        views: Models and examples.
        skip: Makes the value that leaves an output as it is.
    """

    views: Views
    skip: Callable[[], Any]

    def changed(self, chosen: Any, tab: str, ratio: float, pattern: str, seed: float | None) -> list[Any]:
        """Another setting: the same picture again."""
        return self._outputs(chosen, "", tab, ratio, pattern, seed)

    def example(self, number: int, tab: str, ratio: float, pattern: str, seed: float | None) -> list[Any]:
        """A click on an example."""
        return self._outputs(number, "", tab, ratio, pattern, seed)

    def sent(self, file: str, tab: str, ratio: float, pattern: str, seed: float | None) -> list[Any]:
        """A picture was sent; one that cannot be used leaves everything but the remark as it is."""
        try:
            found = read_upload(str(file))
        except ValueError as error:
            return self._problem(error)
        remarks = drawing.message(" ".join(found.remarks), problem=False)
        return self._outputs(found.image, remarks, tab, ratio, pattern, seed)

    def opening(self, tab: str) -> Callable[..., list[Any]]:
        """The call of a click on a tab, which computes what only that tab shows."""

        def opened(chosen: Any, ratio: float, pattern: str, seed: float | None) -> list[Any]:
            nothing = [self.skip() for _ in range(5)]
            try:
                return [tab, *nothing, *self._of_tab(chosen, tab, _settings(ratio, pattern, seed))]
            except ValueError as error:
                return [tab, *self._problem(error)]

        return opened

    def _outputs(
        self, chosen: Any, remark: str, tab: str, ratio: float, pattern: str, seed: float | None
    ) -> list[Any]:
        try:
            settings = _settings(ratio, pattern, seed)
            image, name = self._picture(chosen)
            seen, dots, numbers = self.views.see(image, name, settings)
            return [chosen, remark, seen, dots, numbers, *self._of_tab(chosen, tab, settings)]
        except ValueError as error:
            return self._problem(error)

    def _of_tab(self, chosen: Any, tab: str, settings: Settings) -> list[Any]:
        """The outputs that cost more and are computed for the open tab alone."""
        uncertain = self.views.uncertain(settings) if tab == SURE else self.skip()
        compared = self.views.compare(*self._picture(chosen), settings) if tab == COMPARE else self.skip()
        return [uncertain, compared]

    def _picture(self, chosen: Any) -> tuple[Image.Image, str]:
        if isinstance(chosen, Image.Image):
            return chosen, "your picture"
        example = self.views.examples[int(chosen) % len(self.views.examples)]
        return example.image, example.name

    def _problem(self, error: ValueError) -> list[Any]:
        return [self.skip(), drawing.message(str(error), problem=True), *(self.skip() for _ in range(5))]


def _settings(ratio: float, pattern: str, seed: float | None) -> Settings:
    if seed is None:
        raise ValueError("The seed of the masks is empty. Write a whole number such as 0.")
    return Settings(round(float(ratio), 6), pattern, int(seed))
