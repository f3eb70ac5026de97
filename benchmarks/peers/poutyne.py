"""Poutyne: `Model.fit_generator`; the loss function gathers the sums, since it sees the predictions"""

from poutyne import Callback, ClipNorm, Model

from ..cases import Counts


class Marks(Callback):
    "The ends of training and epoch"

    def __init__(self, work, counts):
        super().__init__()
        self.work, self.counts = work, counts

    def on_valid_begin(self, logs):
        self.numbers = self.counts.compute()

    def on_epoch_end(self, epoch, logs):
        self.work.mark(self.numbers, self.counts.compute())


def fit(work):
    counts = Counts()

    def loss_function(logits, masks):
        loss = work.criterion(logits, masks)
        counts.update(logits, masks, loss)
        return loss

    model = Model(work.model, work.optimizer(), loss_function, device=None)
    clip = [ClipNorm(list(work.model.parameters()), work.clip)] if work.clip else []
    model.fit_generator(work.train, work.val, epochs=work.epochs, callbacks=[*clip, Marks(work, counts)], verbose=False)
