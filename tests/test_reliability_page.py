"""The tables of docs/reliability.md follow from the declarations of the methods."""

from benchmarks.pages import reliability


def test_the_page_has_the_tables_of_today():
    page = reliability.PAGE.read_text()
    assert reliability.filled(page) == page, "run make docs"
