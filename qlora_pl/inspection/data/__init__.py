"""Qlora-pl inspect data: the rows that fit would train on."""
