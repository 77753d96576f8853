"""What a finished run leaves in report/: summary.json, two figures, and the page that shows it all."""

import json
import time

from r2vpo_jax import storage
from r2vpo_jax.run import figures, files
from r2vpo_jax.run.pages import run_page
from r2vpo_jax.run.pages.reader import Reader
from r2vpo_jax.run.pages.run_page import Status
from r2vpo_jax.run.summary import table


def is_finished(workdir) -> bool:
    """Whether a run ended here."""
    return _summary(workdir).exists()


def withdraw(workdir) -> None:
    """The run goes on: it has not finished until there is a summary again."""
    _summary(workdir).unlink(missing_ok=True)


def read_summary(workdir) -> dict:
    """summary.json of a finished run."""
    return json.loads(_summary(workdir).read_text())


def _summary(workdir):
    return storage.path(workdir, "--workdir") / "report" / "summary.json"


def rewrite(workdir) -> str:
    """Write the report of a finished run again from its files; returns the closing table.

    Raises:
      ValueError: the run has not finished.
    """
    workdir = storage.path(workdir, "--workdir")
    if not is_finished(workdir):
        raise ValueError(
            f"{workdir} does not hold a finished run (no report/summary.json); --serve shows one that goes on"
        )
    summary = read_summary(workdir)
    write(workdir, summary, files.read_jsonl(workdir / "metrics.jsonl"))
    return table(summary)


def write(workdir, summary: dict, rows) -> None:
    """Write workdir/report: summary.png, curves.png, report.html (with both figures) and, last, summary.json."""
    workdir = storage.path(workdir)
    directory = workdir / "report"
    if not storage.is_store(directory):
        directory.mkdir(parents=True, exist_ok=True)
    figures.draw(directory, summary, rows)
    status = Status(time.time(), finished=True)
    page = run_page.render(
        json.loads((workdir / "config.json").read_text()),
        Reader(workdir).read(),
        status,
        result=table(summary),
        pictures=pictures(workdir),
    )
    files.write_atomically(directory / "report.html", page)
    files.write_atomically(directory / "summary.json", json.dumps(summary, indent=2) + "\n")


def pictures(workdir) -> dict[str, bytes]:
    """The figures of a finished run, by what they show; those that are not there are left out."""
    found = {text: storage.path(workdir) / "report" / name for name, text in figures.TEXTS.items()}
    return {text: file.read_bytes() for text, file in found.items() if file.exists()}
