"""What the page and the server have in common: who may ask, how much, and for how long."""
