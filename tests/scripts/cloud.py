"""Fakes of gcloud, kubectl, sbatch and others that record their arguments, and a checkout to launch from."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess

from tests.helpers.paths import ROOT

FAKES = pathlib.Path(__file__).parent / "fakes"

# What a run does on a host: it says what it was given and what it sees, saves when it is told to stop, and ends by itself
# when there is a file `go_on`.
TRAINER = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$HOME/arguments"
env > "$HOME/environment"
for argument in "$@"; do case "$argument" in --workdir=*) workdir=${argument#*=} ;; esac; done
echo "iteration 1"
trap 'echo saved; exit 0' TERM
while [ ! -e "$FAKE/go_on" ]; do sleep 0.05; done
mkdir -p "$workdir/report" && echo {} > "$workdir/report/summary.json"
"""


@dataclasses.dataclass
class Cloud:
    """A temporary folder: `fake` holds the state of the fakes, `checkout` a repository with the scripts."""

    fake: pathlib.Path
    checkout: pathlib.Path

    def set(self, **files):
        """State of the fakes: a file for each; None takes it away."""
        for name, text in files.items():
            if text is None:
                (self.fake / name).unlink(missing_ok=True)
            else:
                (self.fake / name).write_text(f"{text}\n")

    def environment(self, **more):
        """The fakes come first on PATH."""
        return {
            "PATH": f"{FAKES}:/usr/bin:/bin",
            "HOME": str(self.fake / "home"),
            "FAKE": str(self.fake),
            "SEE_SECONDS": "1",
            "TPU_POD_POLL_SECONDS": "0",
            "LANG": "C.UTF-8",
            **more,
        }

    def bash(self, *arguments, timeout=60, **environment):
        """The ended process of `bash ARGUMENTS` in the checkout."""
        return subprocess.run(
            ["bash", *map(str, arguments)],
            cwd=self.checkout,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def calls(self, *programs):
        """What the fakes were called with since the last time, [[program, argument, ...], ...]; of these programs only."""
        path = self.fake / "calls"
        words = path.read_text().split("\0")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        calls = []
        while words:
            count = int(words[0])
            calls.append(words[1 : count + 1])
            words = words[count + 1 :]
        return [call for call in calls if not programs or call[0] in programs]


def make(directory: pathlib.Path) -> Cloud:
    """A cloud of two hosts without a slice, and a committed checkout that holds the scripts."""
    fake, checkout = directory / "fake", directory / "checkout"
    for host in ("home", "host0", "host1"):
        (fake / host).mkdir(parents=True)
    (fake / "workers").write_text("2\n")
    (fake / "trainer").write_text(TRAINER)
    (fake / "trainer").chmod(0o755)
    shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "constraints.txt", checkout)
    (checkout / ".gitignore").write_text(".cache/\n")
    commit(checkout)
    return Cloud(fake, checkout)


def commit(checkout: pathlib.Path) -> None:
    """All of it becomes HEAD."""
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in ("init --quiet", "add --all", "commit --quiet --message=code"):
        subprocess.run(["git", *command.split()], cwd=checkout, env=os.environ | who, check=True)


def printed(output: str, *programs) -> list[list[str]]:
    """The commands of a dry run, as a shell would read them; of these programs only."""
    lines = shlex.split(output, comments=True) and output.splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]
    return [command for command in commands if command and command[0] in programs]
