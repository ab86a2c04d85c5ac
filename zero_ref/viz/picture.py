"""What a notebook shows: a picture with its description, and a slider over pictures."""

import base64
import io

from matplotlib.backends.backend_agg import FigureCanvasAgg


class Picture:
    """A matplotlib Figure and what it shows in words, for those who do not see it."""

    def __init__(self, figure, text):
        self.figure, self.text = figure, text
        FigureCanvasAgg(figure)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        return file.getvalue()

    def save(self, path) -> None:
        self.figure.savefig(path)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return bundle(self.png(), self.text, self.figure.get_figwidth() * 100)


def bundle(png, text, width):
    """A picture as a notebook's output. Width: in CSS pixels."""
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": text}
    return data, {"image/png": {"width": round(width), "alt": text}}


def live(controls, image, still, text, width):
    """A widget of `controls` above `image`, which a reader without a kernel sees as a picture.

    still: a function that returns the picture's PNG. text: the description. ipywidgets is imported
    here, so that drawing does not need it.
    """
    import ipywidgets

    class Live(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs):
            data, metadata = bundle(still(), text, width)
            shown = super()._repr_mimebundle_(**kwargs)
            return {**(shown[0] if isinstance(shown, tuple) else shown), **data}, metadata

    return Live([*controls, image])


def slides(draw, labels, text, width, start=0):
    """A widget: a slider, a play button and the arrow keys over pictures.

    draw: a function from a position to a PNG. labels: what each position is called. start: the
    position of the still picture.
    """
    import ipywidgets
    from ipywidgets import Layout

    drawn = {}

    def picture(position):
        if position not in drawn:
            drawn[position] = draw(position)
        return drawn[position]

    last = len(labels) - 1
    slider = ipywidgets.IntSlider(value=start, max=last, description="event", readout=False,
                                  layout=Layout(width="540px"))
    play = ipywidgets.Play(value=start, max=last, interval=700, show_repeat=False)
    ipywidgets.jslink((play, "value"), (slider, "value"))
    back = ipywidgets.Button(description="◀", tooltip="one event back", layout=Layout(width="40px"))
    on = ipywidgets.Button(description="▶", tooltip="one event on", layout=Layout(width="40px"))
    where = ipywidgets.Label(labels[start])
    image = ipywidgets.Image(value=picture(start), format="png",
                             layout=Layout(width=f"{round(width)}px"))

    def show(change):
        image.value = picture(change["new"])
        where.value = labels[change["new"]]

    slider.observe(show, "value")
    back.on_click(lambda _: setattr(slider, "value", max(0, slider.value - 1)))
    on.on_click(lambda _: setattr(slider, "value", min(last, slider.value + 1)))
    controls = ipywidgets.HBox([play, back, on, slider, where])
    return live([controls], image, lambda: picture(start), text, width)
