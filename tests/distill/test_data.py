"""The order of the samples and the noise: functions of seed, step and position, with one grid per batch."""

from collections import Counter

import torch

from lineardit.distill.data import BatchOrder, Sample, counter_generator


def _samples(*heights: int) -> list[Sample]:
    return [Sample(prompt="", seed=0, height=height, width=8, grid=(height, 8)) for height in heights]


def test_order_sees_every_sample_once_an_epoch() -> None:
    samples = _samples(*[8, 16] * 8)
    order = BatchOrder(samples, batch_size=4, seed=0)
    assert order.batches_per_epoch == 4
    epochs = [[order.batch(step) for step in range(start, start + 4)] for start in (0, 4)]
    for epoch in epochs:
        assert Counter(index for batch in epoch for index in batch) == Counter(range(16))
        assert all(len({samples[index].height for index in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_order_does_not_depend_on_where_it_starts() -> None:
    samples = _samples(*[8] * 7, *[16] * 9)
    order = BatchOrder(samples, batch_size=3, seed=1)
    batches = [order.batch(step) for step in range(12)]
    assert [BatchOrder(samples, batch_size=3, seed=1).batch(step) for step in reversed(range(12))] == batches[::-1]
    assert [BatchOrder(samples, batch_size=3, seed=2).batch(step) for step in range(12)] != batches


def test_order_repeats_samples_of_a_rare_size() -> None:
    order = BatchOrder(_samples(8, 8, 8, 8, 16), batch_size=4, seed=0)
    assert sorted(sorted(order.batch(step)) for step in range(2)) == [[0, 1, 2, 3], [4, 4, 4, 4]]


def test_counter_generator_differs_in_every_argument() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    numbers = [float(torch.randn((), generator=counter_generator(*key))) for key in places]
    assert len(set(numbers)) == len(places)
    assert numbers[3] == float(torch.randn((), generator=counter_generator(0, 0, 1)))
