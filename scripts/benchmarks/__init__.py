"""What benchmark.py measures, and with what."""
