"""Renews the tables of run_folder.md from the docstrings of the records.

Run it as `python docs/generate_run_folder.py` after changing a record; a test compares the two. A
table stands between `<!-- Record -->` and `<!-- end -->`, behind the docstring of its record where
that says more than a heading does.
"""

from __future__ import annotations

import re
from pathlib import Path

from pgrpo.runs import records
from pgrpo.runs.records import Record

PAGE = Path(__file__).with_name("run_folder.md")
TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str) -> str:
    """The page with the tables that the code has now."""

    def table(found: re.Match[str]) -> str:
        record: type[Record] = getattr(records, found[2])
        rows = ["| name | meaning |", "|---|---|"]
        for name, field in record.model_fields.items():
            assert field.description, f"{found[2]}.{name} explains itself"
            meaning = " ".join(field.description.split()).replace("|", "\\|")
            rows.append(f"| `{name}` | {meaning} |")
        lines = "\n".join(rows)
        return f"{found[1]}\n{' '.join((record.__doc__ or '').split())}\n\n{lines}\n\n{found[3]}"

    return TABLE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
