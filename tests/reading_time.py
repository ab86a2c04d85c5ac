"""How many minutes a notebook takes a reader: what the README's table says.

    python tests/reading_time.py

A minute for 150 words of prose, for 15 lines of code, its own or the package's that it shows, and
for a picture.
"""

import json
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def minutes(path: Path) -> float:
    words = lines = pictures = 0
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
            continue
        lines += _lines(source)
        for data in (output.get("data", {}) for output in cell["outputs"]):
            pictures += "image/png" in data
            lines += _lines("".join(data.get("text/markdown", "")))  # what course.show has shown
    return words / 150 + lines / 15 + pictures


def rounded(path: Path) -> int:
    """To five minutes."""
    return 5 * round(minutes(path) / 5)


def _lines(code):
    return sum(bool(line.strip()) for line in code.splitlines())


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"{rounded(path):4} minutes  {path.stem}")
