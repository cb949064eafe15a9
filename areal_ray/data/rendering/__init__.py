"""Renderers: documents and records to tokens, with those of them that are predicted."""
