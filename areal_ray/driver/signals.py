"""Signals to the driver: each of them has the workers save and leave, however often it comes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from areal_ray.cluster.requests import AWAY

# A terminal that is closed sends the last one. Who sends one of them may send several: `timeout` signals the process
# and then its group, systemd SIGTERM and SIGHUP.
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTS = 3  # so many SIGINTs, from somebody at the keyboard, and it stops without saving


@contextmanager
def stopping_on_signals(stop: Callable[[], None], retry_s: float = 1.0) -> Iterator[threading.Event]:
    """Have SIGINT, SIGTERM and SIGHUP ask the job to stop, while the block lasts.

    Signals that are ignored at its beginning stay so (nohup, jobs in the background of a shell). In another than the
    main thread, which cannot handle signals, nothing is done.

    Args:
        stop: asks the workers to save and leave; called once, in a thread of its own, and again while it raises one
            of `AWAY`.
        retry_s: seconds between two such calls.

    Yields:
        Set with the first signal.

    Raises:
        KeyboardInterrupt: in the block, with the third SIGINT.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts >= _INTERRUPTS:
            raise KeyboardInterrupt
        text, first = "", not asked.is_set()
        if number == signal.SIGINT and interrupts < _INTERRUPTS:
            text = "; Ctrl-C twice more to stop at once" if interrupts == 1 else "; once more to stop at once"
        if first or text:
            asked.set()
            # In a thread: what was interrupted may hold a lock that this needs, the output's own, too.
            said = ("saving, then stopping" if first else "still saving") + text
            ask_in_background(stop if first else None, said, retry_s)

    before = {number: signal.getsignal(number) for number in _NUMBERS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask_in_background(stop: Callable[[], None] | None, said: str, retry_s: float = 1.0) -> None:
    """Say something and ask the job to stop, in a thread, again and again while the head node is away.

    Nobody waits for that thread: a head node may never come back.
    """

    def ask() -> None:
        print(said, flush=True)
        while stop is not None:
            try:
                stop()
                return
            except AWAY as error:  # the workers hear of it when it is back
                print(f"the workers cannot be told yet: {error}", flush=True)
                time.sleep(retry_s)

    threading.Thread(target=ask, name="stop", daemon=True).start()
