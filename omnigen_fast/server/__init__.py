"""OpenAI's image API over HTTP, on a scheduler."""
