"""What a key means, where it acts and what it goes with: `qlora-pl explain`."""
