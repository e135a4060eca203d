"""Answers that exist before a client asks for them."""
