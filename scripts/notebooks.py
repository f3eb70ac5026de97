"""Execute notebooks in place, store their outputs, clean them, export the modules and render the README.

    python scripts/notebooks.py                    all of them, in import order
    python scripts/notebooks.py nbs/00_core.ipynb  this one
"""

import argparse
import os
import sys
from configparser import ConfigParser
from pathlib import Path

import readme
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbrun import read, run_notebook, write

ROOT = Path(__file__).resolve().parents[1]


def switched_off():
    """Tells of a cell whether it needs what this machine may lack (`#| cuda`), or is never run (`#| eval: false`)."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    flags = {*ini["DEFAULT"]["tst_flags"].split(), "eval: false"} - set(os.environ.get("NB_FLAGS", "slow").split())

    def check(cell):
        found = {line.lstrip("#").strip().lstrip("|").strip() for line in cell.source.splitlines() if line.startswith("#|")}
        return bool(found & flags) or "nbdev_export(" in cell.source

    return check


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, help="paths of notebooks (default: all)")
    args = parser.parse_args()
    os.chdir(ROOT)
    failed = []
    for path in args.notebook or sorted(Path("nbs").glob("*.ipynb")):
        print(path, flush=True)
        nbdev_export.__wrapped__(path=str(path))
        nb = read(path)
        error = run_notebook(nb, "nbs", switched_off())
        write(nb, path)
        nbdev_clean.__wrapped__(fname=str(path))
        if error:
            failed.append(path.name)
            print(error)
    nbdev_export.__wrapped__()
    readme.write()
    sys.exit(f"Failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
