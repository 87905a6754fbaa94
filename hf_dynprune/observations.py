"""What was observed since the last flush: buffered on the device, then exchanged between ranks.

    add ──▶ buffer (device, no sync) ──drain──▶ host ──exchange──▶ of all ranks, in one order

One rank only appends during an epoch. All ranks exchange when the pruner flushes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import distributed
from .selection import indices_of
from .table import Rows

# Beyond this many, observations move to the host even if no logging step comes by.
_BUFFERED = 1 << 16


class Observations:
    """The observations of one rank.

    Args:
        samples: N; indices must lie in [0, N), or be -1 for padding.
        signals: The names of what is observed of each sample.
    """

    def __init__(self, samples: int, signals: tuple[str, ...]) -> None:
        self.samples, self.signals = samples, signals
        self.clear()

    def clear(self) -> None:
        """Forget what was not exchanged yet."""
        self._buffer: list[tuple[Tensor, Rows]] = []  # on the device
        self._buffered = 0
        self._drained: list[tuple[Tensor, Rows]] = []  # on the host

    def add(self, index: Tensor, signals: Mapping[str, Tensor]) -> None:
        """Note (B,) sample indices and for each signal (B,) values.

        Cost: O(B). No host synchronisation, except once per 65,536 observations without a `drain`.
        """
        self._buffer.append((index.detach(), signals))
        self._buffered += len(index)
        if self._buffered >= _BUFFERED:
            self.drain()

    def drain(self) -> None:
        """Move what was added from its device to the host, without padding.

        Raises:
            ValueError: If an index is out of range.
        """
        if not self._buffer:
            return
        index, signals = self._joined(self._buffer)
        self._buffer, self._buffered = [], 0
        lowest, highest = (int(index.min()), int(index.max())) if len(index) else (0, 0)
        if not -1 <= lowest <= highest < self.samples:
            raise ValueError(
                f"A sample index lies in [{lowest}, {highest}]: expected [0, {self.samples}), or "
                "-1 for padding."
            )
        if lowest < 0:
            real = indices_of(index >= 0)
            index, signals = index[real], {name: values[real] for name, values in signals.items()}
        self._drained.append((index, signals))

    def exchange(self) -> tuple[Tensor, Rows]:
        """What all ranks observed, in one agreed order, and forget it. Collective."""
        self.drain()
        index, signals = self._joined(self._drained)
        self._drained = []
        return distributed.gather_observations(index, signals)

    def _joined(self, parts: list[tuple[Tensor, Rows]]) -> tuple[Tensor, Rows]:
        """The parts one after the other, on the host."""
        none = (torch.empty(0, dtype=torch.int64), dict.fromkeys(self.signals, torch.empty(0)))
        parts = parts or [none]
        index = torch.cat([index for index, _ in parts]).cpu()
        signals = {
            name: torch.cat([values[name] for _, values in parts]).cpu() for name in self.signals
        }
        return index, signals
