"""The training loop and its parts: collect, credit, replay, learn."""
