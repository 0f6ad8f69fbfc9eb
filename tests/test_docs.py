"""Promises of the documentation: its tables are those of the code, its links lead somewhere, its commands exist.

The tables are written by `python -m tests.test_docs`, between the marks that the pages have for them.
"""

import re
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import ssdkd
from ssdkd import data
from ssdkd.coefficients import RANGES
from ssdkd.config import RunConfig, parse_command_line
from ssdkd.models import available_models

ROOT = Path(ssdkd.__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def as_text(value: Any) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(schema: type = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every setting: its dotted name, its default, and what it means and may be."""
    rows, hints = [], typing.get_type_hints(schema)
    for entry in fields(schema):
        if is_dataclass(hints[entry.name]):
            continue
        default = entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
        meaning, meta = entry.metadata["meaning"], entry.metadata
        bounds = [
            f"at {word} {meta[key]:g}" for word, key in (("least", "low"), ("most", "high")) if meta[key] is not None
        ]
        allowed = " or ".join(f"`{choice}`" for choice in meta["choices"]) or " and ".join(bounds)
        rows.append((prefix + entry.name, as_text(default), f"{meaning} ({allowed})" if allowed else meaning))
    for entry in fields(schema):
        if is_dataclass(hints[entry.name]):
            rows += options(typing.cast(type, hints[entry.name]), f"{prefix}{entry.name}.")
    return rows


def options_table() -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| `{name}` | `{default}` | {meaning} |" for name, default, meaning in options()])


def coefficients_table() -> str:
    lines = ["| name | range | uniform | ssdkd | steers |", "| --- | --- | --- | --- | --- |"]
    for entry in RANGES:
        start, end = entry.formula
        formula = f"{start:g}" if start == end else f"{start:g} -> {end:g}"
        span = f"{entry.low:g} .. {entry.high:g}{', logarithmic' if entry.logarithmic else ''}"
        lines.append(f"| `{entry.name}` | {span} | {entry.neutral:g} | {formula} | {entry.steers} |")
    return "\n".join(lines)


def models_list() -> str:
    return textwrap.fill(f"{', '.join(f'`{name}`' for name in available_models())}.", 120)


def data_sets_table() -> str:
    return "\n".join(line for line in (data.__doc__ or "").splitlines() if line.startswith("|"))


TABLES = {
    "options": ("configuration.md", options_table),
    "models": ("configuration.md", models_list),
    "data sets": ("configuration.md", data_sets_table),
    "coefficients": ("method.md", coefficients_table),
}


def parts(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks of a table."""
    before, mark, rest = text.partition(f"<!-- {name}: written by python -m tests.test_docs -->\n")
    table, end, after = rest.partition(f"\n<!-- end of {name} -->")
    assert mark
    assert end
    return before + mark, table, end + after


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_pages_are_those_of_the_code(name: str) -> None:
    page, table = TABLES[name]
    _, written, _ = parts((ROOT / "docs" / page).read_text(encoding="utf-8"), name)
    assert written == table(), "write it anew: python -m tests.test_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def headings(page: Path) -> set[str]:
    """What the headings of a page are called in links to them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_a_page_lead_to_a_heading(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert heading in headings(page.parent / target if target else page), f"{page.name}: {target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_are_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for arguments in re.findall(r"^ *python -m ssdkd\.run((?: [^\n#`]*)?)", text, re.MULTILINE):
        words = [w for w in arguments.split() if w not in ("[", "]")]
        if "--help" in words or "--print-config" in words:
            continue
        extra = (("resume", "", None), ("quiet", "", False))
        parse_command_line(RunConfig, words, prog="", description="", extra=extra, exclusive=("rounds", "minutes"))


def test_a_page_of_options_has_no_cell_that_breaks_its_table() -> None:
    for row in options_table().splitlines():
        assert row.count("|") == 4


def test_every_data_set_is_told_of() -> None:
    told = re.findall(r"^\| (.*?) \|", data_sets_table(), re.MULTILINE)
    assert {name for cell in told[2:] for name in cell.split(", ")} == set(data.available_datasets())


def write() -> None:
    for name, (page, table) in TABLES.items():
        path = ROOT / "docs" / page
        before, _, after = parts(path.read_text(encoding="utf-8"), name)
        path.write_text(before + table() + after, encoding="utf-8")


if __name__ == "__main__":
    write()
