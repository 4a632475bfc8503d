"""Batches of a view, as the fit loop takes them."""

import math

import keras
import numpy as np

from pipelines.job import Job
from pipelines.mixing import blend, erase, mix
from pipelines.replicas import ALONE, Replicas
from pipelines.shards import View

BETA = 0.999  # of Cui et al. 2019, who try 0.9 to 0.9999


class Batches(keras.utils.PyDataset):
    """One pass over a view, in a given order.

    Yields images float32 (B, S, S, C) in 0-255 with one-hot emotions float32 (B, 7), or with
    landmarks and mask float32 (B, N, 3); a third item, float32 (B,), weighs the loss of each
    where they do not all weigh 1. Metrics stay unweighted. Where there are teachers, their answers
    stand behind the labels, along the last axis. What is mixed into an image is mixed into all
    that belongs to it, with the same share; labels and answers also in proportion to how much
    their images weigh, so that each counts as much as it does alone, times its share.

    Args:
        view: images and labels.
        batch: images in each.
        order: of the view's rows; as they stand by default.
        weights: float32 (n,), of the images; the view's by default.
        answers: float32 (n, …), the teachers'; none by default.
        job: erases and mixes; nothing of the kind by default.
        epoch: draws what is erased and mixed.
        replicas: who trains together; a batch is then this process's part of it.
    """

    def __init__(
        self,
        view: View,
        batch: int,
        order: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        answers: np.ndarray | None = None,
        job: Job | None = None,
        epoch: int = 0,
        replicas: Replicas = ALONE,
    ) -> None:
        super().__init__()
        self.view, self.batch, self.answers = view, batch, answers
        self.weights = view.weights if weights is None else weights
        self.weighted = bool((self.weights != 1).any())
        self.order = np.arange(len(view.ids)) if order is None else order
        self.job, self.epoch, self.replicas = job, epoch, replicas

    def __len__(self) -> int:
        """Return the number of batches, the last of which may be short."""
        return math.ceil(len(self.order) / self.batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """Return a batch."""
        # Ascending rows read the memory map forwards; the order within a batch does not matter.
        rows = np.sort(self.order[index * self.batch : (index + 1) * self.batch])
        own = self.replicas.own(len(rows))
        if not self.job:
            rows = rows[own]
        images, labels = self.view.images[rows].astype(np.float32), self._labels(rows)
        weights = self.weights[rows]
        if self.job:
            rng = np.random.default_rng([self.job.seed, self.epoch, index])
            erase(images, self.job.erase, rng)
            if self.job.mixup or self.job.cutmix:
                images, partner, share = mix(images, self.job.mixup, self.job.cutmix, rng)
                counted = labels * weights[:, None] if self.weighted else labels
                labels, weights = (blend(part, partner, share) for part in (counted, weights))
                if self.weighted:
                    labels /= np.where(weights > 0, weights, 1)[:, None]
            # Only now, because anyone's partner can be in anyone's part.
            images, labels, weights = images[own], labels[own], weights[own]
        return (images, labels, weights) if self.weighted else (images, labels)

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        answers = [] if self.answers is None else [self.answers[rows]]
        if self.view.emotions is not None:
            one_hot = np.eye(7, dtype=np.float32)[self.view.emotions[rows]]
            return np.concatenate([one_hot, *answers], -1) if answers else one_hot
        assert self.view.landmarks is not None and self.view.visible is not None
        visible = self.view.visible[rows][..., None].astype(np.float32)
        return np.concatenate([self.view.landmarks[rows], visible, *answers], -1)


def training_batches(
    job: Job,
    view: View,
    epoch: int,
    answers: np.ndarray | None,
    replicas: Replicas = ALONE,
) -> Batches:
    """Return the batches of one epoch, all of which follows from the job's seed and the epoch.

    What cannot be dealt out evenly to all devices (fewer images than these) is left out of the
    epoch; another epoch has another order.
    """
    order = np.random.default_rng([job.seed, epoch]).permutation(len(view.ids))
    order = order[: replicas.even(len(order))]
    weights = None
    if job.class_weights is not None:
        assert view.emotions is not None
        weights = view.weights * class_weights(view.emotions, job.class_weights)[view.emotions]
    changed = job if job.erase or job.mixup or job.cutmix else None
    return Batches(view, job.batch, order, weights, answers, changed, epoch, replicas)


def class_weights(emotions: np.ndarray, kind: str) -> np.ndarray:
    """Return how much the images of each class count.

    Args:
        emotions: int (n,).
        kind: "balanced", inversely to the class's number of images; or "effective", inversely to
            its effective number (1 - βⁿ) / (1 - β) (Cui et al. 2019, section 4, β 0.999), which
            grows less and less as images look alike.

    Returns:
        float32 (7,), such that the images weigh 1 on average (the paper makes the classes do so),
        for the learning rate then means the same; 0 for a class without images.
    """
    counts = np.bincount(emotions, minlength=7)
    numbers = counts if kind == "balanced" else (1 - BETA**counts) / (1 - BETA)
    weights = np.divide(1, numbers, out=np.zeros(7), where=counts > 0)
    return (weights * len(emotions) / (weights @ counts)).astype(np.float32)
