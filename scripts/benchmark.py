"""Speed of rollouts, scoring, updates and whole iterations on this machine, beside its limits, an older revision, or others.

    python scripts/benchmark.py                    # the shipped run's parts, as ratios
    python scripts/benchmark.py cpu-reference      # a small decoder: tokens/s, MFU, share of the bandwidth, memory
    python scripts/benchmark.py 1.5b --programs=rollout,update --json=results.json
    python scripts/benchmark.py long-tail --against=4d68057
    python scripts/benchmark.py cpu-reference --against=torch,trl,tunix
    python scripts/benchmark.py sweep              # both modes of a sweep
    python scripts/benchmark.py noise              # sampler and scorer: how far apart, by dtype and switch, at what cost
    python scripts/benchmark.py overlap            # sampling beside learning against taking turns
    python scripts/benchmark.py verifiers

Workloads use one device. Absolute numbers depend on the machine and on what else it does. Shares are of ceilings measured
just before, and speeds beside others come from rounds in turn, so they carry over better.
"""

import argparse
import ast
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import jax
from benchmarks import (
    ceilings,
    noise,
    overlap,
    profile,
    programs,
    report,
    shipped,
    subjects,
    sweep,
    verifiers,
    workloads,
)
from references.environments import EnvironmentFailedError

from r2vpo_jax.training.learner import Learner

EPILOG = """tokens: of the responses in rollout and iteration; of prompts and responses, without padding, in scoring and update.
MFU: 2 (scoring) or 6 (update) x parameters x tokens, attention and unembedding, over the measured rate of matrix products;
recomputation does not count. Share of the bandwidth: the time to read the weights once a step of a full batch, and the keys and
values filled so far, at the measured rate of copying. Memory: the most that the device has held so far in this process, or else
what the compiler says that the program needs. Speed: of tokens, over this tree's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="WHAT")
    commands.add_parser("shipped", help="the shipped run's parts, as ratios (default)")
    for name in workloads.NAMES:
        options = {"help": workloads.HELP[name], "description": workloads.HELP[name], "epilog": EPILOG}
        _add_arguments(commands.add_parser(name, **options))
    summary = sweep.__doc__.splitlines()[0]
    sweep.add_arguments(commands.add_parser("sweep", help=summary, description=summary))
    summary = noise.__doc__.splitlines()[0]
    noise.add_arguments(commands.add_parser("noise", help=summary, description=summary))
    summary = overlap.__doc__.splitlines()[0]
    overlap.add_arguments(commands.add_parser("overlap", help=summary, description=summary))
    summary = verifiers.__doc__.splitlines()[0]
    verifiers.add_arguments(commands.add_parser("verifiers", help=summary, description=summary))
    arguments = parser.parse_args()
    if arguments.command == "sweep":
        sweep.run(arguments)
    elif arguments.command == "noise":
        noise.run(arguments)
    elif arguments.command == "overlap":
        overlap.run(arguments)
    elif arguments.command == "verifiers":
        verifiers.run(arguments.seconds)
    elif arguments.command in (None, "shipped"):
        shipped.run()
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers and worktrees go away then too
        try:
            measure(arguments)
        except (ValueError, EnvironmentFailedError) as error:
            raise SystemExit(str(error)) from None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = {"type": lambda text: tuple(part for part in text.split(",") if part), "metavar": "NAME,NAME,…"}
    parser.add_argument(
        "--programs", **names, default=programs.NAMES, help=f"of {', '.join(programs.NAMES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured calls, after a first one (default: 5)")
    parser.add_argument(
        "--budget_seconds", type=float, help="stop in time: fewer rounds, and no program that would begin later"
    )
    parser.add_argument(
        "--against",
        **names,
        default=(),
        help=f"others on the same work, in turn: {', '.join(subjects.PEERS)}, a git revision, or a folder with one",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="an interpreter that has the peer; nothing is installed",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the configuration, for this tree alone",
    )
    parser.add_argument("--json", metavar="PATH", help="write everything here, after each program")
    parser.add_argument("--markdown", metavar="PATH", help="write the table here, after each program")
    parser.add_argument(
        "--profile", metavar="DIR", help="also trace one call of each program, and say what took longest"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything works")


def measure(arguments: argparse.Namespace) -> None:
    """Measure the programs of a workload, and print and write what was found.

    Raises:
      ValueError: an argument that does not fit.
      EnvironmentFailedError: an unknown revision, or a worker that failed.
    """
    started = time.perf_counter()
    if unknown := set(arguments.programs) - set(programs.NAMES):
        raise ValueError(f"--programs: {', '.join(sorted(unknown))} is none of {', '.join(programs.NAMES)}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds} must be at least 1")
    subjects.share_memory(1 + len(arguments.against))
    subjects.forget_compiled()
    workload = workloads.get(arguments.command, jax.default_backend(), tiny=arguments.tiny)
    ours = programs.Programs(workload, Learner, [_pair("set", text, ast.literal_eval) for text in arguments.set])
    pythons = dict(_pair("python", text) for text in arguments.python)
    with subjects.others(arguments.against, workload, ours, pythons) as others:
        header = {
            "workload": workload.name,
            "tiny": arguments.tiny,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "revision": subjects.revision(),
            "configuration": ours.describe(),
        }
        try:
            results = report.Report(header, arguments.json, arguments.markdown)
        except OSError as error:
            raise ValueError(f"cannot write results: {error}") from None
        limits = header["ceilings"] = ceilings.measure(workload.compute_dtype, tiny=arguments.tiny)
        print(
            f"{header['device']}, JAX {header['jax']}, {workload.name}{' (tiny)' if arguments.tiny else ''}: "
            f"{limits['flops_per_second'] / 1e12:.3g} TFLOP/s in {workload.compute_dtype} products, "
            f"{limits['bytes_per_second'] / 1e9:.4g} GB/s read and written\n"
            + ", ".join(f"{name}={value}" for name, value in header["configuration"].items()),
            flush=True,
        )
        ends = started + (arguments.budget_seconds or float("inf"))
        for program in arguments.programs:
            _measure_program(program, [subjects.Ours(ours), *others], workload, limits, results, ends, arguments)
    print(f"\n{results.markdown()}")


def _measure_program(program, everyone, workload, limits, results, ends, arguments) -> None:
    """All rounds of one program: in each, everyone in turn."""
    if time.perf_counter() > ends:
        results.note(f"{program}: not begun, --budget_seconds is spent")
        return
    able, facts = [], []
    for one in everyone:
        if one.can(program):
            try:
                facts.append(one.prepare(program))
                able.append(one)
            except EnvironmentFailedError as error:  # the others go on
                results.note(f"left out: {error}")
    rounds = [[] for _ in able]
    for number in range(arguments.rounds):
        begun = time.perf_counter()
        for one, times in zip(able, rounds, strict=True):
            times.append(one.round())
        now = time.perf_counter()
        if now + (now - begun) > ends and number + 1 < arguments.rounds:
            results.note(f"{program}: {number + 1} of {arguments.rounds} rounds, --budget_seconds is spent")
            break
    results.add(
        [
            report.record(workload, program, one.name, found, times, limits)
            for one, found, times in zip(able, facts, rounds, strict=True)
        ]
    )
    if arguments.profile:
        folder = Path(arguments.profile) / f"{workload.name}-{program}"
        longest = profile.trace(able[0].round, folder)
        results.note(f"trace of {program} in {folder}; open it with XProf or TensorBoard's profile plugin")
        for name, seconds, calls in longest:
            results.note(f"  {1000 * seconds:10.2f} ms {calls:7d} calls  {name[:100]}")
    for one in able:
        one.release()


def _pair(option: str, text: str, read=str):
    """(name, value) of NAME=VALUE; a value that `read` cannot read stays text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--{option}={text} must be NAME=VALUE")
    try:
        return name, read(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
