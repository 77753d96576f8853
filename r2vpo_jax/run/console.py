"""What people see while a run goes on."""

import sys
import time


def say(text: str) -> None:
    """A line for people, visible at once when the output is a file."""
    print(text, flush=True)


class ProgressBar:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, initial: int, *, enabled=True, every: int = 10, unit="iteration"):
        """Begin to count the time.

        Args:
          total, initial: steps that there are, and steps that are done already.
          enabled: False: show nothing.
          every: steps between two lines.
          unit: what a step is.
        """
        self._every, self._total, self._enabled, self._unit, self._bar = every, total, enabled, unit, None
        self._last = self._initial = initial
        self._start = time.perf_counter()
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True)

    def update(self, done: int, text: str) -> None:
        """Show how many steps are done, more than at the beginning, and what else there is to say."""
        pace = (time.perf_counter() - self._start) / (done - self._initial)
        seconds_left = pace * (self._total - done)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._last)
        elif self._enabled and (done % self._every == 0 or done == self._total):
            print(f"{self._unit} {done}/{self._total}  {text}  {seconds_left:.0f} s left", file=sys.stderr, flush=True)
        self._last = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
