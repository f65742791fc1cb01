"""Row order: batches of rows of similar length, in random order.

Rows are shuffled and cut into pools of 50 batches; each pool is sorted by length and cut into
batches; then the batches of all pools are shuffled. So a batch holds little padding, and neither
lengths nor losses drift along an epoch. The batch with the longest row comes first: if memory
does not suffice, that shows at once. A last batch that is not full stays last.
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
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=self._generator).tolist()
        full = len(order) - len(order) % self.batch
        rest = order[full:]
        pool = BATCHES_A_POOL * self.batch
        batches = []
        for start in range(0, full, pool):
            rows = sorted(order[start : min(start + pool, full)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        shuffled = torch.randperm(len(batches), generator=self._generator).tolist()
        batches = [batches[index] for index in shuffled]
        if batches:
            longest = max(batches, key=lambda rows: max(self.lengths[row] for row in rows))
            batches.remove(longest)
            batches.insert(0, longest)
        for rows in batches:
            yield from rows
        yield from rest
