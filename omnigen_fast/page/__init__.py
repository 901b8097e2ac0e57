"""The page: its jobs, its looks, its examples, and the record that a picture carries."""
