"""Examples: read from files, checked to the last line, kept as token ids, handed out in padded batches."""
