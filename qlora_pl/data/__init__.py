"""A row on disk -> a batch of token ids; the files are named in the order of the journey."""
