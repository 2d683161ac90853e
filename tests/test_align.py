"""The comparison with PyTorch agrees, and sees each of the mistakes of test_faults. Where PyTorch is not installed: says so."""

import importlib.util
import json
import sys

import pytest
from conftest import ROOT
from test_faults import FAULTS

sys.path.insert(0, str(ROOT / "tools" / "align"))
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "reprod_log"))
with_torch = pytest.mark.skipif(not INSTALLED, reason="torch and reprod-log are not installed: pip install -e .[align]")


@pytest.fixture(scope="module")
def reference():
    """(case, PyTorch's arrays, their rounding noise) of one step. λ is not ½, at which λ and 1 − λ are the same."""
    import compare
    import steps

    case = steps.Case("one step", loss_lambda=0.3)
    state, views = case.state(), case.views()
    theirs = steps.run_torch(case, "float64", state, views)
    return case, theirs, compare.noise(theirs, [steps.run_torch(case, "float64", state, views, seed) for seed in (1, 2)])


def _outside(reference):
    import compare
    import steps

    case, theirs, noise = reference
    ours = steps.run_paddle(case, "float64", case.state(), case.views())
    rows = compare.rows(case.name, "float64", steps.unbiased(case, ours, theirs), theirs, noise)
    return rows, [row for row in rows if not row.passed]


@with_torch
def test_a_step_is_the_same(reference):
    rows, outside = _outside(reference)
    assert len(rows) == 318 and not outside


@with_torch
@pytest.mark.parametrize("fault", [pytest.param(fault[1], id=fault[0]) for fault in FAULTS if fault[2] != "r18_papergrid2"])
def test_a_fault_is_seen(monkeypatch, reference, fault):
    fault(monkeypatch)
    worst = sorted(_outside(reference)[1], key=lambda row: -row.rms / max(row.tolerance, 1e-300))
    print(f"{len(worst)} arrays, {[(row.name, row.rms / max(row.tolerance, 1e-300)) for row in worst[:1]]}")
    assert worst


@with_torch
def test_the_tool_writes_its_tables_and_fails_where_a_row_does(run_tool, monkeypatch, tmp_path):
    result = run_tool("align/run.py", "--out", tmp_path, "--only", "schedule", "pictures")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert all(row["passed"] for row in rows) and len(rows) == 21 and "cosine" in (tmp_path / "table.md").read_text()

    import run
    import schedule_and_start

    monkeypatch.setattr(schedule_and_start, "learning_rate", lambda optim, iteration, iters_per_epoch: 0.03)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), "--only", "schedule"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 1 and "FAILED" in (tmp_path / "table.md").read_text()


@pytest.mark.skipif(INSTALLED, reason="torch is installed: nothing to miss")
def test_without_torch_the_tool_says_what_to_install(run_tool, tmp_path):
    result = run_tool("align/run.py", "--out", tmp_path)
    assert result.returncode == 1 and "pip install torch==2.13.0" in result.stderr and "Traceback" not in result.stderr


@with_torch
@pytest.mark.slow
def test_everything_is_the_same(run_tool, tmp_path):
    result = run_tool("align/run.py", "--out", tmp_path, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
