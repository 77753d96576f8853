"""The one entry of all binaries: flags in, one clear line out when something is wrong.

An unknown flag or field, a bad value or a missing file ends with one line on stderr and exit code 2, nearly
always before any work is done; everything unexpected keeps its traceback and exit code 1.
"""

import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from r2vpo_jax import config as config_lib
from r2vpo_jax.errors import NonFiniteUpdateError, Stopped, UsageError, usage_errors

_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every config field with its value and help, and exit.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize first (TPU pods find their peers by themselves)."
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where it is not found.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, where it is not found.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, where it is not found.")


def define_config() -> flags.FlagHolder:
    """The --config flag: a Python file that returns a ConfigDict; fields are set by --config.section.field=value."""
    return config_flags.DEFINE_config_file(
        "config", None, "Configuration file, for example experiments/configs/arithmetic.py."
    )


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
    require_flag(flag, "experiments/configs/arithmetic.py")
    with usage_errors(TypeError):
        config = config_lib.from_flags(flag.value)
    show_if_asked(lambda: config_lib.describe(config))
    if ignored := config_lib.without_effect(flag.value.to_dict()):
        print(f"note: {', '.join(ignored)} have no effect with these settings", file=sys.stderr)
    return config


def resolve_sweep(flag) -> tuple[dict, config_lib.SweepConfig]:
    """The same for a sweep: (plain values shared by all runs, the grid)."""
    require_flag(flag, "experiments/configs/sweep_variance.py:smoke")
    with usage_errors(TypeError):
        if set(flag.value) != {"base", "sweep"}:
            raise UsageError(
                "a sweep's config has the fields base and sweep, see experiments/configs/sweep_variance.py"
            )
        base, sweep = flag.value.base.to_dict(), config_lib.SweepConfig(**flag.value.sweep.to_dict())
        resolved = config_lib.from_dict(base)
    show_if_asked(lambda: config_lib.describe(sweep) + "\n" + config_lib.describe(resolved))
    return base, sweep


# Transformers serves tokenizers here; that PyTorch is missing is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def start_devices() -> None:
    """Compilation cache, and the other processes of a pod. Call before anything touches a device."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.cwd() / ".cache" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if _DISTRIBUTED.value:
        # It would take SIGTERM away from the process, also while it starts: a run listens to that itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator_address=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
        )


def _fail(message: str) -> None:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


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
    """Run `main()` as a program. Replaces absl.app.run."""

    def parse(argv):
        try:
            rest = app.parse_flags_with_usage(argv) if "--help" in " ".join(argv) else flags.FLAGS(argv)
        except _BAD_FLAGS as error:
            _refuse(error, argv)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)  # libraries log their own set-up at info level
        try:
            return main()
        except UsageError as error:
            _fail(error)
        except Stopped as stopped:
            print(stopped)
            return 0
        except NonFiniteUpdateError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; what was saved is intact", file=sys.stderr)
            return 130

    shared = (_PRINT_CONFIG, _DISTRIBUTED, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    for name in (*(flag.name for flag in shared), *({"config"} & set(flags.FLAGS))):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows it
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
