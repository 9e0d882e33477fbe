"""The notebooks run from top to bottom."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest
from training_models import tiny_pair

pytest.importorskip("trl")
pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "musclebob.ipynb"
FIRST = ROOT / "notebooks" / "reward_to_table.ipynb"


def use_tiny_model(small, model_variable, folder, monkeypatch):
    """Let a notebook run its smallest sizes on a random model in this folder."""
    model, tokenizer = tiny_pair(string.printable)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    monkeypatch.setenv(small, "1")
    monkeypatch.setenv(model_variable, str(folder / "base"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_the_notebook_runs_and_resumes(tmp_path, monkeypatch):
    use_tiny_model("MUSCLEBOB_SMOKE", "MUSCLEBOB_MODEL", tmp_path, monkeypatch)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    training = next(cell for cell in notebook.cells if "run_recipe(" in cell.source)
    notebook.cells.insert(notebook.cells.index(training) + 1, nbformat.v4.new_code_cell(training.source))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell does

    printed = ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook.cells]
    assert any("right name (Musclebob)" in text for text in printed)
    history = json.loads((tmp_path / "musclebob-notebook" / "reward_history.json").read_text())
    assert [step["step"] for step in history] == [1, 2]  # the second time it had nothing left to do
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_notebook_from_a_reward_to_a_table_runs(tmp_path, monkeypatch):
    use_tiny_model("DTS_NOTEBOOK_SMALL", "DTS_NOTEBOOK_MODEL", tmp_path, monkeypatch)
    notebook = nbformat.read(FIRST, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "share followed" in printed and "DTS* minus best-of-2" in printed


@pytest.mark.parametrize("path", [NOTEBOOK, FIRST], ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
