"""One page to print: what each stage keeps and sends, and in which order.

    python -m zero_ref.viz.cheatsheet figures
"""

import argparse
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..observe.memory import model_states
from .palette import COMMUNICATION, INK, KINDS, PADDING, PAPER
from .picture import Picture

_GPUS, _PARAMETERS = 64, 7.5e9  # figure 1 of the paper
_MIXED = {"param_dtype": torch.float16, "grad_dtype": torch.float16,
          "optimizer_dtypes": (torch.float32,) * 3}

# By stage: what is new, bytes per rank with the paper's mixed-precision Adam, and what is sent.
STAGES = [
    ("0  data parallelism", "every rank keeps everything", "16Ψ", "2Ψ"),
    ("1  shards optimizer states", "a rank updates its shard alone", "4Ψ + 12Ψ/N", "2Ψ"),
    ("2  and gradients", "full gradients live while a unit fills", "2Ψ + 14Ψ/N", "2Ψ"),
    ("3  and parameters", "a unit is there while it computes", "16Ψ/N", "3Ψ"),
]
STEPS = [
    ("0", "forward", "backward, all_reduce of each unit", "step"),
    ("1", "forward", "backward, reduce_scatter of each unit", "step, all_gather of each unit"),
    ("2", "forward", "backward, reduce_scatter of each unit and free", "step, all_gather"),
    ("3", "all_gather, forward, free", "all_gather, backward, reduce_scatter, free", "step"),
]
WORDS = [
    ("Ψ, N", "the number of parameters, and of ranks (world_size)"),
    ("16 bytes", "2 of a parameter, 2 of its gradient, 12 of optimizer states: master, exp_avg and "
     "exp_avg_sq in fp32"),
    ("unit", "what is gathered, reduced and freed together: usually one layer, as a flat buffer"),
    ("shard", "the slice of a flat buffer that a rank owns; padding makes all slices equal"),
    ("reduce_scatter", "each rank gets the sum of its slice: sends Ψ·(N-1)/N elements"),
    ("all_gather", "each rank gets all slices: sends Ψ·(N-1)/N elements"),
    ("all_reduce", "a reduce_scatter, then an all_gather: sends 2Ψ·(N-1)/N elements"),
    ("model states", "parameters, gradients and optimizer states; the peak of a step has "
     "activations and units in flight as well"),
    ("same bits", "all stages compute the same sums in the same order, so their weights are equal "
     "bit for bit"),
    ("zero_ref.wrap", "model = zero_ref.wrap(module, stage); the optimizer gets "
     "model.parameters()"),
    ("zero_ref.launch", "zero_ref.launch(train, 4, stage) runs train(stage) on 4 ranks"),
]


def draw() -> Figure:
    """An A4 page, landscape."""
    figure = Figure(figsize=(11.69, 8.27), dpi=150)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 117), ylim=(82.7, 0))
    ax.axis("off")

    def say(x, y, text, size=10, **style):
        ax.text(x, y, text, fontsize=size, va="center", color=INK, **style)

    def heading(y, text):
        say(5, y, text, 12, weight="bold")
        ax.plot([5, 112], [y + 2.2] * 2, color=PADDING, linewidth=0.8)

    say(5, 5, "ZeRO on one page", 18, weight="bold")
    say(112, 5, "zero_ref", 11, ha="right")
    heading(11, "What a rank keeps, and what it sends per step")
    for x, title in ((5, "stage"), (56, "bytes per rank, fp16 and Adam"),
                     (100, "elements sent, times (N-1)/N")):
        say(x, 15.5, title, 8.5, ha="right" if x == 100 else "left")
    widest = sum(model_states(_PARAMETERS, _GPUS, 0, **_MIXED).values())
    for stage, (name, new, held, sent) in enumerate(STAGES):
        y = 19.2 + 5 * stage
        kept = model_states(_PARAMETERS, _GPUS, stage, **_MIXED)
        say(5, y - 0.9, name, 10.5, weight="bold")
        say(5, y + 1.4, new, 8.5)
        say(38, y, held, 10.5, family="monospace")
        left = 56.0
        for kind, colour in KINDS.items():
            width = kept[kind] / widest * 32
            ax.add_patch(Rectangle((left, y - 1.5), width, 3, facecolor=colour))
            left += width
        say(left + 0.8, y, f"{sum(kept.values()) / 1e9:.1f} GB", 9)
        say(100, y, sent, 10.5, ha="right")
        ax.add_patch(Rectangle((101.5, y - 1.5), 3.4 * int(sent[0]), 3, facecolor=COMMUNICATION))
    for x, (kind, colour) in zip((56, 70, 82), KINDS.items()):
        ax.add_patch(Rectangle((x, 37.2), 1.6, 1.6, facecolor=colour))
        say(x + 2.4, 38, kind, 8.5)
    say(5, 38, f"Bars and GB: Ψ = {_PARAMETERS / 1e9:g}·10⁹ on N = {_GPUS} ranks.", 8.5)

    heading(42, "The order of a step")
    for row, phases in enumerate(STEPS):
        y = 46.4 + 3.4 * row
        ax.add_patch(Rectangle((5, y - 1.6), 107, 3.2, facecolor=PAPER if row % 2 else "white"))
        for x, text in zip((6, 12, 40, 84), phases):
            say(x, y, text, 9.5, weight="bold" if x == 6 else "normal")

    heading(60.8, "Symbols and words")
    for index, (word, meaning) in enumerate(WORDS):
        x, y = (5, 60)[index % 2], 65.2 + 2.8 * (index // 2)
        say(x, y, word, 8, weight="bold")
        say(x + 12, y, textwrap.fill(meaning, 66), 7, linespacing=1.1)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    figure = draw()
    Picture(figure, "ZeRO on one page").save(folder / "cheatsheet.png")
    figure.savefig(folder / "cheatsheet.pdf", metadata={"CreationDate": None})
    print(folder / "cheatsheet.png", folder / "cheatsheet.pdf", sep="\n")


if __name__ == "__main__":
    main()
