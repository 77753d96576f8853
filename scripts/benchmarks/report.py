"""What was measured: lines while it goes on, and after each program a JSON file and a table in Markdown."""

import json
import os
import statistics
from pathlib import Path

from benchmarks.workloads import Workload, forward_flops, rollout_bytes

COLUMNS = (
    "program",
    "who",
    "seconds",
    "tokens/s",
    "ms a step",
    "MFU",
    "of the bandwidth",
    "compilation, s",
    "memory, GiB",
    "speed",
)


def record(workload: Workload, program: str, who: str, facts: dict, rounds: list[float], ceilings: dict) -> dict:
    """One line: medians and shares of the ceilings.

    Args:
      facts: from `Programs.prepare`, or a peer's like it: tokens, lengths, first_seconds, and what is known besides.
      rounds: seconds of each round.
      ceilings: from `ceilings.measure`.

    Returns:
      plain values; None where something does not apply or is not known. `compile_seconds` is the compiler's time where the
      program is compiled ahead, else the first call less the median of the others.
    """
    seconds, lengths = statistics.median(rounds), facts["lengths"]
    line = {
        "workload": workload.name,
        "program": program,
        "who": who,
        "seconds": seconds,
        "rounds": rounds,
        "tokens": facts["tokens"],
        "mean_length": statistics.fmean(lengths),
        "max_length": max(lengths),
        "tokens_per_second": facts["tokens"] / seconds,
        "ms_per_step": None,
        "mfu": None,
        "bandwidth_share": None,
        "compile_seconds": facts.get("compile_seconds", max(facts["first_seconds"] - seconds, 0.0)),
        "peak_bytes": facts.get("peak_bytes"),
        "program_bytes": facts.get("program_bytes"),
    }
    if program == "rollout":
        line["ms_per_step"] = 1000 * seconds / max(lengths)
        line["bandwidth_share"] = rollout_bytes(workload, lengths) / ceilings["bytes_per_second"] / seconds
    elif program in ("scoring", "update"):
        flops = forward_flops(workload, workload.prompt_size, lengths) * (3 if program == "update" else 1)
        line["mfu"] = flops / ceilings["flops_per_second"] / seconds
    return line


class Report:
    """Lines in the order in which they come; `speed` is that of the line over this tree's line of the same program."""

    def __init__(self, header: dict, json_path: str | None, markdown_path: str | None):
        """Write the files (None: none), without lines as yet, so that a wrong path is found before anything is measured.

        Args:
          header: what stands above the lines in the JSON file.

        Raises:
          OSError: a file cannot be written.
        """
        self._header, self._paths, self._lines = header, (json_path, markdown_path), []
        self.save()

    def add(self, lines: list[dict]) -> None:
        """Take the lines of one program, this tree's first; print them, and write everything so far."""
        for line in lines:
            line["speed"] = lines[0]["seconds"] / line["seconds"] * (line["tokens"] / lines[0]["tokens"])
            ours = zip(line["rounds"], lines[0]["rounds"], strict=True)
            line["speed_by_round"] = [our / their * line["tokens"] / lines[0]["tokens"] for their, our in ours]
            print(
                "  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, _cells(line), strict=True) if cell),
                flush=True,
            )
        lengths = lines[0]
        print(f"  lengths of responses: mean {lengths['mean_length']:.1f}, longest {lengths['max_length']}", flush=True)
        self._lines += lines
        self.save()

    def note(self, text: str) -> None:
        """Say something that belongs to the results."""
        self._header.setdefault("notes", []).append(text)
        print(text, flush=True)
        self.save()

    def save(self) -> None:
        """Write each file whole or not at all."""
        texts = (json.dumps(self._header | {"results": self._lines}, indent=1), self.markdown())
        for path, text in zip(self._paths, texts, strict=True):
            if path is not None:
                part = Path(f"{path}.part")
                part.write_text(text + "\n", encoding="utf-8")
                os.replace(part, path)

    def markdown(self) -> str:
        """The table."""
        rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, self._lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: dict) -> tuple[str, ...]:
    memory = line["peak_bytes"] or line["program_bytes"]
    return (
        line["program"],
        line["who"],
        f"{line['seconds']:.3g}",
        f"{line['tokens_per_second']:,.0f}",
        *("" if x is None else form.format(x) for form, x in (("{:.2f}", line["ms_per_step"]),)),
        *("" if x is None else f"{100 * x:.1f} %" for x in (line["mfu"], line["bandwidth_share"])),
        f"{line['compile_seconds']:.1f}",
        "" if memory is None else f"{memory / 2**30:.2f}",
        f"x {line['speed']:.2f}",
    )
