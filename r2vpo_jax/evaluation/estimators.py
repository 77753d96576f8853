"""Estimates and intervals from repeated samples. NumPy and SciPy; everything is deterministic."""

import collections

import numpy as np
from scipy import special


def pass_at_k(num_samples, num_right, k: int) -> np.ndarray:
    """Unbiased probability that at least one of k samples is right (arXiv 2107.03374, equation 1).

        1 - C(n - c, k) / C(n, k)

    Args:
      num_samples: n, samples per problem.
      num_right: c, int [problems].
      k: at most n.

    Returns:
      float64 [problems].

    Raises:
      ValueError: k is not in [1, n], or c not in [0, n].
    """
    num_right = np.asarray(num_right)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k={k}, n={num_samples}")
    if num_right.size and (num_right.min() < 0 or num_right.max() > num_samples):
        raise ValueError(f"the number of right samples must be between 0 and {num_samples}")
    wrong = num_samples - num_right[..., None]
    factors = 1.0 - k / np.arange(1, num_samples + 1)
    # C(n-c, k) / C(n, k) = prod_{i = n-c+1}^{n} (1 - k / i)
    kept = np.where(np.arange(1, num_samples + 1) > wrong, factors, 1.0)
    return 1.0 - np.prod(kept, axis=-1)


def majority_at_k(right, answers) -> np.ndarray:
    """Chance that the most frequent answer is right, as in self-consistency (arXiv 2203.11171).

    Samples without an answer do not vote. Among answers with equally many votes one is drawn: what counts is the mean
    of the tied. An answer counts as right to the extent that the samples which gave it were judged right.

    Args:
      right: bool [problems, k].
      answers: k answers per problem, equal if they say the same; None: the sample has none.

    Returns:
      float64 [problems], 0 where nobody votes.

    Raises:
      ValueError: there are not k answers to each problem.
    """
    right = np.asarray(right, np.float64)
    if right.ndim != 2 or [len(row) for row in answers] != [right.shape[1]] * len(right):
        raise ValueError(f"a majority needs an answer to each of the samples of shape {right.shape}")
    scores = np.zeros(len(right))
    for number, row in enumerate(answers):
        votes = collections.Counter(answer for answer in row if answer is not None)
        tied = [answer for answer, count in votes.items() if count == max(votes.values())]
        if tied:
            scores[number] = np.mean([right[number, [a == answer for a in row]].mean() for answer in tied])
    return scores


def bootstrap_interval(values, *, confidence=0.95, resamples=2000, seed=0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-problem values (problems are resampled, not samples).

    Args:
      values: [problems].
      confidence: two-sided.
      resamples, seed: of the bootstrap.

    Returns:
      (low, high).

    Raises:
      ValueError: no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a bootstrap needs a non-empty vector, got shape {values.shape}")
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values, confidence=0.95) -> tuple[float, float]:
    """(mean, half-width of its interval by Student's t) over seeds; half-width NaN for one value."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("a mean needs at least one value")
    if len(values) == 1:
        return float(values[0]), float("nan")
    quantile = special.stdtrit(len(values) - 1, (1 + confidence) / 2)
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))
