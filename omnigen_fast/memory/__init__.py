"""How a request fits a device: what it costs, which plan is the fastest that fits, how it is done."""
