"""What every section of a configuration is made of: a field with its line of help, and a check."""

import dataclasses


def option(default, help):
    """A dataclass field with its line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition, message):
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)
