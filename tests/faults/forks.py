"""Processes that begin with PyTorch imported: one server imports it and forks, so that a test does not wait for the import each time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SERVER = """
import json, os, signal, sys, threading, time, traceback
import torch, torch._dynamo, torch.utils.tensorboard, torch.utils.tensorboard.summary
sys.path.insert(0, sys.argv[1])
from process_parts import At, RunLog, logged, new_trainer

torch.set_num_threads(1)
for line in sys.stdin:
    code, arguments, out = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["", *arguments]
        exec(code)
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """A process that runs some code, and what it prints"""

    def __init__(self, server, code, arguments, out):
        self.server, self.out = server, Path(out)
        server.stdin.write(json.dumps([code, [str(o) for o in arguments], str(out)]) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def text(self):
        return self.out.read_text() if self.out.exists() else ""

    def until_it_prints(self, seconds=60):
        end = time.monotonic() + seconds
        while not self.text().strip():
            assert time.monotonic() < end, "the process says nothing"
            time.sleep(0.01)

    def send(self, signal):
        os.kill(self.pid, signal)

    def wait(self):
        """The exit code; minus the signal that ended it"""
        return int(self.server.stdout.readline())


def new_server():
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
