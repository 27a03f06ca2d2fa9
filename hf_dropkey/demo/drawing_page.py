"""The page of a model that is drawn (`drawers`): gradio's blocks."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..extras import needed
from . import drawing
from .drawers import Drawer
from .examples import Example
from .page import gallery_of
from .sentences import training_command
from .uploads import read_upload


def drawing_page(drawer: Drawer, examples: Sequence[Example], folder: Path, title: str) -> Any:
    """The page, with the first example computed.

    Raises:
        ImportError: gradio is not installed.
    """
    with needed("demo"):
        import gradio
    calls = DrawingCalls(drawer, examples, gradio.skip)
    # nothing is done with it where there are no scores
    start = 0.0 if drawer.threshold is None else drawer.threshold
    first, numbers = calls.shown(examples[0].image, start)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        chosen = gradio.State(0, time_to_live=3600)
        with gradio.Tabs(elem_id="tabs"):
            with gradio.Tab("See"):
                see = gradio.HTML(first, elem_id="see")
            with gradio.Tab("Train it yourself"):
                command = f"<pre>{escape(training_command(folder))}</pre>"
                gradio.HTML(drawing.block(drawing.note("The command of this model, or one like it:"), command))
        remark = gradio.HTML("", elem_id="remark")
        gradio.HTML(drawing.block(drawing.heading("Another picture")))
        gallery = gallery_of(gradio, examples)
        upload = gradio.UploadButton("Send a picture of your own", elem_id="upload")
        threshold = gradio.Slider(
            0.0,
            1.0,
            start,
            step=0.05,
            label="Smallest score",
            elem_id="threshold",
            buttons=[],
            visible=drawer.threshold is not None,
        )
        data = gradio.JSON(numbers, visible=False)
        outputs = [chosen, remark, see, data]
        threshold.change(
            calls.changed,
            [chosen, threshold],
            outputs,
            api_name="settings",
            trigger_mode="always_last",
            show_progress_on=see,
        )
        gallery.select(
            calls.selecting(gradio.SelectData), [threshold], outputs, api_visibility="private", show_progress_on=see
        )
        upload.upload(calls.sent, [upload, threshold], outputs, api_name="picture", show_progress_on=see)
    return blocks


class DrawingCalls:
    """What the page calls, with a visitor's values in the arguments; a mistake becomes a sentence on the page."""

    def __init__(self, drawer: Drawer, examples: Sequence[Example], skip: Callable[[], Any]):
        self.drawer, self.examples, self.skip = drawer, examples, skip

    def shown(self, image: Image.Image, threshold: float) -> tuple[str, dict[str, Any]]:
        """The answer as HTML and as values."""
        found = self.drawer.draw(image, threshold)
        parts = [drawing.captioned(drawing.picture(one, words), words) for one, words in found.pictures]
        kind = "pair" if len(parts) > 1 else "alone"
        whole = drawing.block(drawing.sentence(found.sentence), f'<div class="{kind}">', *parts, "</div>")
        return whole, {"sentence": found.sentence, "found": list(found.found)}

    def changed(self, chosen: Any, threshold: float) -> list[Any]:
        """Another threshold: the same picture again."""
        return self._outputs(chosen, "", threshold)

    def selecting(self, event_class: type) -> Callable[..., list[Any]]:
        """The call of a click on an example, with the annotation that gradio reads to pass the event."""

        def selected(threshold: float, event: Any) -> list[Any]:
            return self._outputs(int(event.index), "", threshold)

        selected.__annotations__["event"] = event_class
        return selected

    def sent(self, file: str, threshold: float) -> list[Any]:
        """A picture was sent; one that cannot be used leaves everything but the remark as it is."""
        try:
            found = read_upload(str(file))
        except ValueError as error:
            return self._problem(error)
        remarks = drawing.message(" ".join(found.remarks), problem=False)
        return self._outputs(found.image, remarks, threshold)

    def _outputs(self, chosen: Any, remark: str, threshold: float) -> list[Any]:
        image = chosen if isinstance(chosen, Image.Image) else self.examples[int(chosen) % len(self.examples)].image
        try:
            return [chosen, remark, *self.shown(image, float(threshold))]
        except ValueError as error:
            return self._problem(error)

    def _problem(self, error: ValueError) -> list[Any]:
        return [self.skip(), drawing.message(str(error), problem=True), self.skip(), self.skip()]
