"""What an adapter changes, matrix by matrix: `qlora-pl inspect adapter`."""
