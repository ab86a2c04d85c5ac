"""What is asked, for the learner to read: the lines of an ordering, and the questions."""

from ..course import wrapped
from .ordering import ORDERINGS
from .quiz import QUESTIONS


def lines(name: str) -> None:
    """Show the task and the lines of an ordering, each with its letter."""
    ordering = ORDERINGS[name]
    print(wrapped(f"{name}: {ordering.task} Some lines are wrong ones."))
    for letter, line in ordering.lines.items():
        print(_labelled(f"  {letter}  ", line))


def questions(notebook: str) -> None:
    """Show the questions of a notebook, by its number."""
    for name, question in QUESTIONS.items():
        if name.split(".")[0] == notebook:
            print(_labelled(f"{name}  ", question.text))
            for letter, option in question.options.items():
                print(_labelled(f"      {letter}  ", option))


def _labelled(label, text):
    return wrapped(text, label, " " * len(label))
