"""Dynamic batching: items of many concurrent requests go through one function together.

A worker thread takes what waits, oldest first, up to a cost budget, and never waits for more: a lone request is not
delayed, and under load batches fill by themselves. The queue is bounded; beyond it a request is refused at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


class Overloaded(Exception):
    """The queue is full; the request was not taken."""


class Closed(Exception):
    """The batcher has been closed; the request was not taken, or not finished."""


class _Request:
    """A submitted request: its future and the results that are still out."""

    def __init__(self, count: int) -> None:
        self.future: Future[list[Any]] = Future()
        self.results: list[Any] = [None] * count
        self.missing = count

    def done(self, place: int, result: Any) -> None:
        self.results[place] = result
        self.missing -= 1
        if self.missing == 0:
            self.settle(self.results, None)

    def settle(self, results: list[Any] | None, error: BaseException | None) -> None:
        try:
            if error is None:
                self.future.set_result(results or [])
            else:
                self.future.set_exception(error)
        except InvalidStateError:
            pass  # cancelled by a timeout, or failed before


class _Item:
    __slots__ = ("cost", "key", "place", "request", "value")

    def __init__(self, key: Hashable, value: Any, cost: int, place: int, request: _Request) -> None:
        self.key, self.value, self.cost, self.place, self.request = key, value, cost, place, request


class Batcher:
    """Runs `run(key, values) -> results` in a thread of its own over items that share a key.

    `budget` bounds the summed cost of a batch (one item alone may exceed it), `max_waiting` the items that wait.
    `begin` runs first in the thread, for settings that a thread has of its own.
    """

    def __init__(
        self,
        run: Callable[[Any, list[Any]], Sequence[Any]],
        budget: int,
        max_waiting: int,
        name: str,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._budget, self._max_waiting, self._begin = run, budget, max_waiting, begin
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.batches, self.batched_items = 0, 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self._items)

    @property
    def alive(self) -> bool:
        """True while the worker thread runs."""
        return self._thread.is_alive()

    def submit(self, key: Hashable, values: Sequence[Any], costs: Sequence[int]) -> Future[list[Any]]:
        """Queue a request; its future gives one result per value. Raises Overloaded or Closed.

        A cancelled future's items are skipped. An error in a batch of several requests is tried again request by
        request, so that only the one at fault fails.
        """
        request = _Request(len(values))
        items = [
            _Item(key, value, cost, place, request)
            for place, (value, cost) in enumerate(zip(values, costs, strict=True))
        ]
        with self._changed:
            if self._closed:
                raise Closed
            if self._items and len(self._items) + len(items) > self._max_waiting:
                raise Overloaded
            self._items.extend(items)
            self._changed.notify()
        return request.future

    def close(self, timeout: float = 10.0) -> None:
        """Finish what waits, then stop the thread; what is not done after `timeout` seconds fails with Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            for item in self._items:
                item.request.settle(None, Closed())
            self._items.clear()

    def _take(self) -> list[_Item]:
        """Remove and return the next batch: the oldest item, then others of its key while the budget lasts."""
        batch: list[_Item] = []
        kept: deque[_Item] = deque()
        cost = 0
        while self._items:
            item = self._items.popleft()
            if item.request.future.done():  # cancelled, or already failed
                continue
            if not batch or item.key == batch[0].key:
                if batch and cost + item.cost > self._budget:
                    kept.append(item)
                    break  # what comes later must not overtake for ever
                batch.append(item)
                cost += item.cost
            else:
                kept.append(item)
        kept.extend(self._items)
        self._items = kept
        return batch

    def _work(self) -> None:
        if self._begin is not None:
            self._begin()
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait()
                if not self._items:
                    return
                batch = self._take()
            if batch:
                self._process(batch)

    def _process(self, batch: list[_Item]) -> None:
        self.batches += 1
        self.batched_items += len(batch)
        try:
            results = self._run(batch[0].key, [item.value for item in batch])
        except Exception as err:
            requests = {id(item.request): item.request for item in batch}
            if len(requests) == 1:
                batch[0].request.settle(None, err)
                return
            for request in requests.values():
                self._process([item for item in batch if item.request is request])
            return
        for item, result in zip(batch, results, strict=True):
            item.request.done(item.place, result)
