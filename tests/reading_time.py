"""How many minutes a notebook takes a learner: what the README's table and its first cell say.

    python tests/reading_time.py

An estimate: a minute for 200 words of prose and for 25 lines of code, its own or the package's that
it shows; 45 seconds for a picture; four minutes for an exercise in code, two for lines to be put
into order, and two for the questions.
"""

import json
import re
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def minutes(path: Path) -> float:
    words = lines = pictures = 0
    code = ""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
            continue
        code += source
        lines += _lines(source)
        for data in (output.get("data", {}) for output in cell["outputs"]):
            pictures += "image/png" in data
            lines += _lines("".join(data.get("text/markdown", "")))  # what course.show has shown
    exercises = len(re.findall(r'check\("\d+\.\d', code))
    orderings = len(re.findall(r'check\("\d+\.p', code))
    return words / 200 + lines / 25 + 0.75 * pictures + 4 * exercises + 2 * orderings + 2


def rounded(path: Path) -> int:
    """To five minutes."""
    return 5 * round(minutes(path) / 5)


def _lines(code):
    return sum(bool(line.strip()) for line in code.splitlines())


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(f"{rounded(path):4} minutes  {path.stem}")
