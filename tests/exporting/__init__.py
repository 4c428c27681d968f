"""What other engines are given."""
