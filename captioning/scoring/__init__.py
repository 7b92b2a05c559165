"""What captions are worth: scores, baselines, confidence intervals."""
