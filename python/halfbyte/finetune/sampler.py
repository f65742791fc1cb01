"""Row order: batches of rows of similar length, in random order.

Rows are shuffled and cut into pools of 50 batches; each pool is sorted by length and cut into
batches; then the batches of all pools are shuffled. So a batch holds little padding, and neither
lengths nor losses drift along an epoch. The batch with the longest row comes first: if memory
does not suffice, that shows at once. A last batch that is not full stays last.

The order is a function of seed and epoch: a resumed run asks for its epoch (`set_epoch`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_A_POOL = 50


class SimilarLengthSampler(Sampler[int]):
    """Yields row indices, `batch` at a time of similar length; a new order each epoch."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is that of `epoch`, counted from 0; the one after it follows."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self._epoch):
            self._draw(generator)
        self._epoch += 1
        order, shuffled = self._draw(generator)
        full = len(order) - len(order) % self.batch
        rest = order[full:]
        pool = BATCHES_A_POOL * self.batch
        batches = []
        for start in range(0, full, pool):
            rows = sorted(order[start : min(start + pool, full)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        batches = [batches[index] for index in shuffled]
        if batches:
            longest = max(batches, key=lambda rows: max(self.lengths[row] for row in rows))
            batches.remove(longest)
            batches.insert(0, longest)
        for rows in batches:
            yield from rows
        yield from rest

    def _draw(self, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """An epoch's (order of rows, order of full batches)."""
        order = torch.randperm(len(self), generator=generator).tolist()
        return order, torch.randperm(len(self) // self.batch, generator=generator).tolist()
