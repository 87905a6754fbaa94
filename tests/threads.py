"""torch.distributed for tests: each rank is a thread of this process."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from tiny import PATIENCE

from hf_dynprune import distributed


class Threads:
    """Stands for torch.distributed in `hf_dynprune.distributed`.

    A rank that makes another call than the others, or none, raises at once. Processes would hang.
    """

    def __init__(self, ranks):
        self.ranks, self._own = ranks, threading.local()
        self._meeting, self._calls = threading.Barrier(ranks, timeout=PATIENCE), [None] * ranks

    def is_available(self):
        return True

    is_initialized = is_available

    def get_backend(self):
        return "threads"

    def get_rank(self):
        return self._own.rank

    def get_world_size(self):
        return self.ranks

    def broadcast(self, tensor, source):
        call = ("broadcast", source, tensor.shape, tensor.dtype)
        tensor.copy_(self._exchange(call, tensor.clone())[source])

    def all_gather(self, parts, tensor):
        values = self._exchange(("gather", tensor.shape, tensor.dtype), tensor.clone())
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)

    def all_reduce(self, tensor):
        tensor.copy_(sum(self._exchange(("reduce", tensor.shape, tensor.dtype), tensor.clone())))

    def broadcast_object_list(self, objects, source):
        everywhere = self._exchange(("broadcast", source, len(objects)), objects)
        objects[:] = copy.deepcopy(everywhere[source])

    def all_gather_object(self, objects, value):
        objects[:] = copy.deepcopy(self._exchange("gather objects", value))

    def _exchange(self, call, value):
        self._calls[self.get_rank()] = (call, value)
        self._meeting.wait()
        calls = list(self._calls)
        self._meeting.wait()  # all have read it
        assert all(theirs == call for theirs, _ in calls), (
            f"The ranks are out of step: {[theirs for theirs, _ in calls]}"
        )
        return [value for _, value in calls]

    def run(self, function):
        """Return what `function()` returns on each rank, or raise the first error."""

        def work(rank):
            self._own.rank = rank
            try:
                result = function()
                self._exchange("end", None)
                return result
            except BaseException:
                self._meeting.abort()  # the others must not wait for this rank
                raise

        with mock.patch.object(distributed, "dist", self), ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(work, rank) for rank in range(self.ranks)]
            errors = [future.exception() for future in futures]
        consequence = threading.BrokenBarrierError
        causes = sorted(filter(None, errors), key=lambda error: isinstance(error, consequence))
        if causes:
            raise causes[0]
        return [future.result() for future in futures]


def on_ranks(ranks, function):
    """Return what `function()` returns on each rank."""
    return [function()] if ranks == 1 else Threads(ranks).run(function)
