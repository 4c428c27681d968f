"""Processes of one run, and the Hub."""
