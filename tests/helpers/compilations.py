"""What is compiled while a test looks."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """A list that grows by a name, as "jit(update)", whenever a program is compiled or read from the cache on disk."""
    seen, on = [], True

    def listener(event, _, fun_name="", **__):
        if on and event == "/jax/core/compile/backend_compile_duration":
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        on = False
