"""A table as data, and its three files: CSV for machines, GitHub Markdown and LaTeX (booktabs) for readers."""

from __future__ import annotations

import csv
import io
import textwrap
from dataclasses import dataclass

NOT_MEASURED = "–"
HEADING_LETTERS = 9  # of a line in a LaTeX heading
# Characters that LaTeX treats specially or that its default fonts lack.
LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$",
         "×": r"$\times$", "Δ": r"$\Delta$", "λ": r"$\lambda$", "±": r"$\pm$", "−": r"$-$", "…": r"\ldots{}",
         "<": r"\textless{}", ">": r"\textgreater{}"}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in the CSV file.
        heading: what readers see, with the unit.
        digits: decimals in the CSV file; None for text and whole numbers.
        shown: decimals for readers (default: as ``digits``).
        wrap: for sentences: width in LaTeX as a fraction of the text width.
        right: flush right although the values are text.
    """

    key: str
    heading: str
    digits: int | None = None
    shown: int | None = None
    wrap: float | None = None
    right: bool = False

    def read(self, value) -> str:
        """The value as readers see it."""
        decimals = self.digits if self.shown is None else self.shown
        if value is None or value == "":
            return NOT_MEASURED
        if isinstance(value, str) or decimals is None:
            return str(value)
        smallest = 10**-decimals
        if self.key.startswith("p_") and value < smallest:
            return f"< {smallest:.{decimals}f}"
        return f"{value:.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Table:
    """Rows of a table.

    Attributes:
        name: file name without extension.
        title: what it shows, with n.
        note: how it was measured; printed below.
        reading: the form for readers where it is another one than the CSV file's (turned, or with text for numbers).
    """

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[dict]
    reading: Table | None = None

    def cells(self) -> list[list[str]]:
        """All rows as readers see them."""
        return [[column.read(row.get(column.key)) for column in self.columns] for row in self.rows]

    def numeric(self) -> list[bool]:
        """For every column, whether it holds numbers (to be set flush right)."""
        return [column.right or column.digits is not None or all(isinstance(row.get(column.key), int | float | None)
                                                 for row in self.rows) for column in self.columns]


def files(table: Table) -> dict[str, str]:
    """File name to content of the table's three files."""
    reading = table.reading or table
    return {f"{table.name}.csv": to_csv(table), f"{table.name}.md": to_markdown(reading),
            f"{table.name}.tex": to_latex(reading)}


def to_csv(table: Table) -> str:
    """Comma-separated values with the columns' keys as header; empty where not measured."""
    rows = [[_number(column.key, row.get(column.key), column.digits) for column in table.columns] for row in table.rows]
    return csv_text([column.key for column in table.columns], rows)


def csv_text(header: list[str], rows: list[list]) -> str:
    """CSV with Unix line ends, so that Git and DVC see the same bytes everywhere."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


def to_markdown(table: Table) -> str:
    """A GitHub table under its title, with the note below."""
    return f"**{table.title}**\n\n{markdown_rows(table)}\n{table.note}\n"


def markdown_rows(table: Table) -> str:
    """The GitHub table alone."""
    lines = [[column.heading for column in table.columns],
             ["---:" if number else "---" for number in table.numeric()], *table.cells()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n"
                   for line in lines)


def to_latex(table: Table) -> str:
    r"""A booktabs ``tabular``, ready for ``\input`` inside a table environment."""
    kinds = "".join(_latex_kind(column, number) for column, number in zip(table.columns, table.numeric(), strict=True))
    lines = [f"% {table.title} (written by pipeline/report.py; needs the packages booktabs and array)",
             rf"\begin{{tabular}}{{{kinds}}}",
             r"\toprule", _latex_headings(table), r"\midrule",
             *(_latex_row(row) for row in table.cells()), r"\bottomrule", r"\end{tabular}",
             f"% {table.note}"]
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n"


def _latex_kind(column: Column, number: bool) -> str:
    if column.wrap:
        return rf">{{\raggedright\arraybackslash}}p{{{column.wrap}\textwidth}}"
    return "r" if number else "l"


def _latex_headings(table: Table) -> str:
    """Headings broken into short lines: numbers need less room than the words above them."""
    texts = [_latex_text(column.heading) if column.wrap else _stacked(column.heading, "r" if number else "l")
             for column, number in zip(table.columns, table.numeric(), strict=True)]
    return " & ".join(texts) + r" \\"


def _stacked(heading: str, side: str) -> str:
    lines = [_latex_text(line) for line in textwrap.wrap(heading, HEADING_LETTERS, break_long_words=False)]
    if len(lines) < 2:
        return "".join(lines)
    return rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}" + r"\\".join(lines) + r"\end{tabular}"


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex_row(cells) -> str:
    return " & ".join(map(_latex_text, cells)) + r" \\"


def _number(key: str, value, digits: int | None):
    if value is None:
        return ""
    if digits is None or isinstance(value, str):
        return value
    # Decimals would turn a small p into 0.
    return float(f"{value:.4g}") if key.startswith("p_") else round(float(value), digits)
