"""From a grid file to its runs, each checked by the parser of ``fit``."""
