"""Inputs made by mutation, and what must hold for each of them.

python -m fuzz --help       # with tests/ on PYTHONPATH; `make fuzz` does both

mutate.py   mutations of bytes, JSON and text
kinds/      a module per kind of input: how one is made, and what reads it
oracle.py   what must hold while an input is read
worker.py   runs inputs in a process of their own
runner.py   hands inputs to workers, and reads what they found
"""
