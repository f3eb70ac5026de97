"""Lightning: a `LightningModule` and a `Trainer`, without logger, bar, summary and checkpoints"""

import lightning

from ..cases import Counts


class Module(lightning.LightningModule):
    "The steps of its documentation; the numbers go into the lean sums and not through `self.log`"

    def __init__(self, work):
        super().__init__()
        self.net, self.work, self.train_counts, self.val_counts = work.model, work, Counts(), Counts()

    def configure_optimizers(self):
        return self.work.optimizer()

    def training_step(self, batch, index):
        images, masks = batch
        logits = self.net(images)
        loss = self.work.criterion(logits, masks)
        self.train_counts.update(logits, masks, loss)
        return loss

    def validation_step(self, batch, index):
        images, masks = batch
        logits = self.net(images)
        self.val_counts.update(logits, masks, self.work.criterion(logits, masks))

    def on_train_epoch_end(self):  # Lightning calls it after the validation
        self.work.mark(self.train_counts.compute(), self.val_counts.compute())


def fit(work):
    trainer = lightning.Trainer(
        max_epochs=work.epochs, accelerator="cpu", devices=1, gradient_clip_val=work.clip, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=work.folder,
    )
    trainer.fit(Module(work), work.train, work.val)
