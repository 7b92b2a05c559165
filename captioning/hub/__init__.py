"""The Hugging Face Hub: pinned commits, pushes, faults."""
