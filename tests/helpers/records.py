"""Records of two runs that should be the same to rounding."""

import numpy as np

from r2vpo_jax.run import files


def assert_same(actual, expected, what):
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        if np.asarray(value).dtype.kind in "fc":
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{what} {name}")
        else:
            np.testing.assert_array_equal(actual[name], value, f"{what} {name}")


def assert_same_lines(path, other):
    """Numbers to rounding, everything else as it is."""
    assert len(files.read_jsonl(path)) == len(files.read_jsonl(other))
    for line, expected in zip(files.read_jsonl(path), files.read_jsonl(other), strict=True):
        assert line.keys() == expected.keys()
        untimed = {name for name in line if not name.startswith(files.TIME_PREFIXES)}
        assert_same({n: line[n] for n in untimed}, {n: expected[n] for n in untimed}, path)
