"""Row order: every row once, batches of similar length, no drift, the longest first."""

import random

import pytest

from halfbyte.finetune.sampler import SimilarLengthSampler


def _batches(rows, batch):
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (8, 8), (9, 8), (1000, 8), (37, 1)])
def test_every_row_once(count, batch):
    lengths = [random.Random(0).randrange(1, 500) for _ in range(count)]
    rows = list(SimilarLengthSampler(lengths, batch, seed=3))
    assert sorted(rows) == list(range(count))


def test_little_padding_longest_first_and_no_drift():
    generator = random.Random(1)
    lengths = [generator.randrange(10, 500) for _ in range(1600)]
    rows = list(SimilarLengthSampler(lengths, 16, seed=0))
    padded = [16 * max(lengths[row] for row in batch) for batch in _batches(rows, 16)]
    assert sum(padded) < 1.06 * sum(lengths)
    assert padded[0] == 16 * max(lengths)
    first, second = sum(padded[1:50]) / 49, sum(padded[51:100]) / 49
    assert abs(first - second) < 0.3 * first


def test_seed_and_epoch_decide():
    lengths = list(range(64))
    sampler, same = SimilarLengthSampler(lengths, 4, 5), SimilarLengthSampler(lengths, 4, 5)
    first = list(sampler)
    assert first == list(same)
    assert list(sampler) == list(same) != first
    assert list(SimilarLengthSampler(lengths, 4, 6)) != first
