"""What a run, or a folder of runs, looks like in a browser: pages that need no other file, no script and no network."""
