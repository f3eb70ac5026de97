"""fastai: a `Learner` with the callbacks that train; PyTorch's AdamW in its wrapper"""

import torch
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.optimizer import OptimWrapper

from ..cases import LEARNING_RATE, Counts


class Sums(Callback):
    "The lean sums, after the Recorder"

    order = 60

    def __init__(self, work):
        self.work, self.counts = work, Counts()

    def after_batch(self):
        self.counts.update(self.pred, self.yb[0], self.learn.loss)

    def after_train(self):
        self.numbers = self.counts.compute()

    def after_epoch(self):
        self.work.mark(self.numbers, self.counts.compute())


def fit(work):
    learner = Learner(
        DataLoaders(work.train, work.val, device=torch.device("cpu")), work.model, loss_func=work.criterion,
        opt_func=lambda parameters, lr=None, **options: OptimWrapper(parameters, torch.optim.AdamW, lr=LEARNING_RATE),
        lr=LEARNING_RATE, path=work.folder, train_bn=False, default_cbs=False,
        cbs=[TrainEvalCallback(), Recorder(), Sums(work), *([GradientClip(work.clip)] if work.clip else [])],
    )
    learner.logger, learner.create_mbar = lambda *args, **options: None, False
    learner.fit(work.epochs, lr=LEARNING_RATE)
