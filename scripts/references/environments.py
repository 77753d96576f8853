"""Python environments of their own for other projects, with pinned versions, under .cache/references."""

import json
import os
import subprocess
import sys
from pathlib import Path

REFERENCES = Path(__file__).resolve().parent
PINS = {
    "trl": {"trl": "1.16.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "tunix": {"google-tunix": "0.1.7", "jax": "0.10.2", "flax": "0.12.8"},
}


class EnvironmentFailedError(Exception):
    """No environment, or a worker that failed; the message is one line."""


def clean_environment() -> dict[str, str]:
    """The variables for a process in another environment: packages of ours and of the user stay out."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1"}


def reason(stderr: str, code: int) -> str:
    """The line of a failed command's output that says why."""
    lines = [line for line in stderr.splitlines() if line.strip()] or [f"exit code {code}"]
    stated = [line for line in lines if line.startswith("ERROR: ")] or lines  # pip's hints come after its error
    return stated[-1].strip().removeprefix("ERROR: ")


def execute(command, doing):
    """Run a command and return its standard output.

    Raises:
      EnvironmentFailedError: it cannot be started or fails, with the line of its output that says why.
    """
    try:
        return subprocess.run(command, env=clean_environment(), check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise EnvironmentFailedError(f"{doing}: {error}") from None
    except subprocess.CalledProcessError as error:
        raise EnvironmentFailedError(f"{doing}: {reason(error.stderr, error.returncode)}") from None


def interpreter(package, pins=None):
    """The Python of a package's own environment, made or brought to the pinned versions if need be.

    Args:
      package: names the environment.
      pins: its packages with their versions; default those of `PINS`.

    Raises:
      EnvironmentFailedError: it cannot be made.
    """
    folder, pins, versions = REFERENCES.parents[1] / ".cache" / "references" / package, pins or PINS[package], {}
    python = folder / "bin" / "python"
    if python.exists():
        listed = json.loads(execute([python, "-m", "pip", "list", "--format=json"], f"looking at {folder}"))
        versions = {p["name"]: p["version"].partition("+")[0] for p in listed}  # torch 2.13.0+cpu is 2.13.0
    if any(versions.get(name) != version for name, version in pins.items()):
        wanted = [f"{name}=={version}" for name, version in pins.items()]
        print(f"installing {' '.join(wanted)} into {folder}", file=sys.stderr, flush=True)
        execute([sys.executable, "-m", "venv", folder], f"making an environment for {package}")
        execute([python, "-m", "pip", "install", "--quiet", *wanted], f"installing {package}")
    return python
