"""Stands in for the few calls of ComfyUI that the nodes make; written for these tests."""
