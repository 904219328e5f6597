"""What a run sees when, so that a resumed one sees it again."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .errors import UserError


def batches_had(trainer: Any) -> int:
    """How many batches a run has had, through all of its resumptions."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def seed_of(*numbers: int) -> int:
    """One number of several, for a generator of random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochSampler(Sampler[tuple[int, int]]):
    """This process' share of batches, as (epoch, index): an epoch is a permutation, less what does not fill a batch.

    Args:
        images: how many there are.
        batch: images a step, of all processes together.
        seed: of the permutations.
        rank: of this process.
        processes: how many share a batch.
        taken: gives the number of batches that the run has had: the sampler goes on from there.
        limit: Lightning's ``limit_train_batches``, after which an epoch ends: a number, or a share as a float.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        seed: int,
        rank: int,
        processes: int,
        taken: Callable[[], int],
        limit: int | float = 1.0,
    ) -> None:
        if images < batch:
            raise UserError(f"a batch of {batch} images is more than the {images} there are")
        if batch % processes:
            raise UserError(f"a batch of {batch} images cannot be shared by {processes} processes")
        self.images, self.batch, self.seed, self.taken = images, batch, seed, taken
        self.share = slice(rank * batch // processes, (rank + 1) * batch // processes)
        self.steps = images // batch
        self.epoch = int(self.steps * limit) if isinstance(limit, float) else min(self.steps, limit)
        if self.epoch < 1:
            raise UserError(f"limit_train_batches {limit} leaves nothing of an epoch of {self.steps} batches")

    def __len__(self) -> int:
        return self.steps * (self.share.stop - self.share.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, first = divmod(self.taken(), self.epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        for step in range(first, self.steps):
            for index in order[step * self.batch : (step + 1) * self.batch][self.share]:
                yield epoch, int(index)
