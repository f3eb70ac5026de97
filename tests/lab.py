"""A real JupyterLab on loopback, and Chromium looking at it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

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
    """JupyterLab with a home of its own, so that nobody's settings change the test."""

    def __init__(self, root, home, dark=False):
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
        options += ["--no-browser", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--allow-root", "--LabApp.expose_app_in_browser=True"]
        self.log = Path(home) / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log, cwd=root)
        self._wait_until_it_answers()

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


class Lab:
    """One browser page on one notebook."""

    def __init__(self, playwright, server, dark=False, scale=2):
        self.server = server
        self.browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=CHROMIUM_FLAGS)
        scheme = "dark" if dark else "light"
        self.page = self.browser.new_context(
            viewport={"width": 1320, "height": 1000}, device_scale_factor=scale, color_scheme=scheme
        ).new_page()

    def open(self, name):
        self.page.goto(f"http://127.0.0.1:{self.server.port}/lab/tree/{name}?token={self.server.token}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.wait_until_ready()

    def wait_until_ready(self):
        self.page.wait_for_function(READY, timeout=90_000)

    def reload(self):
        self.page.evaluate("async () => { await jupyterapp.commands.execute('docmanager:save') }")
        self.page.reload()
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        self.wait_until_ready()

    def run_cell(self, index, wait=True):
        self.page.evaluate(RUN_CELL, [index, wait])

    def cell(self, index):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def panel(self):
        return self.page.locator(".unt-panel").first

    def button(self, text):
        """By its text: the glyph of the icon is part of the accessible name"""
        return self.panel().locator("button.widget-button", has_text=text)

    def badge(self):
        return self.panel().locator(".unt-badge").inner_text()

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
        raise AssertionError(f"no {what} within {seconds} s; the panel says: {self.panel().inner_text()!r}")

    def close(self):
        self.browser.close()
