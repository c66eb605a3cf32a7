"""Tables of the README are what `kompakt bench table` makes of the committed measurements."""

import json
from pathlib import Path

import pytest

from kompakt.cli.main import main

ROOT = Path(__file__).parents[1]
FILES = sorted(file.name for file in (ROOT / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("name", FILES)
def test_table_is_the_committed_measurement(name, tmp_path):
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"<!-- benchmarks/{name} -->" in readme
    file, page = tmp_path / "benchmarks" / name, tmp_path / "README.md"
    file.parent.mkdir()
    file.write_text((ROOT / "benchmarks" / name).read_text("utf-8"), "utf-8")
    page.write_text(readme, "utf-8")
    assert main(["bench", "table", str(file), "--into", str(page)]) == 0
    assert page.read_text("utf-8") == readme


@pytest.mark.parametrize("name", FILES)
def test_measurement_says_where_and_when(name):
    result = json.loads((ROOT / "benchmarks" / name).read_text("utf-8"))
    assert {"device", "torch", "transformers", "python"} <= set(result["environment"])
    assert result["kompakt"] and result["date"] and result["rows"]
