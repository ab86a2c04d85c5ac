"""The questions at the end of the notebooks: complete, and not to be guessed from their form."""

from collections import Counter
from inspect import getsourcefile
from pathlib import Path

import pytest

from zero_ref.labs import sheet
from zero_ref.labs.quiz import QUESTIONS, Question

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=QUESTIONS)
def question(request):
    return QUESTIONS[request.param]


def test_every_notebook_has_five():
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert list(QUESTIONS) == [f"{n}.q{i}" for n in numbers for i in range(1, 6)]


def test_letters_and_remarks_are_complete(question):
    letters = "".join(question.options)
    assert letters in ("abc", "abcd")
    assert question.right in question.options
    assert list(question.remarks) == [x for x in letters if x != question.right]


def test_all_are_sentences(question):
    """Numbers and names may be an option, too."""
    assert question.text.endswith(("?", ".)"))
    assert all(remark.endswith((".", "?")) for remark in question.remarks.values())
    for text in (question.text, *question.options.values(), *question.remarks.values()):
        assert text and text == " ".join(text.split())


def test_a_remark_does_not_give_the_answer(question):
    answer = question.options[question.right].rstrip(".").lower()
    assert all(answer not in remark.lower() for remark in question.remarks.values())


def test_no_text_occurs_twice():
    texts = Counter(question.text for question in QUESTIONS.values())
    for question in QUESTIONS.values():
        texts.update(question.remarks.values())
        assert len(set(question.options.values())) == len(question.options)
    assert max(texts.values()) == 1


def test_right_answers_are_spread_over_the_letters():
    right = Counter(question.right for question in QUESTIONS.values())
    assert max(right.values()) <= 0.4 * len(QUESTIONS)
    for number in {name.split(".")[0] for name in QUESTIONS}:
        mine = Counter(q.right for name, q in QUESTIONS.items() if name.split(".")[0] == number)
        assert max(mine.values()) <= 2


def test_the_longest_option_is_not_the_one_to_take():
    """It may be as often as a letter may: length is no better a guess."""
    def by_length(question):
        return max(question.options, key=lambda letter: len(question.options[letter]))

    hits = sum(by_length(question) == question.right for question in QUESTIONS.values())
    assert hits <= 0.4 * len(QUESTIONS)


def test_lines_are_short():
    assert max(map(len, Path(getsourcefile(Question)).read_text().splitlines())) <= 100


def test_the_sheet_is_what_the_command_prints():
    assert (ROOT / "docs" / "quiz.md").read_text() == sheet.questions() + "\n"


def test_the_key_has_every_right_letter():
    for name, question in QUESTIONS.items():
        assert f"**{name}** {question.right}) " in sheet.key()
        assert f"**{name}** {question.text}\n" in sheet.questions()
