"""Ratio-variance regularized policy optimization for language models, in JAX."""

import time

# Taken before anything heavy is imported: run times are counted from here.
PROCESS_START = time.perf_counter()

__version__ = "0.1.0"
