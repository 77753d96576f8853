"""What a page shows of a run, gathered line by line: by the run itself as it writes them, or from its files."""

import collections
import math
from collections.abc import Mapping
from typing import Any

_SAMPLED_ITERATIONS = 8  # whose samples are kept
_EVENTS = 50
_KEPT = (  # of the lines of iterations, all that is drawn or counted
    "kind", "iteration", "version", "rollouts", "rollout_tokens", "reward/mean", "outcome/judged", "response/length",
    "response/length_max", "response/truncated", "policy/entropy", "ratio/variance", "ratio/max", "dual/signal",
    "dual/variance_coef", "kl/mean", "optimizer/grad_norm", "clip/gradient_share", "keeps/at_stake",
    "throughput/rollout_tokens_per_second", "throughput/update_tokens_per_second",
)  # fmt: skip


class History:
    """The lines of a run's files as far as a page needs them.

    Attributes:
      iterations: lines of metrics.jsonl of kind train or fill, without what no page shows.
      evaluations: the others.
      events: the last lines of events.jsonl.
    """

    def __init__(self):
        self.iterations: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_EVENTS)
        self._alarms: dict[str, dict[str, Any]] = {}
        self._samples: dict[int, list[dict[str, Any]]] = {}

    def add(self, file: str, row: Mapping[str, Any]) -> None:
        """A line of metrics, samples or events."""
        if file == "samples":
            self._add_sample(row)
        elif file == "events":
            self.events.append(dict(row))
            if row["event"] == "alarm":
                self._alarms[row["alarm"]] = dict(row)
        elif row["kind"] == "evaluation":
            self.evaluations.append({name: value for name, value in row.items() if not isinstance(value, dict)})
        else:
            named = {name: row[name] for name in _KEPT if name in row}
            self.iterations.append(named | {name: row[name] for name in row if name.startswith("time/")})

    def _add_sample(self, row: Mapping[str, Any]) -> None:
        of_iteration = self._samples.setdefault(row["iteration"], [])
        of_iteration.append(dict(row))
        while len(self._samples) > _SAMPLED_ITERATIONS:
            # Those whose tokens say something are worth more than later ones that do not.
            plain = [i for i, rows in self._samples.items() if not any("kept" in r for r in rows)]
            newest = max(self._samples)
            del self._samples[min([i for i in plain if i != newest] or self._samples)]

    @property
    def iteration(self) -> int:
        """The last one that is done; 0: none is."""
        return self.iterations[-1]["iteration"] if self.iterations else 0

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The last event of each alarm that has sounded."""
        return list(self._alarms.values())

    @property
    def samples(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """(iteration, its samples), the latest first: those that say what was done to each token, as far as there are any."""
        told = {
            iteration: [row for row in rows if "kept" in row]
            for iteration, rows in sorted(self._samples.items(), reverse=True)
        }
        told = {iteration: rows for iteration, rows in told.items() if rows}
        if told:
            return list(told.items())
        return sorted(self._samples.items(), reverse=True)

    def series(self, name: str, *, kind: str = "train") -> tuple[list[float], list[float]]:
        """(iterations, values) of a name of metrics.jsonl; nan where a line does not have it."""
        rows = [row for row in self.iterations if row["kind"] == kind or kind == "any"]
        return [row["iteration"] for row in rows], [float(row.get(name, math.nan)) for row in rows]

    def scores(self, split: str) -> tuple[list[float], list[float]]:
        """(iterations, pass@1) of the evaluations on a split."""
        rows = [row for row in self.evaluations if row["split"] == split]
        return [row["iteration"] for row in rows], [float(row["pass_at_1"]) for row in rows]

    def pace(self) -> float | None:
        """Seconds of an iteration, the mean of the last 20 (without the first, which compiles, if there are others)."""
        seconds = [row["time/iteration"] for row in self.iterations if "time/iteration" in row]
        seconds = (seconds[1:] or seconds)[-20:]
        return sum(seconds) / len(seconds) if seconds else None
