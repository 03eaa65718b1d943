"""Write the .ipynb twin of every notebook page, for Colab and for `pytest --nbmake`.

    python book/_pair.py            write the twins
    python book/_pair.py --check    write nothing; name the twins that are stale, missing or alone

A page is a notebook when its front matter says so to the book (jupytext's text representation, or
`file_format: mystnb`). The twin has no outputs, opens with a Colab badge and a cell that on
Colab installs the package from a clone, whose files a page may read (and BrainWideBench's scorer,
for a page that calls it), and is the same, byte for byte, however often it is written. Edit the
page, never the twin.
"""

import sys

import jupytext
import nbformat
from _plain import BOOK, BRANCH, COLAB, URL, plain
from myst_nb.core.read import is_myst_markdown_notebook

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = f"""\
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("../benchmarks").exists():
    !test -d mtm-book || git clone -q --depth 1 --branch {BRANCH} {URL} mtm-book
    %pip install -q "./mtm-book[data,nwb,bwb]" pynwb
    %cd -q mtm-book/book
    %env GOMP_SPINCOUNT=1000"""
SCORER = """
    %pip install -q torchmetrics rich
    %pip install -q --no-deps ibl-bwb-eval==0.1.0"""  # its own pins would replace torch
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def twin(name: str, text: str) -> str:
    """The notebook that belongs to page `name`, as the text of its .ipynb file."""
    new = nbformat.v4
    badge = f"[![Open in Colab]({BADGE})]({COLAB}/blob/{BRANCH}/book/{name}.ipynb)"
    setup = SETUP + (SCORER if "submission.score(" in text else "")
    cells = [new.new_markdown_cell(badge), new.new_code_cell(setup)]
    solution = False  # whether the cell belongs to one: folded, as it is in the book
    for cell in jupytext.reads(text, fmt="md:myst").cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            kept = {key: cell.metadata[key] for key in ("tags", "nbmake") if key in cell.metadata}
            fold = solution or {"hide-input", "hide-cell"} & set(tags)
            folded = {"cellView": "form"} if fold else {}
            cells.append(new.new_code_cell(cell.source, metadata=kept | folded))
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if "caption" in figure:
                label = figure.get("name", "").removeprefix("fig-")
                caption = plain(figure["caption"]).strip()
                cells.append(new.new_markdown_cell(f"**Figure ({label}).** {caption}"))
            continue
        if "{solution-" in cell.source:
            solution = cell.source.rfind("{solution-start}") > cell.source.rfind("{solution-end}")
        if source := plain(cell.source):
            cells.append(new.new_markdown_cell(source))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:03d}"
    notebook = new.new_notebook(cells=cells, metadata=METADATA, nbformat_minor=5)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def main(arguments: list[str]) -> int:
    texts = {page.stem: page.read_text("utf-8") for page in sorted(BOOK.glob("*.md"))}
    twins = {
        name: twin(name, text) for name, text in texts.items() if is_myst_markdown_notebook(text)
    }
    written = {path.stem: path.read_text("utf-8") for path in BOOK.glob("*.ipynb")}
    problems = [
        f"{name}.ipynb: {'stale' if name in written else 'missing'}"
        for name in twins
        if twins[name] != written.get(name)
    ]
    alone = [f"{name}.ipynb: no page {name}.md" for name in sorted(written.keys() - twins.keys())]
    if "--check" in arguments:
        problems += alone
        print("\n".join([*problems, "run: make pair"]) if problems else f"{len(twins)} in step")
        return bool(problems)
    for name, text in twins.items():
        (BOOK / f"{name}.ipynb").write_text(text, "utf-8")
    print("\n".join([f"wrote {len(twins)} notebooks", *alone]))
    return bool(alone)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
