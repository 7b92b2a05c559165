"""What captions are worth: scores, baselines, confidence intervals."""

TOKENIZERS = {"ptb": "coco", "whitespace": "nlgeval"}  # and the prefix of the scores computed on their tokens
