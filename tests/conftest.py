"""What holds for every test: a clean Jupyter environment, and no browser test may go missing where one is required."""

import gc
import os

import pytest

# Read once, when torch is loaded: its idle threads sleep instead of spinning, which matters as soon as cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REQUIRE_BROWSER = os.environ.get("REQUIRE_BROWSER") == "1"
_ran_in_browser = []


def pytest_configure(config):
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With REQUIRE_BROWSER=1 a skipped browser test is a failed one."""
    report = (yield).get_result()
    if not item.get_closest_marker("browser") or item.get_closest_marker("network"):
        return
    if report.when == "call" and report.passed:
        _ran_in_browser.append(item.nodeid)
    if REQUIRE_BROWSER and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{item.nodeid} must not be skipped (REQUIRE_BROWSER=1). {reason}"


def pytest_sessionfinish(session, exitstatus):
    """With REQUIRE_BROWSER=1 a run in which no browser test passed is a failed run: a whole file may have been skipped."""
    if REQUIRE_BROWSER and not _ran_in_browser and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if REQUIRE_BROWSER and not _ran_in_browser:
        terminalreporter.write_line("REQUIRE_BROWSER=1, but no browser test ran.", red=True)


def forget_the_past():
    """Later rounds of the garbage collector need not look through what is there now: with a whole suite behind them, each takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """A file of tests begins as if it were the first."""
    forget_the_past()


@pytest.fixture
def one_thread():
    """PyTorch on one thread and from one seed: the same bits whatever ran before, and no fight for the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
