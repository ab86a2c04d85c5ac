"""What a notebook shows: a picture with its description, and a slider over pictures."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    import ipywidgets


class Picture:
    """A matplotlib Figure and what it shows in words, for those who do not see it."""

    def __init__(self, figure: Figure, text: str):
        self.figure, self.text = figure, text
        FigureCanvasAgg(figure)

    def png(self) -> bytes:
        self.figure.canvas.draw()
        return encode(self.figure.canvas)

    def save(self, path: Path | str) -> None:
        Path(path).write_bytes(self.png())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return bundle(self.png(), self.text, self.figure.get_figwidth() * 100)


def encode(canvas: FigureCanvasAgg) -> bytes:
    """What a matplotlib canvas shows, as a PNG: flat colours, so that a palette is enough."""
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG")
    return file.getvalue()


def bundle(png: bytes, text: str, width: float) -> tuple[dict, dict]:
    """A picture as a notebook's output. Width: in CSS pixels."""
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": text}
    return data, {"image/png": {"width": round(width), "alt": text}}


def live(controls: Sequence["ipywidgets.Widget"], image: "ipywidgets.Widget",
         still: Callable[[], bytes], text: str, width: float) -> "ipywidgets.VBox":
    """A widget of `controls` above `image`, which a reader without a kernel sees as a picture.

    still: a function that returns the picture's PNG. text: the description. ipywidgets is imported
    here, so that drawing does not need it.
    """
    import ipywidgets

    class Live(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
            data, metadata = bundle(still(), text, width)
            shown = super()._repr_mimebundle_(**kwargs)
            return {**(shown[0] if isinstance(shown, tuple) else shown), **data}, metadata

    return Live([*controls, image])


def slides(draw: Callable[[int], bytes], number: int, text: str, width: float,
           start: int = 0) -> "ipywidgets.VBox":
    """A widget: a slider, also for the arrow keys, and a play button over pictures.

    draw: a function from a position to a PNG. number: of pictures. start: the position of the still
    picture. All pictures are drawn at once and go to the browser, which changes them by itself:
    without waiting for the kernel, and also while that runs a cell.
    """
    import ipywidgets
    from ipywidgets import Layout

    pictures = [draw(position) for position in range(number)]
    wide = Layout(width=f"{round(width)}px")
    stack = ipywidgets.Stack([ipywidgets.Image(value=png, format="png", layout=wide)
                              for png in pictures], selected_index=start)
    slider = ipywidgets.IntSlider(value=start, max=number - 1, description="event",
                                  layout=Layout(width="600px"))
    play = ipywidgets.Play(value=start, max=number - 1, interval=700, show_repeat=False)
    ipywidgets.jslink((play, "value"), (slider, "value"))
    ipywidgets.jslink((slider, "value"), (stack, "selected_index"))
    return live([ipywidgets.HBox([play, slider])], stack, lambda: pictures[start], text, width)
