"""Ignite: two engines with the step functions of its documentation"""

import torch
from ignite.engine import Engine, Events
from torch import nn

from ..cases import Counts


def fit(work):
    model, criterion, optimizer, counts = work.model, work.criterion, work.optimizer(), Counts()
    parameters = list(model.parameters())

    def train_step(engine, batch):
        model.train()
        images, masks = batch
        optimizer.zero_grad()
        logits = model(images)
        loss = criterion(logits, masks)
        loss.backward()
        if work.clip:
            nn.utils.clip_grad_norm_(parameters, work.clip)
        optimizer.step()
        return logits.detach(), masks, loss.detach()

    def val_step(engine, batch):
        model.eval()
        with torch.no_grad():
            images, masks = batch
            logits = model(images)
            return logits, masks, criterion(logits, masks)

    trainer, evaluator = Engine(train_step), Engine(val_step)
    for engine in (trainer, evaluator):
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: counts.update(*engine.state.output))

    @trainer.on(Events.EPOCH_COMPLETED)
    def _(engine):
        numbers = counts.compute()
        evaluator.run(work.val)
        work.mark(numbers, counts.compute())

    trainer.run(work.train, max_epochs=work.epochs)
