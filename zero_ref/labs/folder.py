"""The learner's copy of the course: `python -m zero_ref.labs.folder notebooks lab`.

What is in the copy already stays as it is. Outputs are left out, because they give the answers
away; those in the course itself are for readers.
"""

import argparse
import os
import shutil
from pathlib import Path

import nbformat


def copy_course(course: Path, folder: Path) -> list[Path]:
    """Copy the notebooks that are not in the folder yet, and link to the pages. Returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in sorted(course.glob("*.ipynb")) if not (folder / file.name).exists()]
    for file in missing:
        notebook = nbformat.read(file, as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            cell.source = cell.source.replace("](../docs/", "](docs/")  # linked below
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / file.name)
    if not os.path.lexists(folder / "docs"):
        (folder / "docs").symlink_to(os.path.relpath(course.parent / "docs", folder))
    return [folder / file.name for file in missing]


def put_aside(folder: Path, number: str) -> Path:
    """Make room for a new copy of a notebook. Returns where the old one is now. Raises ValueError
    if there is none with that number."""
    found = sorted(folder.glob(f"{int(number):02}_*.ipynb")) if number.isdecimal() else []
    found = [file for file in found if ".before" not in file.name]
    if not found:
        raise ValueError(f"there is no notebook {number} in {folder}: give its number, such as 4")
    aside, count = found[0].with_suffix(".before.ipynb"), 1
    while aside.exists():
        count += 1
        aside = found[0].with_suffix(f".before{count}.ipynb")
    return Path(shutil.move(found[0], aside))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a copy of the course to work in.")
    parser.add_argument("course", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", metavar="N", help="start notebook N over; yours is put aside")
    args = parser.parse_args()
    if args.again is not None:
        try:
            print(f"Yours is {put_aside(args.folder, args.again)} now.")
        except ValueError as error:
            parser.error(str(error))
    new = copy_course(args.course, args.folder)
    print(f"Copied to {args.folder}: {len(new)}." if new else
          f"Your copy of the course is in {args.folder}.")


if __name__ == "__main__":
    main()
