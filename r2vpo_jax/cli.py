"""The one entry of all binaries: flags in, one clear line out when something is wrong.

A binary is called in two ways: `python -m experiments.train` in a checkout, `r2vpo-train` where the package is installed.
Its docstring and our messages are written for the first, and shown as the second needs them.

An unknown flag or field, a bad value or a missing file ends with one line on stderr and exit code 2, nearly
always before any work is done; everything unexpected keeps its traceback and exit code 1. That another process of a run is
missing or gone is one line and exit code 75: the same command goes on.
"""

import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Mapping

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from r2vpo_jax import __version__, cluster
from r2vpo_jax import config as config_lib
from r2vpo_jax.config import shipped
from r2vpo_jax.config.flags import leaves
from r2vpo_jax.errors import ClusterError, NonFiniteUpdateError, Stopped, UsageError, usage_errors
from r2vpo_jax.run.instruments import code_identity

_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every config field with its value and help, and exit.")
_VERSION = flags.DEFINE_bool("version", False, "Print the version, and exit.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Whether this is one of several processes of a run. Default: what the next three flags, Cloud TPU, SLURM or Open MPI say; a "
    "process that is alone starts nothing.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    f"host:port of process 0, where it is not found; without :port, {cluster.PORT}, which Google Cloud's firewall rule opens.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, where it is not found.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, where it is not found.")
_INITIALIZATION_TIMEOUT = flags.DEFINE_float(
    "initialization_timeout_seconds",
    300,
    "How long to wait for all processes to come; a large slice that starts cold may need 1800.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_float(
    "heartbeat_timeout_seconds",
    100,
    "A process that gives no sign of life for so long is taken for gone, and the others end with exit code "
    f"{cluster.LOST}; the same command goes on from the last checkpoint.",
    lower_bound=1,
)
_SHARED = (
    _PRINT_CONFIG, _VERSION, _DISTRIBUTED, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _INITIALIZATION_TIMEOUT, _HEARTBEAT_TIMEOUT,
)  # fmt: skip


def define_config() -> flags.FlagHolder:
    """The --config flag: a configuration that ships or a Python file that returns a ConfigDict, by name or by path.

    Fields are set by --config.section.field=value.
    """
    flag = config_flags.DEFINE_config_file(
        "config",
        None,
        f"Configuration: one of {', '.join(shipped.names())}, or a file such as my_config.py. What it takes follows a "
        "colon, as in sweep_variance:smoke. --config.section.field=value sets a field.",
    )
    parser = flags.FLAGS["config"].parser
    parse_file = parser.parse
    parser.parse = lambda text: parse_file(shipped.file_of(text))
    return flag


def define_sections(sections, renamed: Mapping[str, str]) -> flags.FlagHolder:
    """The --config flag where there is no file: sections of a ConfigDict, set by --config.section.field=value.

    Args:
      sections: the ConfigDict.
      renamed: old names of flags, without dashes, and what they are called now; they are refused.
    """
    for argument in sys.argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        now = renamed.get(name) or renamed.get(name.removeprefix("no"))
        if argument.startswith("-") and now:
            _fail(f"--{name} is now {now}")
    try:  # the command line is read here already
        return config_flags.DEFINE_config_dict(
            "config", sections, "Sections as in training: --config.section.field=value; --print_config lists them."
        )
    except _BAD_FLAGS as error:
        _refuse(error, sys.argv)


def require_flag(flag, example: str) -> None:
    """Raises UsageError when a flag that has no default was not given."""
    if not flag.value:
        raise UsageError(f"--{flag.name} is required, for example --{flag.name}={example}")


def directory_of(flag) -> str:
    """Where a run goes that was given no --workdir: runs/ and the name of its configuration, as runs/sweep_variance_smoke."""
    file, _, choice = config_flags.get_config_filename(flags.FLAGS[flag.name]).partition(":")
    words = [pathlib.Path(file).stem, *(word for word in choice.split(",") if word)]
    return str(pathlib.Path("runs") / "_".join(words))


def show_if_asked(text: Callable[[], str]) -> None:
    """With --print_config: print what `text` returns, and exit."""
    if _PRINT_CONFIG.value:
        print(text())
        sys.exit(0)


def resolve(flag) -> config_lib.Config:
    """The validated configuration behind a parsed --config flag; prints it and exits with --print_config.

    Raises:
      UsageError: no --config, an unknown field or a value out of range.
    """
    require_flag(flag, "arithmetic")
    with usage_errors(TypeError):
        config = config_lib.from_flags(flag.value)
    show_if_asked(lambda: config_lib.describe(config))
    if ignored := config_lib.without_effect(flag.value.to_dict()):
        print(f"note: {', '.join(ignored)} have no effect with these settings", file=sys.stderr)
    return config


def resolve_sweep(flag) -> tuple[dict, config_lib.SweepConfig]:
    """The same for a sweep: (plain values shared by all runs, the grid)."""
    require_flag(flag, "sweep_variance:smoke")
    with usage_errors(TypeError):
        if set(flag.value) != {"base", "sweep"}:
            raise UsageError("a sweep's config has the fields base and sweep, as --config=sweep_variance has")
        base, sweep = flag.value.base.to_dict(), config_lib.SweepConfig(**flag.value.sweep.to_dict())
        resolved = config_lib.from_dict(base)
    show_if_asked(lambda: config_lib.describe(sweep) + "\n" + config_lib.describe(resolved))
    return base, sweep


# Transformers serves tokenizers here; that PyTorch is missing is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def start_devices(facts: Mapping[str, object] | None = None) -> None:
    """Compilation cache, and the other processes of a run. Call before anything touches a device.

    Args:
      facts: JSON-compatible values by name that must be alike on all processes, besides the code and the versions of
        packages: the settings.

    Raises:
      UsageError: facts differ, or the processes were not started as they should be.
      ClusterError: a process has not come in time.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.cwd() / ".cache" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    place = cluster.find(
        _DISTRIBUTED.value,
        coordinator_address=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        timeout=_INITIALIZATION_TIMEOUT.value,
    )
    cluster.start(
        place,
        {"code": code_identity(), **(facts or {})},
        initialization_timeout=_INITIALIZATION_TIMEOUT.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )


# Where things lie may differ from host to host; what lies there is compared by its contents.
_PLACES = ("task.text.data_dir", "model.path")


def settings_to_compare(config, **more) -> dict[str, object]:
    """A configuration as `start_devices` takes it, and other settings by their names."""
    values = dict(leaves(json.loads(json.dumps(config_lib.to_dict(config), default=str))))
    return {name: value for name, value in values.items() if name not in _PLACES} | more


def _as_called(text: str) -> str:
    """A text that names the binaries and files of a checkout, with the names that they have for this caller."""
    if not pathlib.Path(sys.argv[0]).name.startswith("r2vpo-"):
        return text
    text = re.sub(r"python -m experiments\.(\w+)", r"r2vpo-\1", text)
    return re.sub(r"experiments/configs/(\w+)\.py", r"\1", text)


def _line(message) -> str:
    return f"error: {_as_called(' '.join(str(message).split()))}"


def _fail(message: str) -> None:
    print(_line(message), file=sys.stderr)
    sys.exit(2)


def _ending(error: Exception) -> tuple[int, str]:
    """(exit code, what is said) of a program that ends with an error; nothing is said of what keeps its traceback."""
    if isinstance(error, UsageError):
        return 2, _line(error)
    if isinstance(error, ClusterError):
        return cluster.LOST, _line(error)
    if isinstance(error, NonFiniteUpdateError):
        return 1, f"error: {error}"
    return 1, ""


_BAD_FLAGS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError)


def _refuse(error: Exception, argv) -> None:
    _fail(f"{_reason(error, argv)} (--help lists the flags, --print_config the config fields)")


def _reason(error: Exception, argv) -> str:
    """What was wrong with the flags; an unknown config field by its full name, an old one with its new name."""
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one error into another
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = (text or repr(error)).strip().splitlines()
    # What a configuration file raises comes as a traceback, the exception itself in the last line.
    message = lines[-1] if "whilst parsing config file" in lines[0] else lines[0]
    names = [argument.lstrip("-").partition("=")[0] for argument in argv[1:]]
    for field in (name.removeprefix("config.") for name in names if name.startswith("config.")):
        base = "base." if field.startswith("base.") else ""  # of a sweep
        if now := config_lib.new_name(field.removeprefix(base)):
            return f"config field {field} is now {base}{now}"
        if isinstance(error, (KeyError, AttributeError)) and any(f"'{name}'" in text for name in field.split(".")):
            if (
                field.removeprefix(base).startswith(("objective.loss.options.", "task.options."))
                and "Did you mean" not in text
            ):
                return f"{field} is no option that ships; options of your own loss or task are set in a config file (docs/extending.md)"
            near = re.search(r'Did you mean "(\w+)"', text)
            return f"unknown config field {field}" + (f"; did you mean {near[1]}?" if near else "")
    return message


def run(main) -> None:
    """Run `main()` as a program. Replaces absl.app.run.

    Args:
      main: a function of the binary's module, whose docstring --help shows, and its flags.
    """

    def parse(argv):
        try:
            rest = app.parse_flags_with_usage(argv) if "--help" in " ".join(argv) else flags.FLAGS(argv)
        except _BAD_FLAGS as error:
            _refuse(error, argv)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags start with --")
        if _VERSION.value:
            print(f"r2vpo_jax {__version__}, JAX {jax.__version__}, Python {platform.python_version()}")
            sys.exit(0)
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)  # libraries log their own set-up at info level
        try:
            code = main()
        except Stopped as stopped:
            print(stopped)
            code = 0
        except Exception as error:
            code, text = _ending(error)
            cluster.fail(error, code, text)
            if not text:
                raise
            print(text, file=sys.stderr)
            return code
        except KeyboardInterrupt as error:
            text = "interrupted; what was saved is intact"
            cluster.fail(error, 130, text)
            print(text, file=sys.stderr)
            return 130
        cluster.finish(code)
        return code

    binary = sys.modules[main.__module__]
    if binary.__name__ != "__main__":  # called by an installed script, which is what Python takes for the program
        sys.path.insert(0, os.getcwd())  # as python -m does: losses, tasks and rewards of the user's own are there
        sys.modules["__main__"].__doc__ = binary.__doc__ and _as_called(binary.__doc__)
    names = (*(flag.name for flag in _SHARED), *({"config"} & set(flags.FLAGS)))
    for flag in (*flags.FLAGS.get_flags_for_module(binary), *(flags.FLAGS[name] for name in names)):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --help shows it
    app.run(guarded, flags_parser=parse)


def parse_range(name: str, text: str | None) -> tuple[int, int] | None:
    """ "a:b" as (a, b), both counted from 1.

    Raises:
      UsageError: not two integers with 1 <= a <= b.
    """
    if text is None:
        return None
    try:
        first, last = (int(part) for part in text.split(":"))
    except ValueError as error:
        raise UsageError(f"--{name}={text} must be two integers, first:last") from error
    if not 1 <= first <= last:
        raise UsageError(f"--{name}={text} must have 1 <= first <= last")
    return first, last
