"""Work on several tensors at the same time, with results in order and of the same bits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int | None = None
) -> Iterator[_Result]:
    """Results of `work` in the order of the items, at most a few ahead of the reader.

    Every thread computes with one core, so that results do not depend on the number of workers
    (a matrix product cut into other pieces is rounded otherwise). Entropy decoding takes turns,
    as constriction keeps the interpreter's lock, while other threads multiply and add.

    Args:
        workers: threads, default as many as torch may use.
    """
    cores = torch.get_num_threads()
    count = workers or cores
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # What a thread sets is also what threads started later begin with.
        torch.set_num_threads(cores)
