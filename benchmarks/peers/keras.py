"""Keras on PyTorch: `compile` and `fit`; its own AdamW with PyTorch's numbers, whose epsilon stands in another place"""

import keras
from torch.nn import functional as F

from ..cases import LEARNING_RATE, Counts


class Model(keras.Model):
    "The network in its wrapper, with the lean sums in place of Keras' metrics"

    def __init__(self, work):
        super().__init__()
        self.net, self.counts = keras.layers.TorchModuleWrapper(work.model), Counts()

    def call(self, images, training=None):
        return self.net(images, training=training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.counts.update(y_pred, y, F.binary_cross_entropy_with_logits(y_pred.detach(), y))
        return {}


class Marks(keras.callbacks.Callback):
    "The ends of training and epoch"

    def __init__(self, work, counts):
        super().__init__()
        self.work, self.counts = work, counts

    def on_test_begin(self, logs=None):
        self.numbers = self.counts.compute()

    def on_epoch_end(self, epoch, logs=None):
        self.work.mark(self.numbers, self.counts.compute())


def fit(work):
    model = Model(work)
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=0.01, epsilon=1e-8, global_clipnorm=work.clip)
    model.compile(optimizer=optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    model.build((work.case.batch, 3, work.case.pixels, work.case.pixels))
    model.fit(work.train, validation_data=work.val, epochs=work.epochs, verbose=0, callbacks=[Marks(work, model.counts)])
