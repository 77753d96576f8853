"""Programs of many runs are large: no file keeps its own for the next."""

import pytest

from tests.helpers import fused


@pytest.fixture(scope="module", autouse=True)
def _forgetting():
    yield
    fused.forget()
