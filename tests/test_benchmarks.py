"""The measurements measure equal work, notice unequal work, and write tables that can be read back. No time is asserted here."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environment, loops, overhead, pairs, peers, tables  # noqa: E402
from benchmarks.cases import CASES, Counts, fit  # noqa: E402
from unet_nbtrain.metrics import SegmentationMetrics  # noqa: E402

SHORT = replace(CASES["conv1"], train=8, val=2, epochs=3)


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_all_contestants_do_the_same_work(clip):
    case = replace(SHORT, clip=clip)
    raw = fit(loops.raw, case)
    assert len(raw.rows) == len(raw.marks) == 3 and len(raw.epochs("cpu")) == len(raw.loops("cpu")) == 2
    for contestant in (loops.raw_fused, loops.raw_saving, loops.ours, *([] if clip else [loops.ours_bar, loops.ours_loop, loops.ours_panel])):
        other = fit(contestant, case)
        assert max(overhead.apart(other, raw)) <= 1e-5
        assert len(other.epochs("cpu")) == 2 and other.total("wall") > 0
    assert fit(loops.raw_usual, case).weights.equal(raw.weights)
    assert (overhead.apart(raw, fit(loops.raw, SHORT))[0] > 0) is bool(clip)


def test_a_whole_table(tmp_path, monkeypatch):
    monkeypatch.setitem(overhead.CASES, "conv1", SHORT)
    for name in ("ours", "ours_panel"):  # Of the part about the panel only the table; a panel is opened above
        monkeypatch.setattr(loops, name, loops.raw)
    only = ["raw_again", "raw_fused", "raw_usual", "ours"]
    out = tmp_path / "overhead.md"
    assert overhead.main(["--cases", "conv1", "--pairs", "1", "--only", *only, "--panel", "0.01", "--out", str(out)]) == 0
    found = tables.read_tables(out)
    assert list(found) == ["conv1", "conv1: circumstances", "conv1: the panel open"]
    assert {row["trainer"] for row in found["conv1"]} == set(only)
    assert all(tables.numbers(row["CPU over raw"])[1] > 0 for row in found["conv1"])
    told = {row["trainer"]: row for row in found["conv1: circumstances"]}
    for name in ("raw_again", "raw_fused", "ours"):
        assert float(told[name]["weights differ by"]) <= 1e-5 and float(told[name]["numbers differ by"]) <= 1e-5
    assert "means over batches" in told["raw_usual"]["numbers differ by"]
    assert [row["trainer"] for row in found["conv1: the panel open"]] == ["ours_again", "ours_panel"]


def test_other_work_is_noticed():
    """A contestant that skips the last epoch's step, and one whose numbers are wrong"""

    def tampered(work):
        loops.raw(work)
        work.rows[-1]["val"]["dice"] += 1e-3
        with torch.no_grad():
            work.model.bias += 1e-4

    numbers, weights = overhead.apart(fit(tampered, SHORT), fit(loops.raw, SHORT))
    assert numbers == pytest.approx(1e-3, rel=1e-3) and weights == pytest.approx(1e-4, rel=1e-3)
    assert "not the same work" in overhead.verdict("tampered", weights)
    assert "not the same work" not in overhead.verdict("tampered", 9e-6)


def test_each_fit_is_compared_with_its_neighbours():
    order = []

    def once(name):
        order.append(name)
        return len(order)

    results = pairs.take_turns({"a": "a", "b": "b"}, {"x": "x", "y": "y"}, once, rounds=2)
    for name, found in results.items():
        for base in ("x", "y"):
            for at, (before, after) in zip(found.fits, found.bases[base], strict=True):
                assert before < at < after and order[at - 1] == name
                assert order[before - 1] == order[after - 1] == base and after - before <= 4
    assert order.count("a") == order.count("b") == 2 and [len(o.fits) for o in results.values()] == [2, 2]
    assert order[2] == "a" and order[10] == "b"  # Another order in each round


def test_a_contestant_that_fails_is_named_and_the_others_go_on():
    def once(contestant):
        return contestant()

    results = pairs.take_turns({"good": lambda: 2.0, "bad": lambda: 1 / 0}, {"base": lambda: 1.0}, once, rounds=3)
    assert results["good"].ratios("base", float) == [2.0, 2.0, 2.0] and results["good"].differences("base", float) == [1.0, 1.0, 1.0]
    assert results["bad"].fits == [] and results["bad"].error.startswith("ZeroDivisionError")


@pytest.mark.parametrize("again, step, void", [(4.9, 300, False), (-5.1, 300, True), (5.1, 300, True), (20, 3000, False), (-31, 3000, True)])
def test_when_a_run_is_void(again, step, void):
    assert pairs.is_void(again, step) is void


def test_quartiles_and_spread():
    assert pairs.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4) and pairs.quartiles([7]) == (7, 7, 7)
    assert pairs.spread([1.0, 2.0, 3.0], "{:.1f}") == "2.0 [1.5, 2.5]"
    assert tables.numbers(pairs.spread([1.0, 2.0, 3.0], "{:.1f}")) == (2.0, 1.5, 2.5)
    assert tables.numbers("-44 [-45, -43]") == (-44, -45, -43) and tables.numbers("+5.1") == (5.1, 5.1, 5.1)


def test_the_lean_sums_are_the_scores_of_the_package():
    draw = torch.Generator().manual_seed(3)
    counts, metrics, losses = Counts(), SegmentationMetrics(1), []
    for _ in range(3):
        logits, masks = torch.randn(2, 1, 8, 8, generator=draw), (torch.rand(2, 1, 8, 8, generator=draw) > 0.6).float()
        losses.append(torch.rand((), generator=draw))
        counts.update(logits, masks, losses[-1])
        metrics.update(logits, masks)
    found, wanted = counts.compute(), metrics.compute()
    assert found["loss"] == pytest.approx(sum(map(float, losses)) / 3)
    assert all(found[name] == pytest.approx(wanted[name], abs=1e-12) for name in ("dice", "iou", "accuracy"))
    assert counts.sums is None


def test_a_table_comes_back(tmp_path):
    rows = [["ours", "0.93 [0.92, 0.95]"], ["raw", "1.00 [0.99, 1.01]"]]
    tables.write(tmp_path / "x.md", "Title", tables.circumstances(), "## one", tables.table(("trainer", "ratio"), rows))
    assert tables.read_tables(tmp_path / "x.md") == {"one": [dict(zip(("trainer", "ratio"), row)) for row in rows]}
    assert tables.read_tables(tmp_path / "missing.md") == {}
    assert torch.__version__ in (tmp_path / "x.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.md")), ids=lambda path: path.stem)
def test_the_results_of_the_repository_can_be_read(path):
    found = tables.read_tables(path)
    assert found and all(rows and len({tuple(row) for row in rows}) == 1 for rows in found.values())


def test_the_readme_has_the_numbers_of_the_tables():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = tables.read_tables(ROOT / "benchmarks" / "results" / "overhead.md")
    ratios = {(case, row["trainer"]): tables.numbers(row["CPU over raw"])[0] for case in ("conv1", "tiny") for row in found[case]}
    told = [line for line in lines if "of the plain loop by hand" in line]
    assert len(told) == 2
    for name, title in (("ours", "| "), ("ignite", "Ignite "), ("lightning", "Lightning "), ("fastai", "fastai ")):
        assert f"{title}{ratios['conv1', name]:.2f}" in told[0]
    assert f"| {ratios['tiny', 'ours']:.2f} " in told[1]
    more = [100 * float(row["CPU over ours"]) - 100 for case in ("conv1", "tiny") for row in found[f"{case}: the panel open"] if row["trainer"] == "ours_panel"]
    assert any("{:.1f} % and {:.1f} % more".format(*more) in line for line in lines)


def test_each_peer_has_its_version_and_its_adapter():
    pinned = {line.partition("==")[0] for line in (ROOT / "benchmarks" / "peers.txt").read_text().splitlines() if "==" in line}
    assert set(peers.PACKAGES.values()) <= pinned
    files = {path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py")} - {"__init__"}
    assert files == set(peers.PACKAGES)
    for name in files:
        tree = ast.parse((ROOT / "benchmarks" / "peers" / f"{name}.py").read_text())
        assert [[a.arg for a in o.args.args] for o in tree.body if isinstance(o, ast.FunctionDef) and o.name == "fit"] == [["work"]]


def test_a_peer_that_is_not_installed_is_a_line_and_no_end(tmp_path, monkeypatch):
    """In CI none of them is installed; elsewhere one is hidden"""
    monkeypatch.setitem(sys.modules, "skorch", None)
    results = pairs.take_turns({"skorch": peers.late("skorch")}, {"raw": lambda work: None}, lambda contestant: contestant(None), rounds=1)
    assert "skorch" in results["skorch"].error
    with pytest.raises(SystemExit, match="Nobody came to the end: skorch: "):
        overhead.report(SHORT, results)


def test_the_environment_of_the_peers_is_apart_and_named_after_its_pins(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = environment.place()
    assert before.parent == tmp_path / "unet_nbtrain" and not environment.is_here() and environment.place() == before
    pins = tmp_path / "peers.txt"
    pins.write_text("lightning==1")
    monkeypatch.setattr(environment, "WANTED", (pins, environment.WANTED[1]))
    assert environment.place() != before
