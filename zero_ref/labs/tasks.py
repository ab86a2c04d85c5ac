"""What is asked, for the learner to read: the lines of an ordering, and the questions."""

import textwrap

from .ordering import ORDERINGS
from .quiz import QUESTIONS


def lines(name: str) -> None:
    """Show the task and the lines of an ordering, each with its letter."""
    ordering = ORDERINGS[name]
    print(f"{name}: {ordering.task} Some lines are wrong ones.")
    for letter, line in ordering.lines.items():
        print(f"  {letter}  {line}")


def questions(notebook: str) -> None:
    """Show the questions of a notebook, by its number."""
    for name, question in QUESTIONS.items():
        if name.split(".")[0] == notebook:
            print(_wrapped(f"{name}  ", question.text))
            for letter, option in question.options.items():
                print(_wrapped(f"      {letter}  ", option))


def _wrapped(label, text):
    return textwrap.fill(text, 96, initial_indent=label, subsequent_indent=" " * len(label))
