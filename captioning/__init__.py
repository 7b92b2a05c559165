"""The rooms behind `run_captioning.py`; `python -m captioning` lists the commands."""
