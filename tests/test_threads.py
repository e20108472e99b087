import time

import pytest
import torch

from graftkit.parallel import in_threads


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    def work(item):
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(in_threads(work, range(20), workers)) == [i * i for i in range(20)]


def test_every_thread_computes_with_one_core_and_the_caller_keeps_its_own_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(in_threads(lambda _: torch.get_num_threads(), range(4))) == {1}
        assert torch.get_num_threads() == 2
        assert list(in_threads(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_reaches_the_reader_and_later_items_are_dropped():
    done = []

    def work(item):
        if item == 2:
            raise ValueError("third")
        done.append(item)

    with pytest.raises(ValueError, match="third"):
        list(in_threads(work, range(50), 1))
    assert len(done) < 10


def test_only_a_few_results_wait_for_the_reader():
    started = []
    results = in_threads(started.append, range(50), 2)
    next(results)
    time.sleep(0.05)
    assert len(started) <= 4
    results.close()
