"""skorch: `NeuralNet.partial_fit` on data sets whose items are batches"""

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, GradientNormClipping
from skorch.helper import predefined_split
from torch import nn

from ..cases import LEARNING_RATE, Counts


class Sums(Callback):
    "The lean sums"

    def __init__(self, work):
        self.work, self.train_counts, self.val_counts = work, Counts(), Counts()

    def on_batch_end(self, net, batch, training, **given):
        counts = self.train_counts if training else self.val_counts
        counts.update(given["y_pred"], batch[1], given["loss"])

    def on_epoch_end(self, net, **given):
        self.work.mark(self.train_counts.compute(), self.val_counts.compute())


def fit(work):
    net = NeuralNet(
        lambda: work.model, criterion=nn.BCEWithLogitsLoss, optimizer=torch.optim.AdamW, lr=LEARNING_RATE, max_epochs=work.epochs,
        batch_size=None, iterator_train__shuffle=False, train_split=predefined_split(work.val_data), verbose=0, device="cpu",
        callbacks=[("sums", Sums(work)), *([("clip", GradientNormClipping(work.clip))] if work.clip else [])],
    )
    net.initialize()
    net.partial_fit(work.train_data)
