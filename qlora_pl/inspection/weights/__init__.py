"""What quantising a base costs, matrix by matrix: `qlora-pl inspect model`."""
