"""A small model of OmniGen's architecture, trained from scratch on scenes drawn here."""
