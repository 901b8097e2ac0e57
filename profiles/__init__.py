"""What the runtime knows of each device."""
