"""What is a difference and what is not: seeds are paired, intervals are labelled."""
