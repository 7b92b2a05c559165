"""Captions of one's own images by a saved model."""
