"""Many requests from a file, resumable: lines in, pictures and a line of results for each out."""
