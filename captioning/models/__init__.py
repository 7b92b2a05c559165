"""Captioning models behind one interface, `captioner.py`."""
