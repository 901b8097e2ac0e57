"""The page: its interface, jobs and examples, the demo, and the record in a saved picture."""
