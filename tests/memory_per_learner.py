"""What one learner's session needs on a shared machine: memory and processes.

    python tests/memory_per_learner.py

A session is a kernel with the four ranks of a notebook's cells, and the four and three ranks on
which `check` judges. Memory that processes share counts once (PSS, which Linux alone knows).
"""

import psutil

import zero_ref
from zero_ref import course, labs
from zero_ref.labs.exercises import EXERCISES


def step():
    model = zero_ref.wrap(course.build(), 3)
    model(course.batch(0, model.rank)[0]).sum().backward()


def main() -> None:
    zero_ref.launch(step, 4)
    assert labs.check("4.2", EXERCISES["4.2"].solution)
    here = psutil.Process()
    processes = [here, *here.children(recursive=True)]
    pss = sum(process.memory_full_info().pss for process in processes)
    print(f"{len(processes)} processes, {pss / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
