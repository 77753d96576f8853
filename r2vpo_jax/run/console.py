"""What people see while a run goes on."""

import sys
import time


def say(text: str) -> None:
    """A line for people, visible at once when the output is a file."""
    print(text, flush=True)


class ProgressBar:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, initial: int, enabled=True, every: int = 10):
        self._every, self._total, self._enabled, self._bar = every, total, enabled, None
        self._last = self._initial = initial
        self._start = time.perf_counter()
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="it", dynamic_ncols=True)

    def update(self, iteration: int, text: str) -> None:
        """Show that `iteration` iterations are done."""
        pace = (time.perf_counter() - self._start) / (iteration - self._initial)
        seconds_left = pace * (self._total - iteration)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(iteration - self._last)
        elif self._enabled and (iteration % self._every == 0 or iteration == self._total):
            print(
                f"iteration {iteration}/{self._total}  {text}  {seconds_left:.0f} s left", file=sys.stderr, flush=True
            )
        self._last = iteration

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
