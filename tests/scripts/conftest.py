"""A cloud of folders; whatever its hosts still run ends with the test."""

import pytest

from tests.scripts import cloud as fakes


@pytest.fixture
def cloud(tmp_path):
    """Two hosts, no slice yet, and a checkout to launch from."""
    made = fakes.make(tmp_path)
    yield made
    for unit in made.fake.glob("host*/unit"):
        made.bash("-c", f"kill -KILL $(cat {unit})")
