"""MONAI: `SupervisedTrainer` with a `SupervisedEvaluator` after each epoch"""

import logging

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.utils.enums import CommonKeys
from torch import nn

from ..cases import Counts


def fit(work):
    device, parameters, train_counts, val_counts = torch.device("cpu"), list(work.model.parameters()), Counts(), Counts()
    evaluator = SupervisedEvaluator(device=device, val_data_loader=work.val, network=work.model, decollate=False)
    trainer = SupervisedTrainer(
        device=device, max_epochs=work.epochs, train_data_loader=work.train, network=work.model, optimizer=work.optimizer(),
        loss_function=work.criterion, train_handlers=[ValidationHandler(validator=evaluator, interval=1, epoch_level=True)], decollate=False,
    )
    for engine in (trainer, evaluator):
        engine.logger.setLevel(logging.ERROR)

    @trainer.on(IterationEvents.MODEL_COMPLETED)
    def _(engine):
        output = engine.state.output
        train_counts.update(output[CommonKeys.PRED], output[CommonKeys.LABEL], output[CommonKeys.LOSS])

    @evaluator.on(IterationEvents.MODEL_COMPLETED)
    def _(engine):
        logits, masks = engine.state.output[CommonKeys.PRED], engine.state.output[CommonKeys.LABEL]
        val_counts.update(logits, masks, work.criterion(logits, masks))

    if work.clip:
        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda engine: nn.utils.clip_grad_norm_(parameters, work.clip))

    @trainer.on(Events.EPOCH_COMPLETED)  # Registered last, so it runs after the validation
    def _(engine):
        work.mark(train_counts.compute(), val_counts.compute())

    trainer.run()
