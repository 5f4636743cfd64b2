"""The tables in the documents are those that the results files give."""

import pytest

from lychee_jax.files import read_text
from tests.support import results_tables


@pytest.mark.parametrize("name", results_tables.DOCUMENTS)
def test_tables_are_those_of_the_results_files(name: str):
    text = read_text(results_tables.DOCS / name)
    assert text == results_tables.filled(text), "run PYTHONPATH=. python tests/support/results_tables.py"


def test_every_table_has_a_place():
    texts = [read_text(results_tables.DOCS / name) for name in results_tables.DOCUMENTS]
    assert {
        table for table in results_tables.TABLES if any(f"<!-- table: {table} -->" in text for text in texts)
    } == set(results_tables.TABLES)


def test_a_changed_figure_is_written_again():
    good = f"Before\n\n<!-- table: training -->\n\n{results_tables.training()}\n\n<!-- end of table -->\n\nafter\n"
    assert results_tables.filled(good) == good
    assert results_tables.filled(good.replace("0.76 s", "0.67 s")) == good
