"""The package as others get it: built by `python -m build`, installed from the wheel, called far from a checkout."""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import r2vpo_jax
from r2vpo_jax.config import shipped
from tests.helpers.paths import ROOT
from tests.helpers.trees import leaves

pytestmark = pytest.mark.slow

COMMANDS = ("train", "evaluate", "sweep", "report", "export", "pretrain", "serve")
# What a packager or a checkout leaves there.
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "tests")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


def call(*arguments, cwd, code=0, **environment):
    """(stdout, stderr) of a process that ends with this exit code."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == code, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout without its tests: building writes into it."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("source") / "r2vpo_jax", ignore=shutil.ignore_patterns(*LEFT_OUT)
    )


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """(source distribution, wheel made from it)."""
    directory = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", f"--outdir={directory}", cwd=source)
    (archive,), (wheel,) = directory.glob("*.tar.gz"), directory.glob("*.whl")
    return archive, wheel


def environment_with(directory, *what):
    """The folder of commands of a new virtual environment with `what`, in which the packages of this one are found too."""
    call(sys.executable, "-m", "venv", "--without-pip", directory, cwd=ROOT)
    python = directory / "bin" / "python"
    folders = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'others.pth').write_text({chr(10).join(folders)!r})"
    call(python, "-c", code, cwd=directory)
    # Its own copy of a package that the other environment has too.
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    call(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=directory)
    return directory / "bin"


@pytest.fixture(scope="module")
def commands(built, tmp_path_factory):
    """Where the commands of the installed wheel are."""
    return environment_with(tmp_path_factory.mktemp("wheel") / "environment", built[1])


def test_what_the_distributions_hold(built):
    archive, wheel = built
    packed = {
        path.relative_to(ROOT).as_posix()
        for top in ("r2vpo_jax", "experiments")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    information = {name for name in held if ".dist-info/" in name}
    assert held - information == {f"r2vpo_jax/{name}" if name.startswith("experiments/") else name for name in packed}
    assert {name.partition(".dist-info/")[2] for name in information} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"
    }  # fmt: skip
    assert wheel.name == f"r2vpo_jax-{r2vpo_jax.__version__}-py3-none-any.whl"
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert packed | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= held
    assert not [name for name in held if name.startswith("tests")]


def test_the_version_is_everywhere_the_same():
    assert f"\nversion: {r2vpo_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_each_command_says_what_it_is_and_of_which_version(commands, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        helps = {
            name: pool.submit(call, commands / f"r2vpo-{name}", "--help", cwd=tmp_path, code=1) for name in COMMANDS
        }
        version = pool.submit(call, commands / "r2vpo-train", "--version", cwd=tmp_path)
    own = {"train": "stop_after_iteration", "evaluate": "greedy", "sweep": "runs_at_once", "report": "reference",
           "export": "checkpoint", "pretrain": "num_steps", "serve": "batch_size"}  # fmt: skip
    for name, answer in helps.items():
        shown = " ".join(answer.result()[0].split())
        assert f"r2vpo-{name} --" in shown, name
        for flag in (own[name], "version"):
            assert f"--{flag}" in shown.replace("[no]", ""), name
        assert "python -m" not in shown, name
        assert "experiments/" not in shown, name
    assert version.result()[0].startswith(f"r2vpo_jax {r2vpo_jax.__version__}, JAX ")
    assert list(tmp_path.iterdir()) == []


def test_each_command_works_far_from_a_checkout(commands, tiny_sections, tmp_path):
    """A run by a name, its report and its weights, a sweep in two processes, a shipped model, and a file of one's own."""
    fields = dict(leaves(tiny_sections)) | {"trainer.num_iterations": 2}

    def run(name, *arguments):
        return call(commands / f"r2vpo-{name}", *arguments, cwd=tmp_path)[0]

    run("train", "--config=arithmetic", *(f"--config.{name}={value}" for name, value in fields.items()))
    assert "pass@1" in run("report", "--workdir=runs/arithmetic")
    run("export", "--model=runs/arithmetic", "--output=exports/arithmetic")
    assert (tmp_path / "exports" / "arithmetic" / "model.safetensors").is_file()

    base = (f"--config.base.{name}={value}" for name, value in fields.items())
    grid = '--config.sweep.cells=[{"objective.name": "r2vpo"}]', "--config.sweep.seeds=(0, 1)"
    run("sweep", "--config=sweep_variance:smoke", *base, *grid, "--mode=processes", "--processes=2")
    assert (tmp_path / "runs" / "sweep_variance_smoke" / "results.parquet").is_file()
    assert "report.html" in run("report", "--workdir=runs/sweep_variance_smoke")

    sizes = "--tasks=arithmetic", "--num_problems=4", "--k=2"
    assert "arithmetic" in run("evaluate", "--model=arithmetic_base", *sizes, "--output=runs/eval")
    run("pretrain", "--task=word_problems", "--data_output=data")
    assert (tmp_path / "data" / "train.jsonl").is_file()

    # A loss of one's own is found in the folder that one is in.
    (tmp_path / "mine.py").write_text(
        "from r2vpo_jax import config\nfrom r2vpo_jax.losses.clipped import ppo_clip_loss as my_loss\n\n\n"
        "def get_config():\n    run = config.named('arithmetic')\n    run.seed = 7\n"
        "    run.objective.update(name='ppo_clip', loss={'name': 'mine:my_loss'})\n    return run\n"
    )
    shown = run("train", "--config=mine.py", "--print_config").splitlines()
    values = {line.removeprefix("*").split()[0]: line.removeprefix("*").split()[1] for line in shown if "  " in line}
    assert (values["seed"], values["objective.loss.name"]) == ("7", "mine:my_loss")


def test_what_is_wrong_or_missing_is_one_line(commands, tmp_path):
    """A name that there is not, and packages of an extra that are not installed."""
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import PathFinder\n\n\nclass Others(PathFinder):\n    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name.partition('.')[0] not in ('math_verify', 'reasoning_gym'):\n"
        "            return super().find_spec(name, path, target)\n\n\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Others\n"
    )
    small = "--num_problems=2", "--k=1", "--output=runs/eval"
    for arguments, parts in (
        (("train", "--config=arithmetik"), ["did you mean arithmetic?", ", ".join(shipped.names())]),
        (("train",), ["--config is required, for example --config=arithmetic"]),
        (("train", "--config=word_problems"), ["pip install 'r2vpo_jax[reasoning]'"]),
        (("evaluate", "--tasks=chain_sum", *small), ["pip install 'r2vpo_jax[reasoning]'"]),
    ):
        name, *flags = arguments
        said = call(commands / f"r2vpo-{name}", *flags, cwd=tmp_path, code=2, PYTHONPATH=str(missing))[1]
        assert said.count("\n") == 1, said
        for part in (*parts, "error: "):
            assert part in said


def test_an_editable_installation_has_the_same_commands(source, tmp_path):
    there = environment_with(tmp_path / "environment", "-e", source)
    assert {path.name for path in there.glob("r2vpo-*")} == {f"r2vpo-{name}" for name in COMMANDS}
    (tmp_path / "empty").mkdir()
    call(there / "r2vpo-train", "--config=arithmetic_stale", "--print_config", cwd=tmp_path / "empty")
    where = call(there / "python", "-c", "import r2vpo_jax; print(r2vpo_jax.__file__)", cwd=tmp_path / "empty")[0]
    assert pathlib.Path(where.strip()) == source / "r2vpo_jax" / "__init__.py"
