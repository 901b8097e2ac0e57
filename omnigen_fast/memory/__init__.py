"""How a request fits a device: its cost, the fastest plan that fits, and its execution."""
