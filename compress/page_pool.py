"""Storage of one layer's pages: blocks of many pages, so that growing copies nothing and calls the allocator seldom.

A block holds at least an eighth of what is there already, and pages that were given back are taken again first: no more
than about an eighth of the storage is empty. A kernel finds pages by their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..kernels.kv_codec import Layout, Page

Slot = tuple[int, int]
"""Number of a block and of a page in it."""


class PageViews(Mapping[int, Page]):
    """Pages of a pool by their numbers, made when they are looked at: long prompts have thousands of pages, and kernels
    find them by address.
    """

    def __init__(self, pool: PagePool, slots: Mapping[int, Slot]):
        self.pool, self.slots = pool, slots

    def __getitem__(self, number: int) -> Page:
        return self.pool.page(self.slots[number])

    def __contains__(self, number: object) -> bool:
        return number in self.slots

    def __iter__(self) -> Iterator[int]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


class PagePool:
    """Pages of `batch` rows and `heads` KV heads. most: no more are allocated ahead of need than come to so many; None
    for no limit.
    """

    def __init__(self, layout: Layout, batch: int, heads: int, device: torch.device):
        self.layout, self.device = layout, device
        self.shape = (batch, heads, layout.record_bytes)
        self.blocks: list[Tensor] = []
        self.free: list[Slot] = []
        self.most: int | None = None

    @property
    def capacity(self) -> int:
        """Pages that there is storage for."""
        return sum(len(block) for block in self.blocks)

    def reserve(self, count: int) -> None:
        """Makes sure that so many pages can be taken without allocating."""
        missing = count - len(self.free)
        if missing > 0:
            ahead = self.capacity // 8
            if self.most is not None:
                ahead = min(ahead, self.most - self.capacity)
            size = max(missing, ahead)
            self.blocks.append(torch.empty((size, *self.shape), dtype=torch.uint8, device=self.device))
            # Taken from the end of the list, in the order of addresses.
            self.free[:0] = [(len(self.blocks) - 1, index) for index in reversed(range(size))]

    def take(self) -> Slot:
        """A page, of any content."""
        self.reserve(1)
        return self.free.pop()

    def give_back(self, slot: Slot) -> None:
        """Makes a page available again."""
        self.free.append(slot)

    def release(self) -> None:
        """Gives all storage up, if there is more of it than one page. No page is in use."""
        assert len(self.free) == self.capacity
        if self.capacity > 1:
            self.blocks, self.free = [], []

    def page(self, slot: Slot) -> Page:
        """Views of a page, (batch, heads, …)."""
        return self.layout.page(self.record(slot))

    def record(self, slot: Slot) -> Tensor:
        """Its bytes, (batch, heads, record_bytes) uint8."""
        return self.blocks[slot[0]][slot[1]]

    def address(self, slot: Slot) -> int:
        """Of the record of row 0 and head 0; records of a page follow one another."""
        block = self.blocks[slot[0]]
        return block.data_ptr() + slot[1] * block.stride(0)

    def map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """Changes the rows, which are `batch` afterwards. change: of a tensor whose first dimension is the batch."""
        self.blocks = [change(block.transpose(0, 1)).transpose(0, 1).contiguous() for block in self.blocks]
        self.shape = (batch, *self.shape[1:])

    def nbytes(self) -> tuple[int, int]:
        """Bytes allocated for codes, and for their parameters."""
        total = sum(block.nbytes for block in self.blocks)
        records = self.capacity * self.shape[0] * self.shape[1]
        parameters = records * self.layout.parameter_bytes
        return total - parameters, parameters
