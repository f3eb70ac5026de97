"""One training in alternating stretches: with the open panel at work, and with the panel open but still."""

import time

import torch


class Switch:
    "A panel that can be told to hold still: it hears of nothing and paints nothing"

    def __init__(self, panel):
        self.trainer, self.pump, self.painter = panel.trainer, panel._pump, panel._pump.painter
        self.watcher, self.samples = panel._watcher, panel._samples
        self.paces, self.on = (self.pump.pictures, self.samples.pace, panel._looks), True
        self.pump.painter = self  # In the place of what the panel's thread calls to paint

    def __call__(self, with_picture):
        if self.on:
            self.painter(with_picture)

    def alive(self):
        return self.on and self.painter.alive()

    def busy(self):
        return self.on and self.painter.busy()

    def turn(self, on):
        "Be at work or still; the time in which it is still brings nothing nearer that comes by the clock"
        if on == self.on:
            return
        self.on, self.trainer.worst = on, None
        for ear in (self.watcher, self.samples):
            (self.trainer.observers.add if on else self.trainer.observers.remove)(ear)
        if on:
            for pace, rest in zip(self.paces, self.rests):
                pace.postpone(rest)
            self.samples._last += time.monotonic() - self.since
            self.watcher.bell.set()  # It sleeps while nothing is to be done
        else:
            self.rests, self.since = [pace.rest for pace in self.paces], time.monotonic()


def alternating(pairs):
    "Whether the panel is on in each of so many pairs of stretches: off, on, on, off, off, on, …"
    return [on for pair in range(pairs) for on in ((True, False) if pair % 2 else (False, True))]


def watched(trainer, epochs, observer):
    "A training in the background with the panel open, which is gone afterwards; `observer` makes one more observer, given the panel"
    from unet_nbtrain.panel import TrainerPanel

    panel = TrainerPanel(trainer=trainer, num_epochs=epochs)
    panel.show()
    trainer.observers.add(observer(panel))
    try:
        trainer.start(epochs)  # Not `panel.start()`, which looks at the masks first and wants single images in the data set
        panel.wait()
    finally:
        panel._pump.close()
        panel._pump.thread.join()


class Batches:
    """An observer that turns a switch every so many training batches of one long epoch.

    `took` has what Linux's scheduler tells of each stretch: wall seconds, seconds in which this thread computed and in which it was ready but
    had no core, and those in which the panel's thread computed.
    """

    def __init__(self, switch, steps, order):
        self.switch, self.steps, self.order, self.took = switch, steps, order, []

    def _look(self):
        with open("/proc/thread-self/schedstat") as file:
            computed, ready, _ = map(int, file.read().split())
        with open(f"/proc/self/task/{self.switch.pump.thread.native_id}/schedstat") as file:
            panel = int(file.read().split()[0])
        return time.monotonic_ns(), computed, ready, panel

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train" and trainer.batch % self.steps == 1:
            if trainer.batch > 1:
                found = [(b - a) / 1e9 for a, b in zip(self.begun, self._look())]
                self.took.append(dict(zip(("wall", "computed", "ready", "panel"), found)))
            if len(self.took) < len(self.order):
                self.switch.turn(self.order[len(self.took)])
            self.begun = self._look()


def in_one_epoch(width, pixels, size, steps, pairs, name):
    "What each stretch of a training took that consists of one long epoch, so that no file is written meanwhile"
    from unet_nbtrain import TrainerPanel, UNet
    from unet_nbtrain.trainer import UNetTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    order = alternating(pairs)
    images = [torch.rand(size, 3, pixels, pixels) for _ in range(20)]
    count = steps * len(order) + 2
    train = [(x, (x[:, :1] > 0.5).float()) for x in (images * (1 + count // 20))[:count]]
    trainer = UNetTrainer(UNet(3, 1, width=width, depth=2), train, train[:2], device="cpu", run_dir=f"runs/{name}")
    panel = TrainerPanel(trainer=trainer, num_epochs=1)
    panel.show()
    stretches = Batches(Switch(panel), steps, order)
    trainer.observers.add(stretches)
    panel.start().wait()
    panel._pump.close()
    return stretches.took
