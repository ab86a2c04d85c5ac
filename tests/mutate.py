"""A mutation check: change one operator of the engine at a time, and see whether a test fails.

    python tests/mutate.py --baseline                      the unchanged copy has to pass
    python tests/mutate.py --files zero_ref/stage1.py --every 5 --json mutants.jsonl
    python tests/mutate.py --only stage1.py:52:12 --show   what a mutant is; without --show, run it

Each mutant is a copy of the package and the tests in a temporary directory. If one test of it takes
too long, it counts as caught. With --json, results are kept in a file of one JSON object per line,
and what is in it already is not run again, unless --only or --survivors asks for it. Not a test
itself, and not part of `make test`.
"""

import argparse
import ast
import difflib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = [f"zero_ref/{name}.py" for name in (
    "comm", "partition", "stage0", "stage1", "stage2", "stage3")]
ENGINE += sorted(f"zero_ref/engine/{file.name}" for file in (ROOT / "zero_ref/engine").glob("*.py"))
FIRST = [f"tests/test_{name}.py" for name in (
    "arithmetic", "same_bits", "state_dict", "bytes", "bad_input")]
APART = {f"tests/test_{name}.py" for name in (
    "bench", "cli", "readme", "data", "launch", "huggingface", "gpu")}  # not about the engine

SWAPS = {
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}

# Runs on the unchanged copy, before anything else.
PROBE = """
import sys
import zero_ref

def test_where():
    files = [zero_ref.__file__, sys.modules["zero_ref.comm"].__file__]
    on_ranks = zero_ref.launch(lambda: (zero_ref.__file__, zero_ref.comm.__file__), 2)
    for file in (*files, *on_ranks[0], *on_ranks[1]):
        assert file.startswith({tree!r}), file
"""


@dataclass(frozen=True)
class Mutant:
    """text[start:end] becomes `new`. The number of lines stays."""

    file: str
    line: int
    column: int
    change: str
    source: str  # the line where it is
    again: int  # how many like it come before it in this file
    start: int
    end: int
    new: str
    gpu: bool

    @property
    def id(self):
        return f"{Path(self.file).name}:{self.line}:{self.column}"

    @property
    def key(self):
        """Stays the same when lines are added above it."""
        return f"{self.file} {self.change} #{self.again} in {self.source}"

    def apply(self, text):
        return text[: self.start] + self.new + text[self.end :]


@dataclass(frozen=True)
class Result:
    passed: bool
    seconds: float
    by: str  # the test that failed
    why: str
    output: str


class Finder:
    """Collects the mutants of one file. `ast` says what is an operator, the tokens where it is."""

    def __init__(self, file, text):
        self.file, self.text, self.found = file, text, []
        self.lines = text.splitlines(keepends=True)
        self.offsets = [0, *accumulate(map(len, self.lines))]
        self.tokens = [(self.offsets[t.start[0] - 1] + t.start[1], t.string)
                       for t in tokenize.generate_tokens(io.StringIO(text).readline)
                       if t.type in (tokenize.OP, tokenize.NAME)]
        self.visit(ast.parse(text))
        self.found.sort(key=lambda mutant: mutant.start)

    def place(self, line, column):
        """ast counts columns in bytes of UTF-8."""
        return self.offsets[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def start(self, node):
        return self.place(node.lineno, node.col_offset)

    def end(self, node):
        return self.place(node.end_lineno, node.end_col_offset)

    def add(self, start, end, new, change):
        line = self.text.count("\n", 0, start) + 1
        new += "\n" * self.text.count("\n", start, end)
        source = self.lines[line - 1].strip()
        again = sum((m.change, m.source) == (change, source) for m in self.found)
        self.found.append(Mutant(self.file, line, start - self.offsets[line - 1], change, source,
                                 again, start, end, new, self.gpu))

    def swap(self, operator, left, right, assigns=""):
        if type(operator) in SWAPS:
            old, new = (s + assigns for s in SWAPS[type(operator)])
            words = old.split()
            spans = [(at, at + len(word)) for at, word in self.tokens
                     if self.end(left) <= at < self.start(right) and word in words]
            self.add(spans[0][0], spans[len(words) - 1][1], new, f"{old} -> {new}")

    def visit(self, node, gpu=False):
        if isinstance(node, ast.Raise | ast.JoinedStr):  # messages
            return
        self.gpu = gpu
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                return
            case ast.Compare(left, operators, others):
                for before, operator, after in zip([left, *others], operators, others):
                    self.swap(operator, before, after)
            case ast.BinOp(left, operator, right):
                self.swap(operator, left, right)
            case ast.AugAssign(target, operator, value):
                self.swap(operator, target, value, "=")
            case ast.BoolOp(operator, values):
                for left, right in pairwise(values):
                    self.swap(operator, left, right)
            case ast.UnaryOp(ast.Not()):
                words = re.match(r"not *", self.text[self.start(node) :])[0]
                self.add(self.start(node), self.start(node) + len(words), "", "not x -> x")
            case ast.Constant(bool(value) | int(value)):
                new = not value if type(value) is bool else 0 if value == 1 else value + 1
                self.add(self.start(node), self.end(node), str(new), f"{value} -> {new}")
            case ast.Expr(ast.Call(called)):
                called = re.sub(r"\(.*\)", "(…)", ast.unparse(called))
                self.add(self.start(node), self.end(node), "pass", f"{called}(…) -> pass")
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                inside = gpu or (field == "body" and needs_gpu(node))
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child, inside)


def needs_gpu(node):
    """Whether the body does nothing without a GPU: an `if …nccl…:` or an `if …stream…:`."""
    return isinstance(node, ast.If) and any(word in ast.unparse(node.test)
                                            for word in ("nccl", "stream"))


class Runner:
    """Runs pytest in copies of the package, each run in a process group that ends with it."""

    def __init__(self, tests, test_limit, deadline):
        self.tests, self.test_limit, self.deadline = tests, test_limit, deadline
        self.stopped, self.running, self.lock = False, set(), threading.Lock()
        self.base = tempfile.TemporaryDirectory(prefix="mutate-base-")
        for folder in ("zero_ref", "tests"):  # others may be editing them meanwhile
            shutil.copytree(ROOT / folder, Path(self.base.name, folder),
                            ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.base.name)

    def source(self, file):
        return Path(self.base.name, file).read_text()

    def run(self, mutant=None, probe=False):
        """Returns a Result, or None if there was no time for it."""
        with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as tree:
            tree = os.path.realpath(tree)
            shutil.copytree(self.base.name, tree, dirs_exist_ok=True)
            os.mkdir(os.path.join(tree, "tmp"))
            tests = self.tests
            if mutant is not None:
                own = f"tests/test_{Path(mutant.file).name}"
                tests = sorted(tests, key=lambda file: file != own)  # if there is one, it is first
                Path(tree, mutant.file).write_text(mutant.apply(self.source(mutant.file)))
            if probe:
                tests = ["tests/test_where.py"]
                Path(tree, tests[0]).write_text(PROBE.format(tree=tree + os.sep))
            return self._pytest(tree, tests)

    def _pytest(self, tree, tests):
        env = os.environ | {"PYTHONPATH": tree, "TMPDIR": os.path.join(tree, "tmp"),
                            "ZERO_REF_TIMEOUT": "8", "COLUMNS": "300"}
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", *tests]
        started = time.monotonic()
        with open(os.path.join(tree, "output"), "w+", errors="replace") as output:
            with self.lock:
                if self.stopped or started >= self.deadline:
                    return None
                process = subprocess.Popen(command, cwd=tree, env=env, stdin=subprocess.DEVNULL,
                                           stdout=output, stderr=output, start_new_session=True)
                self.running.add(process)
            try:
                code = self._wait(process, output)
            finally:
                with self.lock:
                    self.running.discard(process)
                kill_group(process)
            if self.stopped or time.monotonic() >= self.deadline:
                return None
            output.seek(0)
            text = output.read()
        by, why = "", ""
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", text, re.MULTILINE)
        if code is not None and failed:
            by, why = failed[-1]
        elif code != 0:
            why = "time limit" if code is None else f"exit code {code}"
            begun = re.findall(r"^(tests/\S+::.+?)(?: PASSED.*)?$", text, re.MULTILINE)
            by = f"{why} in {begun[-1].strip() if begun else 'no test'}"
        return Result(code == 0, time.monotonic() - started, by, why, text)

    def _wait(self, process, output):
        """The exit code, or None if pytest has written nothing for too long: it does so at the
        beginning and the end of each test."""
        size, since = 0, time.monotonic()
        while time.monotonic() < min(since + self.test_limit, self.deadline):
            try:
                return process.wait(0.5)
            except subprocess.TimeoutExpired:
                if os.fstat(output.fileno()).st_size != size:
                    size, since = os.fstat(output.fileno()).st_size, time.monotonic()

    def stop(self):
        with self.lock:
            self.stopped = True
            for process in self.running:
                kill_group(process)


def kill_group(process):
    """The whole group: pytest, the fork server, and the ranks, which otherwise may live on."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_all(runner, todo, jobs, known, json_file):
    """Runs the mutants, and adds what became of them to `known`."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = {pool.submit(runner.run, mutant): mutant for mutant in todo}
            for future in as_completed(futures):
                mutant, result = futures[future], future.result()
                if result is None:
                    continue
                verdict = "survived" if result.passed else "caught"
                known[mutant.key] = verdict
                print(f"{verdict:<9} {mutant.id}  {mutant.change}  {result.seconds:.1f} s"
                      f"  {result.by}", flush=True)
                if json_file:
                    record = {"key": mutant.key, "id": mutant.id, "verdict": verdict,
                              "by": result.by, "why": result.why, "gpu": mutant.gpu,
                              "seconds": round(result.seconds, 1)}
                    with open(json_file, "a") as file:
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        finally:
            runner.stop()


def report(mutants, known):
    print(f"\n{'file':<28}{'mutants':>9}{'caught':>9}{'survived':>9}{'not run':>9}")
    for file in [*dict.fromkeys(m.file for m in mutants), "all"]:
        verdicts = [known.get(m.key) for m in mutants if file in (m.file, "all")]
        print(f"{file:<28}{len(verdicts):>9}{verdicts.count('caught'):>9}"
              f"{verdicts.count('survived'):>9}{verdicts.count(None):>9}")
    for mutant in mutants:
        if known.get(mutant.key) == "survived":
            note = "  (only used on a GPU)" if mutant.gpu else ""
            print(f"\nsurvived {mutant.id}  {mutant.change}{note}\n    {mutant.source}")


def show(mutant, text):
    old, new = text.splitlines(), mutant.apply(text).splitlines()
    print(mutant.id, mutant.change)
    print(*list(difflib.unified_diff(old, new, n=2, lineterm=""))[2:], "", sep="\n")


def arguments():
    every_test = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", nargs="+", default=ENGINE, help="the files to change")
    parser.add_argument("--tests", nargs="+", help="test files, in the order to run them",
                        default=[*FIRST, *sorted(every_test - APART - {*FIRST})])
    parser.add_argument("--every", type=int, default=1, help="only each N-th mutant")
    parser.add_argument("--offset", type=int, default=0, help="the first of them")
    parser.add_argument("--only", nargs="+", help="only these mutants: stage1.py:52:12")
    parser.add_argument("--survivors", action="store_true", help="run again what had survived")
    parser.add_argument("--show", action="store_true", help="print the changes, run nothing")
    parser.add_argument("--baseline", action="store_true", help="run the tests without a change")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--test-limit-s", type=float, default=120, help="for one test")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep results in this file")
    options = parser.parse_args()
    for file in (*options.files, *options.tests):
        if not (ROOT / file).is_file():
            parser.error(f"there is no {file}")
    return options


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    runner = Runner(options.tests, options.test_limit_s, time.monotonic() + options.limit_s)
    mutants = [m for file in options.files for m in Finder(file, runner.source(file)).found]
    mutants = [m for m in mutants[options.offset :: options.every]
               if options.only is None or m.id in options.only]
    for mutant in mutants:
        text = runner.source(mutant.file)
        if ast.dump(ast.parse(text)) == ast.dump(ast.parse(mutant.apply(text))):
            sys.exit(f"{mutant.id} {mutant.change} changes nothing")
        if options.show:
            show(mutant, text)
    known = {}
    if options.json and options.json.exists():
        records = map(json.loads, options.json.read_text().splitlines())
        known = {record["key"]: record["verdict"] for record in records}
    todo = [mutant for mutant in mutants if mutant.key not in known or options.only
            or (options.survivors and known[mutant.key] == "survived")]
    if not options.show and (todo or options.baseline):
        for what, result in (("the copy hides the installed package", runner.run(probe=True)),
                             ("baseline", options.baseline and runner.run())):
            if result is None or (result and not result.passed):
                sys.exit(f"{what}: {result.output[-3000:] if result else 'out of time'}")
            if result:
                print(f"{what}: passed in {result.seconds:.1f} s", flush=True)
        if options.baseline:
            return
        run_all(runner, todo, options.jobs, known, options.json)
    report(mutants, known)


if __name__ == "__main__":
    main()
