"""Benchmarks. Each script says what it measured on, and refuses to print times of wrong results."""
