"""What captions are worth: scores, baselines, confidence intervals."""

# And the prefix of the scores computed on their tokens
TOKENIZERS = {"ptb": "coco", "whitespace": "nlgeval", "whitespace_lower": "nlgeval_lower"}
