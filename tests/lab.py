"""A real JupyterLab on loopback, which serves Notebook 7 as well, and Chromium looking at them."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FOLDERS = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "IPYTHONDIR": "ipython",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
}
QUIET = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}


def chromium():
    """The path of a Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Server:
    """JupyterLab with a home of its own, so that nobody's settings change the test.

    Where the package `notebook` is installed, the same server has Notebook 7 at `/notebooks/`.
    """

    def __init__(self, root, home, dark=False):
        self.root = Path(root)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.token = secrets.token_hex(12)
        env = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for name, folder in FOLDERS.items():
            env[name] = str(Path(home) / folder)
            Path(env[name]).mkdir(parents=True)
        theme = {"@jupyterlab/apputils-extension/themes": {"theme": "JupyterLab Dark"}} if dark else {}
        for plugin, settings in (QUIET | theme).items():
            file = Path(env["JUPYTERLAB_SETTINGS_DIR"]) / f"{plugin}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))
        options = [f"--port={self.port}", f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={root}"]
        options += ["--no-browser", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--allow-root"]
        options += ["--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"]
        self.log = Path(home) / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log, cwd=root)
        self._wait_until_it_answers()

    def address(self, name, app="lab"):
        """Where a page of this server is; `app` is `lab` or `notebook`"""
        place = {"lab": "lab/tree/", "notebook": "notebooks/"}[app]
        return f"http://127.0.0.1:{self.port}/{place}{name}?token={self.token}" + ("&reset" if app == "lab" else "")

    def write(self, name, cells):
        """A notebook of these code cells, in the server's folder"""
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells], metadata=kernel)
        nbformat.write(book, self.root / name)
        return self.root / name

    def api(self, path, method="GET"):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"token {self.token}")
        body = urllib.request.urlopen(request, timeout=20).read()
        return json.loads(body) if body else None

    def _wait_until_it_answers(self):
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.api("/api/status")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def close(self):
        for kernel in self.api("/api/kernels"):
            self.api(f"/api/kernels/{kernel['id']}", "DELETE")
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# The page says "idle" about half a second before the kernel is connected, and a cell run in between hangs for ever.
READY = """() => {
  const widget = window.jupyterapp?.shell.currentWidget;
  const kernel = widget?.sessionContext?.session?.kernel;
  return !!(kernel && widget.sessionContext.isReady && kernel.status === 'idle' && kernel.connectionStatus === 'connected' && widget.isRevealed);
}"""
RUN_CELL = """async ([index, wait]) => {
  const app = window.jupyterapp, notebook = app.shell.currentWidget.content;
  notebook.activeCellIndex = index; notebook.deselectAll();
  const done = app.commands.execute('notebook:run-cell');
  if (wait) await done;
}"""


# Notes each click on a button of a panel, and each new badge when it has been painted, in milliseconds of the page's own clock.
PROBE = """() => {
  window.untSeen = []; window.untClicked = [];
  document.addEventListener('click', event => { if (event.target.closest('.unt-panel button')) window.untClicked.push(event.timeStamp); }, true);
  const look = () => {
    const badge = document.querySelector('.unt-panel .unt-badge')?.textContent, last = window.untSeen.at(-1)?.[0];
    if (badge !== undefined && badge !== last) {
      const seen = [badge, null]; window.untSeen.push(seen);
      requestAnimationFrame(() => setTimeout(() => { seen[1] = performance.now(); }));
    }
  };
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
  look();
}"""


class Page:
    """One page of a browser; it counts what the kernel sends, and keeps the dialogs and errors of scripts"""

    def __init__(self, server, context):
        self.server, self.page = server, context.new_page()
        self.messages = self.bytes = 0
        self.dialogs, self.errors = [], []
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._count) if "/api/kernels/" in socket.url else None)
        self.page.on("dialog", self._answer)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _answer(self, dialog):
        if dialog.type != "beforeunload":  # JupyterLab asks so itself when something is not saved
            self.dialogs.append(dialog.message)
        dialog.accept()

    def _count(self, frame):
        self.messages += 1
        self.bytes += len(frame)

    def open(self, name, app="lab"):
        self.page.goto(self.server.address(name, app))
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.wait_until_ready()

    def wait_until_ready(self):
        self.page.wait_for_function(READY, timeout=90_000)

    def command(self, name, **arguments):
        """Run a command of JupyterLab and wait for its end"""
        self.page.evaluate("async ([name, arguments]) => { await jupyterapp.commands.execute(name, arguments) }", [name, arguments])

    def save(self):
        self.command("docmanager:save")

    def reload(self):
        self.save()
        self.page.reload()
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.wait_until_ready()

    def dark(self, on=True):
        """Change the theme of JupyterLab"""
        self.command("apputils:change-theme", theme=f"JupyterLab {'Dark' if on else 'Light'}")
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=str(not on).lower())

    def run_cell(self, index, wait=True):
        self.page.evaluate(RUN_CELL, [index, wait])

    def cell(self, index):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def output(self, index):
        """What a cell prints when it is run"""
        self.run_cell(index)
        return self.cell(index).locator(".jp-OutputArea-output").last.inner_text()

    def panel(self):
        return self.page.locator(".unt-panel").first

    def button(self, text):
        """By its text: the glyph of the icon is part of the accessible name"""
        return self.panel().locator("button.widget-button", has_text=re.compile(rf"^\s*{text}\s*$"))

    def badge(self):
        return self.panel().locator(".unt-badge").inner_text()

    def tab(self, title):
        """Look at a tab of the panel"""
        self.panel().locator(".lm-TabBar-tab", has_text=re.compile(rf"^{title}$")).click()

    def picture(self):
        """The address of the curves' picture; it changes with each new picture"""
        return self.panel().locator("img.unt-plot").get_attribute("src")

    def until(self, condition, what, seconds=30):
        """Seconds until a condition holds"""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            if condition():
                return time.monotonic() - began
            self.page.wait_for_timeout(20)
        said = [panel.inner_text() for panel in self.page.locator(".unt-panel").all()]
        raise AssertionError(f"no {what} within {seconds} s; the panels say: {said!r}")

    def heap(self):
        """Megabytes of living JavaScript objects, after the collection of garbage"""
        session = self.page.context.new_cdp_session(self.page)
        for _ in range(3):
            session.send("HeapProfiler.collectGarbage")
        session.send("Performance.enable")
        metrics = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
        session.detach()
        return metrics["JSHeapUsedSize"] / 1e6


def npm_file(package, inside):
    """The text of a file in an npm package, fetched into a temporary folder; None where npm cannot fetch it"""
    if shutil.which("npm") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, timeout=60, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
        shutil.unpack_archive(next(Path(folder).glob("*.tgz")), folder)
        return (Path(folder) / "package" / inside).read_text(encoding="utf-8")


AXE = """async () => (await axe.run('.unt-panel', {resultTypes: ['violations']})).violations
  .flatMap(rule => rule.nodes.map(node => [rule.impact, rule.id, node.html.slice(0, 200), node.failureSummary]))"""


def faults(page):
    """What axe-core finds in the panels of a page, whose script has been put there: impact, rule, markup, and how to mend it"""
    return page.evaluate(AXE)


class Lab(Page):
    """A browser with one page"""

    def __init__(self, playwright, server, dark=False, scale=2):
        self.browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=CHROMIUM_FLAGS)
        scheme = "dark" if dark else "light"
        self.context = self.browser.new_context(viewport={"width": 1320, "height": 1000}, device_scale_factor=scale, color_scheme=scheme)
        super().__init__(server, self.context)

    def another(self):
        """One more page of the same browser"""
        return Page(self.server, self.context)

    def close(self):
        self.browser.close()
