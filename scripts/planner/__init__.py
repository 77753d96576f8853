"""What scripts/compile_for_tpu.py is made of: chips, programs, counts, and the search for a mesh."""
