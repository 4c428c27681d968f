"""Encoded rows: made from the sources, counted, judged, kept on disk."""
