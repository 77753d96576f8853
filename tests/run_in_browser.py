"""Steps in a real browser, Chromium as QtWebEngine has it, without a window: called by tests/helpers/browser.py.

On stdin a list of steps as JSON: {"open": URL}, {"evaluate": JavaScript}, {"size": [width, height]},
{"picture": FILE}: the whole page. On stdout, as JSON, what each "evaluate" came to, and everything that the page said on its
console.
"""

import json
import os
import sys

from PySide6.QtCore import QEventLoop, Qt, QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

_SECONDS = 30  # that a step may take


class _Page(QWebEnginePage):
    """Keeps what is said on the console."""

    def __init__(self, profile):
        super().__init__(profile)
        self.said = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.said.append(f"{level.name}: {message} ({source}:{line})")


class _Browser:
    def __init__(self):
        self._application = QApplication(sys.argv[:1])
        self._profile = QWebEngineProfile()  # keeps nothing on the disk
        self.page = _Page(self._profile)
        self._view = QWebEngineView()
        self._view.setPage(self.page)
        self.size(1100, 900)
        self._view.show()

    def _wait(self, start):
        """What `start` gives to the function that it is called with."""
        loop, found, timer = QEventLoop(), [], QTimer()
        timer.setSingleShot(True)
        timer.timeout.connect(loop.quit)
        timer.start(1000 * _SECONDS)

        def done(value=None):
            found.append(value)
            loop.quit()

        start(done)
        if not found:
            loop.exec()
        if not found:
            sys.exit(f"a step did not end within {_SECONDS} s")
        return found[0]

    def open(self, url):
        def start(done):
            self.page.loadFinished.connect(done, Qt.ConnectionType.SingleShotConnection)
            self.page.load(QUrl(url))

        if not self._wait(start):
            self.page.said.append(f"error: {url} was not loaded")

    def evaluate(self, code):
        return self._wait(lambda done: self.page.runJavaScript(f"JSON.stringify({code})", 0, done))

    def pause(self, milliseconds):
        self._wait(lambda done: QTimer.singleShot(milliseconds, done))

    def size(self, width, height):
        self._view.resize(width, height)

    def _painted(self):
        """The window as a picture, once there is something in its lowest part too, and nothing changes any more."""
        before = None
        for _ in range(100):
            self.pause(200)
            picture = self._view.grab().toImage()
            width, height = picture.width(), picture.height()
            lowest = {
                picture.pixel(x, y) for y in range(2 * height // 3, height - 4, 3) for x in range(8, width - 30, 7)
            }
            if len(lowest) > 1 and picture == before:
                return picture
            before = picture
        sys.exit("the page was not drawn")

    def picture(self, file):
        width, height = self._view.width(), int(self.evaluate("document.documentElement.scrollHeight"))
        before = self._view.height()
        self.size(width, height)
        if not self._painted().save(file):
            sys.exit(f"{file} cannot be written")
        self.size(width, before)
        self.pause(100)


def main():
    browser, values = _Browser(), []
    for step in json.load(sys.stdin):
        ((name, argument),) = step.items()
        if name == "evaluate":
            values.append(json.loads(browser.evaluate(argument)))
        elif name == "size":
            browser.size(*argument)
            browser.pause(200)
        else:
            {"open": browser.open, "picture": browser.picture}[name](argument)
    print(json.dumps({"values": values, "console": browser.page.said}), flush=True)
    os._exit(0)  # Qt would take the page and its profile apart in an order of its own


if __name__ == "__main__":
    main()
