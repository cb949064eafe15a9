"""A line at the bottom of a terminal that shows how far a run is; what is printed meanwhile scrolls above it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from areal_ray.run.units import span_text

_FORMAT = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}{postfix}"


class LiveLine:
    """Shows one line in its place while the block lasts; standard output and errors of this process go above it.

    tqdm draws it, and clears it before a line is printed. It appears with the first news, and is gone at the end.
    """

    def __enter__(self) -> LiveLine:
        tqdm.set_lock(threading.RLock())  # its own takes a semaphore of the system, for several processes
        self._bar: tqdm[Any] | None = None
        self._before = sys.stdout, sys.stderr
        self._above = _Above(self, sys.stdout), _Above(self, sys.stderr)
        sys.stdout, sys.stderr = self._above
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for stream in self._above:
            stream.rest()
        sys.stdout, sys.stderr = self._before

    def show(self, news: Mapping[str, Any]) -> None:
        """Show how far the run is.

        Args:
            news: step and steps; loss, tokens_per_s and left_s if they are known.
        """
        if self._bar is None:
            self._bar = tqdm(
                total=news["steps"],
                initial=news["step"],
                file=self._before[0],
                bar_format=_FORMAT,
                dynamic_ncols=True,
                leave=False,
            )
        with tqdm.get_lock():
            self._bar.n = news["step"]  # which goes back, where steps are computed again
            self._bar.set_postfix_str(_text(news), refresh=False)
            self._bar.refresh(nolock=True)

    def close(self) -> None:
        """Take the line away; with the next news it comes back."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def above(self, stream: TextIO, text: str) -> None:
        """Print whole lines above it."""
        with tqdm.get_lock():
            if self._bar is not None:
                self._bar.clear(nolock=True)
            stream.write(text)
            stream.flush()
            if self._bar is not None:
                self._bar.refresh(nolock=True)


class _Above:
    """A stream whose whole lines are printed above a live line.

    Args:
        line: that is shown.
        stream: of this process.
    """

    def __init__(self, line: LiveLine, stream: TextIO) -> None:
        self._line, self._stream, self._rest = line, stream, ""

    def write(self, text: str) -> int:
        lines, end, self._rest = (self._rest + text).rpartition("\n")
        if end:
            self._line.above(self._stream, lines + end)
        return len(text)

    def flush(self) -> None: ...

    def rest(self) -> None:
        """Print what has no end."""
        self._stream.write(self._rest)
        self._stream.flush()
        self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _text(news: Mapping[str, Any]) -> str:
    parts = [f"loss {news['loss']:.4f}"] if "loss" in news else []
    parts += [f"{news['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in news else []
    parts += [f"{span_text(news['left_s'])} left"] if "left_s" in news else []
    return ", ".join(parts)
