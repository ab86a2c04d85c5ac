"""The questions of the course as a sheet to hand out, in Markdown.

    python -m zero_ref.labs.sheet          the questions
    python -m zero_ref.labs.sheet --key    the right letters, and what to say about the others
"""

import argparse

from .quiz import QUESTIONS


def questions() -> str:
    lines = ["# Questions on ZeRO", "",
             "Five on each notebook of the course. The [words](words.md) are explained on a page "
             "of their own. `python -m zero_ref.labs.sheet` prints this page."]
    notebook = ""
    for name, question in QUESTIONS.items():
        if name.split(".")[0] != notebook:
            notebook = name.split(".")[0]
            lines += ["", f"## Notebook {notebook}"]
        lines += ["", f"**{name}** {question.text}", ""]
        lines += [f"- {letter}) {option}" for letter, option in question.options.items()]
    return "\n".join(lines)


def key() -> str:
    lines = ["# Answers"]
    for name, question in QUESTIONS.items():
        lines += ["", f"**{name}** {question.right}) {question.options[question.right]}", ""]
        lines += [f"- {letter}) {remark}" for letter, remark in question.remarks.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--key", action="store_true", help="the answers, for the instructor")
    print(key() if parser.parse_args().key else questions())
