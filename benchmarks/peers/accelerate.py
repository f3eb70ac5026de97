"""Accelerate: the raw loop with its objects wrapped"""

import torch
from accelerate import Accelerator

from ..cases import Counts


def fit(work):
    accelerator = Accelerator(cpu=True)
    model, optimizer, train, val = accelerator.prepare(work.model, work.optimizer(), work.train, work.val)
    counts = Counts()
    for _ in range(work.epochs):
        model.train()
        for images, masks in train:
            optimizer.zero_grad()
            logits = model(images)
            loss = work.criterion(logits, masks)
            accelerator.backward(loss)
            if work.clip:
                accelerator.clip_grad_norm_(model.parameters(), work.clip)
            optimizer.step()
            counts.update(logits, masks, loss)
        numbers = counts.compute()
        model.eval()
        with torch.no_grad():
            for images, masks in val:
                logits = model(images)
                counts.update(logits, masks, work.criterion(logits, masks))
        work.mark(numbers, counts.compute())
    accelerator.free_memory()
