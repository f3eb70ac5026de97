"""Run a notebook in a real kernel of this very Python, telling cell by cell what happens."""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def use_this_environment():
    """Make `python3` mean the kernel of this environment, not one that the user installed elsewhere under the same name."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    here = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", "")])


def run_notebook(
    nb,  # The notebook; its outputs are filled in place
    cwd,  # Where its cells run
    skip=lambda cell: False,  # Cells that keep the outputs they have
    timeout=1800,  # Seconds for one cell
):
    """Execute `nb` and return None, or the text of the error that stopped it."""
    use_this_environment()
    todo = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip() and not skip(cell)]
    started = time.monotonic()

    def say(cell, cell_index, **_):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
        at = next(i for i, other in enumerate(todo, 1) if other is cell)
        print(f"  {time.monotonic() - started:5.1f} s  cell {at} of {len(todo)}: {lines[0][:80] if lines else ''}", flush=True)

    client = _Client(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(cwd)}},
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],  # a newer kernel warns of unencrypted loopback each time
    )
    client.wanted, client.on_cell_execute = todo, say
    try:
        client.execute()
    except CellExecutionError as error:
        return str(error)
    return None


class _Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if any(cell is o for o in self.wanted):
            cell = await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        return cell


def read(path):
    return nbformat.read(path, as_version=4)


def write(nb, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
