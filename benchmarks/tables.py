"""The tables of README.md and docs/plan.md, made from results/*.json.  Run: python benchmarks/tables.py

A line ``<!-- table NAME -->`` or ``<!-- table NAME: PART -->`` is followed by the table of results/NAME.json, and by
what it was measured with, up to ``<!-- end -->``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "docs" / "plan.md")
_MISSING = "Not measured yet: "
_PLACE = re.compile(r"<!-- table (\w+)(?:: ([\w ]+))? -->\n.*?<!-- end -->", re.DOTALL)


def cell(column: str, value: object) -> str:
    """A value as the table shows it: shares in per cent, other fractions with three digits, whole numbers in groups."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if column.startswith("share"):
        return f"{100 * value:.1f} %"
    if column.startswith("ratio"):
        return f"{value:.2f}"
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with all columns that any of them has, in the order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(c, row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(found: Mapping[str, Any], name: str) -> str:
    """What a table was measured with, in a line."""
    machine = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    command = found.get("command", f"python benchmarks/{name}.py")
    return (
        f"`{command}`, commit {machine['commit']}, {machine['cores']} cores of {machine['processor']}, "
        f"Python {machine['python']}, {versions}"
    )


def rendered(text: str, folder: Path) -> str:
    """The page with every table made anew from the folder's files; one that has no file yet says so.

    KeyError for a part that a file does not have.
    """

    def fill(place: re.Match[str]) -> str:
        name, part = place[1], place[2]
        tag = f"<!-- table {name}{f': {part}' if part else ''} -->"
        file = folder / f"{name}.json"
        if not file.exists():
            return f"{tag}\n\n{_MISSING}`python benchmarks/{name}.py`\n\n<!-- end -->"
        found = json.loads(file.read_text(encoding="utf8"))
        return f"{tag}\n\n{table(found[part or 'rows'])}\n\n{source(found, name)}\n\n<!-- end -->"

    return _PLACE.sub(fill, text)


def missing(page: str) -> list[str]:
    """The scripts whose results a rendered page does not have, each once."""
    return sorted(set(re.findall(re.escape(_MISSING) + r"`python benchmarks/(\w+)\.py`", page)))


def main() -> None:
    """Write the pages again; it fails where a table has no results."""
    lacking: list[str] = []
    for page in PAGES:
        text = rendered(page.read_text(encoding="utf8"), HERE / "results")
        page.write_text(text, encoding="utf8")
        lacking += missing(text)
    if lacking:
        raise SystemExit(f"no results of {', '.join(lacking)}; run these scripts first")


if __name__ == "__main__":
    main()
