"""How a request fits a device: its cost, and the fastest plan that fits."""
