"""An observer that keeps what a training tells of its problems."""


class Heard:
    def __init__(self):
        self.problems = []

    def on_problem(self, trainer, text):
        self.problems.append(text)
