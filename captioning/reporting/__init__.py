"""What a run leaves for its reader: results, page, card, summary."""
