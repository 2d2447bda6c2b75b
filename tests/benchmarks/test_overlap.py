"""The benchmark of overlap runs, counts its steps and writes them down. How long they took is its own business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import overlap


def test_it_writes_a_row_for_each_size_without_and_with_a_step_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    overlap.main(["--sequences", "2,3", "--device-ms", "0.5", "--context", "4", "--steps", "25", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["sequences"], row["steps_ahead"]) for row in rows] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert all(row["period_ms"] > 0 and row["host_us"] > 0 for row in rows)
    assert "Step periods" in capsys.readouterr().out


def test_fewer_steps_than_a_window_are_refused() -> None:
    with pytest.raises(SystemExit, match="--steps 3"):
        overlap.main(["--steps", "3"])
