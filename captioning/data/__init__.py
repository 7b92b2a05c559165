"""Any source of images and captions in one schema, checked and tokenized."""
