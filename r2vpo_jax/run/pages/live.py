"""report/report.html while a run goes on, written by the run itself."""

import math
import time
from collections.abc import Mapping
from typing import Any

from r2vpo_jax.run import files
from r2vpo_jax.run.pages import run_page
from r2vpo_jax.run.pages.history import History
from r2vpo_jax.run.pages.run_page import Status

OLD = 120.0  # seconds: where iterations are long, the page is written after each of them


class LivePage:
    """Writes the page anew from time to time.

    Args:
      workdir: a path of `storage.path`.
      config: of the run, plain values as in config.json.
      history: that the run adds its lines to.
      every: iterations between two writings, where these are not long; 0: it writes none.
      write: False on processes other than 0.
    """

    def __init__(self, workdir, config: Mapping[str, Any], history: History, *, every: int, write: bool):
        self._file, self._config, self._history = workdir / "report" / "report.html", config, history
        self._every, self._write, self._written = every, write and every > 0, -math.inf

    def is_due(self, iteration: int) -> bool:
        """Whether the page is written after this iteration in any case: a function of its number alone, the same after a
        resume. Of such iterations the samples say what was done to each token."""
        return self._every > 0 and (iteration == 1 or iteration % self._every == 0)

    def refresh(self, iteration: int, *, now: bool = False) -> None:
        """Write the page where it is due, `now`, or where the last one is old, as is none of this process."""
        if now or self.is_due(iteration) or time.monotonic() - self._written >= OLD:
            self.write()

    def write(self, *, stopped: bool = False) -> None:
        """Write the page."""
        self._written = time.monotonic()
        if self._write:
            status = Status(time.time(), stopped=stopped)
            files.write_atomically(self._file, run_page.render(self._config, self._history, status))
