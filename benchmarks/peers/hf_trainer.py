"""The Trainer of Hugging Face's transformers, with a network wrapped so that it returns its loss"""

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..cases import LEARNING_RATE, Batches, Counts, loader_of


class Wrapped(nn.Module):
    "A network that takes its labels, as the Trainer wants it"

    def __init__(self, work, counts):
        super().__init__()
        self.net, self.criterion, self.counts = work.model, work.criterion, counts

    def forward(self, images, labels):
        logits = self.net(images)
        loss = self.criterion(logits, labels)
        self.counts.update(logits, labels, loss)
        return {"loss": loss, "logits": logits}


class Named(Batches):
    "Batches as mappings"

    def __getitem__(self, i):
        images, masks = super().__getitem__(i)
        return {"images": images, "labels": masks}


class Marks(TrainerCallback):
    "The ends of training and epoch"

    def __init__(self, work, counts):
        self.work, self.counts = work, counts

    def on_epoch_end(self, args, state, control, **given):
        self.numbers = self.counts.compute()

    def on_evaluate(self, args, state, control, **given):
        self.work.mark(self.numbers, self.counts.compute())


class Loaded(Trainer):
    "With loaders of our own"

    def get_train_dataloader(self):
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset=None):
        return self.val_loader


def fit(work):
    counts = Counts()
    train, val = (Named(data.batches, data.length, data.clock) for data in (work.train_data, work.val_data))
    arguments = TrainingArguments(
        output_dir=work.folder, num_train_epochs=work.epochs, per_device_train_batch_size=work.case.batch, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=work.clip or 0.0, eval_strategy="epoch", prediction_loss_only=True, save_strategy="no",
        logging_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )
    trainer = Loaded(
        model=Wrapped(work, counts), args=arguments, train_dataset=train, eval_dataset=val, optimizers=(work.optimizer(), None),
        callbacks=[Marks(work, counts)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train_loader, trainer.val_loader = loader_of(train), loader_of(val)
    trainer.train()
