"""The pages of a run, or of a folder of runs, made anew from their files whenever somebody looks."""

import json
import math
import threading
import time
import urllib.parse

from r2vpo_jax import storage
from r2vpo_jax.errors import UsageError
from r2vpo_jax.run import report
from r2vpo_jax.run.pages import run_page
from r2vpo_jax.run.pages.markup import duration, escaped, page, table
from r2vpo_jax.run.pages.reader import Reader
from r2vpo_jax.run.pages.run_page import Status
from r2vpo_jax.run.summary import table as closing_table

_INNER = "runs"  # where a sweep has its runs
_REFRESH = 10  # seconds, of the list


class Site:
    """What there is to see in a directory: `page` gives it by its address.

    Args:
      workdir: of a run or of a sweep, or a folder of runs.

    Raises:
      UsageError: there is no run.
    """

    def __init__(self, workdir):
        self._workdir, self._readers, self._lock = storage.path(workdir, "--workdir"), {}, threading.Lock()
        storage.check(self._workdir, "--workdir")
        self._single = _is_run(self._workdir)
        if not self._single and not self._runs():
            raise UsageError(
                f"--workdir={workdir} holds no run: neither it nor a folder in it has the config.json of one; runs begin "
                "with python -m experiments.train --workdir=…"
            )

    def page(self, address: str, *, refresh: bool = True) -> str | None:
        """The page at an address below /, as HTML; None: there is none.

        An address is looked up among those of the runs that there are. It never becomes a path.
        """
        with self._lock:
            if self._single:
                return self._run_page(self._workdir, refresh, "") if address == "" else None
            runs = self._runs()
            if address == "":
                return self._list(runs, refresh)
            name = urllib.parse.unquote(address.removesuffix("/"))
            if name not in runs or not address.endswith("/"):
                return None
            return self._run_page(runs[name], refresh, "<a href='../'>all runs</a> · ")

    def _runs(self) -> dict[str, object]:
        """Name -> directory of the runs below."""
        folders = [*_folders(self._workdir), *_folders(self._workdir / _INNER)]
        return {folder.name: folder for folder in folders if _is_run(folder)}

    def _reader(self, workdir) -> Reader:
        return self._readers.setdefault(str(workdir), Reader(workdir))

    def _run_page(self, workdir, refresh: bool, links: str) -> str:
        history, status = self._reader(workdir).read(), self._status(workdir)
        if not status.over:
            links += "<a href='?refresh=off'>stop reloading</a>" if refresh else "<a href='./'>reload by itself</a>"
        finished = status.finished and history.iterations
        summary = report.read_summary(workdir) if finished else None
        return run_page.render(
            json.loads((workdir / "config.json").read_text()),
            history,
            status,
            result=closing_table(summary) if summary and summary["rollout_tokens_per_second"] else None,
            pictures=report.pictures(workdir) if finished else None,
            refresh=refresh,
            links=f"<p class='small'>{links.removesuffix(' · ')}</p>" if links else "",
        )

    def _status(self, workdir) -> Status:
        failed = workdir / "failed.json"
        return Status(
            time.time(),
            wrote=self._reader(workdir).wrote(),
            finished=report.is_finished(workdir),
            failed=failed.read_text().strip() if failed.exists() else None,
        )

    def _list(self, runs, refresh: bool) -> str:
        rows, going = [], False
        for name, workdir in sorted(runs.items()):
            config = json.loads((workdir / "config.json").read_text())
            history, status = self._reader(workdir).read(), self._status(workdir)
            total, pace = config["trainer"]["num_iterations"], history.pace()
            quiet = run_page.silence(status, pace)
            state = "finished" if status.finished else "failed" if status.failed is not None else ""
            state = state or (
                f"no line for {duration(quiet)}" if quiet else run_page.left(history, total, pace) or "begins"
            )
            going = going or not (status.over or quiet)
            numbers = (
                run_page.last(history.scores("validation")[1]),
                run_page.last(history.series("reward/mean", kind="any")[1]),
                run_page.last(run_page.held(history)[1]),
            )
            shown = [f"{number:.3g}" if math.isfinite(number) else "–" for number in numbers]
            link = f"<a href='{urllib.parse.quote(name, safe='')}/'>{escaped(name)}</a>"
            alarms = ", ".join(event["alarm"] for event in history.alarms)
            rows.append((link, escaped(state), escaped(alarms), f"{history.iteration} of {total}", *shown))
        head = ("run", "state", "alarms", "iteration", "validation pass@1", "mean reward", "ratio variance V")
        title = self._workdir.name or str(self._workdir)
        body = f"<h1>{escaped(title)}</h1><p>{len(rows)} runs, as of {run_page.clock(time.time())}</p>"
        return page(title, body + table(head, rows, numbers=4), refresh=_REFRESH if refresh and going else None)


def _folders(path) -> list:
    """The folders in a folder; none if it is not there."""
    return [folder for folder in path.iterdir() if folder.is_dir()] if path.is_dir() else []


def _is_run(workdir) -> bool:
    """Whether this is the directory of a run: config.json is a common name, and other programs have it too."""
    file = workdir / "config.json"
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text())
    except ValueError:
        return False
    return isinstance(found, dict) and {"objective", "trainer", "seed"} <= found.keys()
