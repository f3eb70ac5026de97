"""A real kernel, driven over its comms as a front end does it, without a browser."""

import os
import queue
import time

from jupyter_client.manager import start_new_kernel


class Kernel:
    """A kernel, and what its comms have told so far"""

    def __init__(self, cwd, paths=()):
        """`paths` are folders of packages that come before the installed ones"""
        path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.manager, self.client = start_new_kernel(cwd=str(cwd), env=dict(os.environ, PYTHONPATH=path))
        self.models, self.displays, self.complaints, self.updates = {}, [], "", 0

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def _hear(self, message):
        content, kind = message["content"], message["msg_type"]
        if kind == "comm_open":
            self.models[content["comm_id"]] = dict(content["data"].get("state", {}))
        elif kind == "comm_msg" and content["data"].get("method") == "update":
            self.updates += 1
            self.models.setdefault(content["comm_id"], {}).update(content["data"]["state"])
        elif kind in ("display_data", "update_display_data"):
            self.displays.append((kind, content["data"]))
        elif kind == "error" or (kind == "stream" and content["name"] == "stderr"):
            self.complaints += content.get("text") or "\n".join(content["traceback"])

    def drain(self, seconds=0.05):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                self._hear(self.client.get_iopub_msg(timeout=left))
            except queue.Empty:
                return

    def send(self, code):
        """Run a cell and don't wait; when it fails, the kernel does not throw away what is sent next"""
        return self.client.execute(code, user_expressions={}, stop_on_error=False)

    def run(self, code, timeout=60):
        """Run a cell to its end; the text of its last expression"""
        identity = self.client.execute(f"_ = eval({code!r})" if "\n" not in code else code, user_expressions={"it": "_"})
        while True:
            reply = self.client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == identity:
                break
        self.drain()
        assert reply["content"]["status"] == "ok", reply["content"].get("traceback")
        return reply["content"]["user_expressions"]["it"].get("data", {}).get("text/plain")

    def wait_for(self, identity, timeout):
        """Wait for the end of a cell that was sent"""
        while self.client.get_shell_msg(timeout=timeout)["parent_header"].get("msg_id") != identity:
            pass

    def find(self, model, **state):
        """The first widget of a kind with such a state, or None"""
        of_kind = ((i, s) for i, s in self.models.items() if s.get("_model_name") == model)
        return next((i for i, s in of_kind if all(s.get(key) == value for key, value in state.items())), None)

    def button(self, text):
        return self.find("ButtonModel", description=text)

    def click(self, text, subshell=None):
        self.until(lambda: self.button(text), f"a button {text}")
        self._tell(self.button(text), {"method": "custom", "content": {"event": "click"}}, subshell)

    def change(self, widget, **state):
        """What a front end sends when somebody changes a widget"""
        self._tell(widget, {"method": "update", "state": state, "buffer_paths": []})

    def _tell(self, widget, data, subshell=None):
        message = self.client.session.msg("comm_msg", {"comm_id": widget, "data": data})
        if subshell:
            message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)

    def new_subshell(self):
        """The name of a subshell, as JupyterLab makes one for clicks; None where the kernel knows none"""
        identity = self.client.kernel_info()
        while (reply := self.client.get_shell_msg(timeout=20))["parent_header"].get("msg_id") != identity:
            pass
        if "kernel subshells" not in reply["content"].get("supported_features", ()):
            return None
        self.client.control_channel.send(self.client.session.msg("create_subshell_request", {}))
        return self.client.get_control_msg(timeout=10)["content"]["subshell_id"]

    def markup(self):
        return "".join(str(state.get("value", "")) for state in self.models.values() if state.get("_model_name") == "HTMLModel")

    def until(self, condition, what, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return
            self.drain()
        raise AssertionError(f"no {what} within {seconds} s; the panel says: {self.markup()[-1500:]} {self.complaints[-1500:]}")


SETUP = """
import logging, threading, time, torch
from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
torch.set_num_threads(1)
loaders = demo_dataloaders(n_train=24, n_val=4, size=64, batch_size=2, num_workers={workers})
panel = TrainerPanel(UNet(3, 1, width=8, depth=2), loaders, num_epochs=500, device="cpu", run_dir={run!r})
panel.show()
"""
BUSY_SECONDS = 60  # Only a click that is not heard takes so long
BUSY = f"""
end = time.time() + {BUSY_SECONDS}
while time.time() < end and panel.trainer.run.state != "paused":
    sum(range(1000))
paused_meanwhile, step = panel.trainer.run.state == "paused", panel.trainer.global_step
"""


def open_panel(kernel, tmp_path, workers=0):
    kernel.run(SETUP.format(workers=workers, run=str(tmp_path / "run")))


def seconds_until(kernel, condition, what):
    began = time.monotonic()
    kernel.until(condition, what)
    return time.monotonic() - began


def steps(kernel):
    return int(kernel.run("panel.trainer.global_step"))


def whole_flow(kernel, tmp_path):
    """Everything a person does with a panel, from `show` to what the saved notebook keeps; seconds of the pause, and of one while a cell is busy"""
    open_panel(kernel, tmp_path)
    subshell, took = kernel.new_subshell(), {}
    kernel.click("Start", subshell)
    kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'")
    assert kernel.run("1 + 1") == "2"

    kernel.click("Pause", subshell)
    took["pause"] = seconds_until(kernel, lambda: ">paused<" in kernel.markup(), "badge 'paused'")
    at = steps(kernel)
    time.sleep(0.5)
    assert steps(kernel) == at
    kernel.change(kernel.find("TextModel", description="learning rate"), value="0.0004")
    kernel.change(kernel.find("TabModel"), selected_index=3)
    kernel.click("Resume", subshell)
    kernel.until(lambda: steps(kernel) > at, "further step")
    kernel.until(lambda: float(kernel.run("panel.trainer.learning_rate")) == 0.0004, "new learning rate")
    kernel.until(lambda: "<b>Machine</b>" in kernel.markup(), "tab with numbers")
    kernel.click("Save", subshell)
    kernel.until(lambda: "Saved after step" in kernel.markup(), "saved checkpoint")

    if subshell:
        identity = kernel.send(BUSY)
        time.sleep(0.5)
        kernel.click("Pause", subshell)
        took["pause, busy"] = seconds_until(kernel, lambda: ">paused<" in kernel.markup(), "badge 'paused' while a cell is busy")
        kernel.wait_for(identity, BUSY_SECONDS + 30)
        assert kernel.run("paused_meanwhile") == "True", "the click was handled only after the cell"
        kernel.click("Resume", subshell)
        kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'")

    kernel.run("panel.show()")
    views = [data["application/vnd.jupyter.widget-view+json"]["model_id"] for _, data in kernel.displays if "application/vnd.jupyter.widget-view+json" in data]
    assert len(views) == 2 and views[0] == views[1]
    kernel.click("Stop", subshell)
    kernel.until(lambda: kernel.button("Continue"), "Continue button")
    kernel.until(lambda: any("text/html" in data and "data:image/png" in data["text/html"] for kind, data in kernel.displays if kind == "update_display_data"), "still")
    best = "torch.load(panel.trainer.checkpoint_dir / 'best_model.pth')['model_state_dict']"
    assert kernel.run(f"all(map(torch.equal, {best}.values(), panel.trainer.model.state_dict().values()))") == "True"
    assert "Traceback" not in kernel.complaints, kernel.complaints
    return took
