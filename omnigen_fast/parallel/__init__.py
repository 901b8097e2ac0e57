"""One call on several devices, each driven by a process of its own (a rank)."""
