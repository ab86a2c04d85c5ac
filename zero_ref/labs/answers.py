"""The answers in a notebook: its cells are run, and the kernel is asked for what they check.

An exercise is known by the name in the call alone, `check("4.2", Stage1)`. No code of the learner's
runs in this process, only in the kernel, which sends texts, among them the answers as pickled
bytes. Nobody but a rank reads these.
"""

import ast
import base64
import json
import math
import pickle
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ranks import travel
from . import judge
from .exercises import EXERCISES
from .keep import PIECES
from .ordering import ORDERINGS
from .quiz import QUESTIONS

NAMES = [*EXERCISES, *ORDERINGS, *QUESTIONS]
LARGEST = 50_000_000  # bytes of a file that is read


@dataclass(frozen=True, repr=False)
class Packed:
    """An answer: bytes here, and on a rank what they stand for."""

    pickled: bytes

    def __reduce__(self):
        return pickle.loads, (self.pickled,)

    def __repr__(self):
        return "an object of the notebook"

    def __call__(self, *_: Any) -> None:  # `check` wants something that can be called
        raise TypeError("an answer is called on ranks only")


Answers = dict[str, list[Any]]  # by name, in the order of the calls: Packed, or plain data

# ---- what is in a file ---------------------------------------------------------------------------


def cells_of(path: Path) -> list[str]:
    """The code cells of a notebook, of which only kind and source count. Of a my_zero.py: the file,
    and a check of each piece that it defines. Raises ValueError if it is neither."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST:,} bytes")
        if path.suffix == ".py":
            return _with_checks(path.read_text())
        cells = json.loads(path.read_bytes())["cells"]
        sources = [cell.get("source") for cell in cells
                   if isinstance(cell, dict) and cell.get("cell_type") == "code"]
        return ["".join(map(str, source)) if isinstance(source, list) else str(source or "")
                for source in sources]
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError) as error:
        kind = "Python" if path.suffix == ".py" else "notebook"
        raise ValueError(f"{path.name} is no {kind}: {travel.said(error)}") from None


def _with_checks(text):
    defined = {getattr(node, "name", None) for node in ast.parse(text).body}
    return [text, "from zero_ref.labs import check",
            *(f'check("{name}", {piece})' for piece, names in PIECES.items() if piece in defined
              for name in names)]


def names_asked(path: Path) -> list[str]:
    """What the course's notebook of the same number asks for. The number is that of most of the
    names in it, or else the file's."""
    text = path.read_text(errors="replace")
    found = [name.split(".")[0] for name in NAMES
             if re.search(rf"""["']{re.escape(name)}\\?["']""", text)]
    found = found or re.findall(r"^0*(\d+)_", path.name)
    number = Counter(found).most_common(1)[0][0] if found else None
    return [name for name in NAMES if name.split(".")[0] == number]


def checks_in(source: str) -> list[str]:
    """For each check that a cell calls, an expression for the kernel: a list of (name, answer). If
    a loop is around the call, it has a pair for each round."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return list(_checks(ast.parse(TransformerManager().transform_cell(source)), []))
    except Exception:  # the kernel, too, will say that this is no Python
        return []


def _checks(node, loops):
    if isinstance(node, ast.For):
        loops = [*loops, ast.comprehension(node.target, node.iter, [], 0)]
    loops = [*loops, *getattr(node, "generators", [])]
    if isinstance(node, ast.Call) and re.fullmatch(r"([\w.]+\.)?check", ast.unparse(node.func)):
        pair = ast.Tuple([*node.args, *(keyword.value for keyword in node.keywords)])
        yield ast.unparse(ast.ListComp(pair, loops) if loops else ast.List([pair]))
    for child in ast.iter_child_nodes(node):
        yield from _checks(child, loops)


# ---- what the kernel says ------------------------------------------------------------------------


def begin() -> None:
    """Called in the kernel: `check` answers at once, since what it would say is found out later, on
    other ranks."""
    judge._check = lambda name, answer: judge.Verdict(True, f"{name} is judged afterwards.")


def tell(pairs: Iterable[tuple[str, Any]]) -> None:
    """Called in the kernel: print the answers as JSON, pickled unless they are plain."""
    for name, answer in pairs:
        told = {"name": name}
        try:
            json.dumps(answer)
            told["plain"] = answer
        except (TypeError, ValueError):
            with judge._as_it_is_now(answer):
                told["pickled"] = base64.b64encode(travel.dumps(answer)).decode()
        print(json.dumps(told))


def _told(text: str) -> Iterator[tuple[str, Any]]:
    """Read what `tell` has printed, and skip all that it has not."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
            answer = (Packed(base64.b64decode(found["pickled"])) if "pickled" in found else
                      found["plain"])
            yield str(found["name"]).strip(), answer
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


def run(cells: list[str], folder: Path, seconds: float) -> tuple[Answers, list[str]]:
    """Run a notebook's cells. Returns the answers, and which cells failed.

    A cell that takes a quarter of the time is interrupted, and the next one runs. What has missed a
    name runs once more at the end: cells may have changed places.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError
    from nbformat.v4 import new_code_cell, new_notebook

    from .kernels import ForkedKernel

    answers: Answers = defaultdict(list)
    limit = math.ceil(seconds / 4)
    client = NotebookClient(new_notebook(), kernel_name="python3", allow_errors=True,
                            interrupt_on_timeout=True, shutdown_kernel="immediate")

    def execute(source: str) -> tuple[str, str]:
        """What a cell prints, and its error."""
        client.nb.cells.append(new_code_cell(source))
        start = time.monotonic()
        outputs = client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1).outputs
        errors = [f"{out.ename}: {out.evalue}" for out in outputs if out.output_type == "error"]
        if errors and time.monotonic() - start >= limit:
            errors = [f"was interrupted after {limit} s"]
        return ("".join(out.text for out in outputs if out.output_type == "stream"),
                errors[0].splitlines()[0][:200].strip(" :") if errors else "")

    this = f"__import__({__name__!r}, fromlist=['tell'])"

    def run_cell(source: str) -> str:
        """Run a cell, and ask for what it checks. Returns its error."""
        _, error = execute(source)
        for pairs in checks_in(source):
            printed, missing = execute(f"{this}.tell({pairs})")
            for name, answer in _told(printed):
                answers[name].append(answer)
            error = error or missing
        return error

    manager = client.create_kernel_manager()
    manager.provisioner = ForkedKernel(kernel_spec=manager.kernel_spec, parent=manager)
    failed: dict[str, str] = {}
    with client.setup_kernel(cwd=str(folder)):
        execute(f"{this}.begin()")
        client.timeout_func = lambda cell: limit
        kernel: Any = client.km
        end = threading.Timer(seconds, kernel.provisioner.process.kill)
        end.start()
        try:
            for number, source in enumerate(cells, 1):
                failed[f"cell {number}"] = run_cell(source)
            for number, source in enumerate(cells, 1):
                if failed[f"cell {number}"].startswith("NameError"):
                    failed[f"cell {number}"] = run_cell(source)
        except DeadKernelError:
            failed["the kernel"] = ("ended by itself" if end.is_alive() else
                                    f"was ended after {seconds:g} s")
        except Exception as error:  # the kernel says what no kernel says
            failed["the kernel"] = travel.said(error)
        end.cancel()
    return answers, [f"{where}: {error}" for where, error in failed.items() if error]
