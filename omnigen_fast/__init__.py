"""omnigen_fast: the OmniGen image generation model, fast and exact."""
