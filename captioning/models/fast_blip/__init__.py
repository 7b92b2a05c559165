"""BLIP, faster: the same numbers from fused attention, shared image keys and packed weights."""
