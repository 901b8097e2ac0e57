"""The parts of `bench.gpu_check`: what each one does stands in its own file."""
