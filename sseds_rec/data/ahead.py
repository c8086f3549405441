"""Work done ahead of its use, in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def read_ahead(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """Yields what `make()` does, made in a thread that stays up to `depth` items ahead and ends with this generator."""
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(more: bool, item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((more, item), timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in make():
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:  # whatever it is, it belongs to the consumer
            put(False, error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                raise item
            else:
                return
    finally:
        stop.set()
        thread.join()
