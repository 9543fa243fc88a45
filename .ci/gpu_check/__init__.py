"""The parts of `.ci/gpu-check`. They need Python's own library and nothing else."""
