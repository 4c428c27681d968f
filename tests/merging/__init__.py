"""Adapters that become part of their base."""
