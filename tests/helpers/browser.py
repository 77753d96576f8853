"""A real browser for tests of pages: Chromium as QtWebEngine has it, which comes by pip (extra [browser])."""

import importlib.util
import json
import os
import subprocess
import sys

from tests.helpers.paths import ROOT


def missing() -> str | None:
    """Why there is no browser here; None: there is one."""
    if importlib.util.find_spec("PySide6") is None:
        return "no browser: pip install -e '.[browser]'"
    opened = subprocess.run([sys.executable, "-c", "import PySide6.QtWebEngineWidgets"], capture_output=True, text=True)
    if opened.returncode == 0:
        return None
    return (
        f"the browser of the extra [browser] misses a library of the system: {opened.stderr.strip().splitlines()[-1]}"
    )


def browse(steps, scheme="light") -> tuple[list, list[str]]:
    """(what each step "evaluate" came to, what the pages said on the console).

    Args:
      steps: as tests/run_in_browser.py takes them.
      scheme: light or dark, as the person at the browser likes it.
    """
    chromium = f"--disable-gpu --disable-dev-shm-usage --blink-settings=preferredColorScheme={int(scheme == 'light')}"
    qt = {
        "QT_QPA_PLATFORM": "offscreen",
        "QT_QUICK_BACKEND": "software",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",  # which does not start as root
        "QTWEBENGINE_CHROMIUM_FLAGS": chromium,
    }
    command = [sys.executable, str(ROOT / "tests" / "run_in_browser.py")]
    done = subprocess.run(
        command, input=json.dumps(steps), env=os.environ | qt, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return found["values"], found["console"]
