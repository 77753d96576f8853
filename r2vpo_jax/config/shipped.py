"""The configurations that ship, by their names: the files of experiments/configs, also where only the package is installed."""

import difflib
import importlib.util
import pathlib

from ml_collections import config_dict

_PACKAGE = pathlib.Path(__file__).parent.parent
# setup.py puts the folder experiments/ of a checkout, which is beside the package, into it.
_FOLDERS = [place / "experiments" / "configs" for place in (_PACKAGE, _PACKAGE.parent)]
_DIRECTORY = next((folder for folder in _FOLDERS if folder.is_dir()), None)


def names() -> tuple[str, ...]:
    """The names of the configurations that ship; none where the library was copied without experiments/."""
    files = _DIRECTORY.glob("*.py") if _DIRECTORY else ()
    return tuple(sorted(file.stem for file in files if file.stem != "__init__"))


def file_of(text: str) -> str:
    """What --config was given, with the file's path in the place of the name of a configuration that ships.

    Args:
      text: a name or a path that ends in .py, and what the configuration takes after a colon: sweep_variance:smoke.

    Raises:
      ValueError: it is neither.
    """
    name, colon, choice = text.partition(":")
    if name.endswith(".py") or "/" in name:
        return text
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"no configuration is called {name!r}{hint}; the names are {', '.join(names()) or 'none here'}; "
            "a file of yours ends in .py, as in --config=my_config.py"
        )
    return f"{_DIRECTORY / name}.py{colon}{choice}"


def named(name: str, *choice: str) -> config_dict.ConfigDict:
    """A configuration that ships, to change and return from a file of one's own.

    Args:
      name: its name, such as arithmetic; `names()` are all.
      choice: what would follow the colon on the command line, where the configuration takes that.

    Returns:
      What its get_config returns, a new ConfigDict at each call.

    Raises:
      ValueError: no such name, or a choice that it refuses.
    """
    if name.endswith(".py") or "/" in name:
        raise ValueError(f"{name!r} is no name; the names are {', '.join(names())}")
    spec = importlib.util.spec_from_file_location(f"named_configuration_{name}", file_of(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*choice)
